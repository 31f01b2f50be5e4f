"""The client's half of a round; the only code that a device runs."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from fedlora import tree
from fedlora.errors import WireError
from fedlora.jobs import Job, Reply, empty_report
from fedlora.recipe import init_of
from fedlora.shrink import without_ranks
from fedlora.state import ClientState, Folds, named_seed
from fedlora.tasks.base import Rows
from fedlora.training import check_moved, train
from fedlora.transport import wire
from fedlora.transport.link import join_groups, split_groups
from fedlora.tree import Tree
from fedlora.workspace import Workspace


def run_job(job: Job, workspace: Workspace, rows: Rows, seconds: float = math.inf) -> Reply:
    """Takes a client's turn: decode, train, sparsify, clip, round, encode.

    Args:
        job: what to do.
        workspace: the resident model.
        rows: the client's training examples.
        seconds: how long the server waits.

    Returns:
        The reply; the trained model stays in ``workspace`` until the next job overwrites it.

    Raises:
        WireError: the payload is not what the recipe expects.
        TrainingError: the loss or the update is not finite, or the adapter did not move.
    """
    clock = time.perf_counter()
    recipe = job.recipe
    same = recipe.local.compute == job.base
    base = recipe if same else replace(recipe, local=replace(recipe.local, compute=job.base))
    workspace.settle(job.phase, base, job.setup)
    installed, groups = workspace.installed, workspace.installed.groups
    moving = job.round if recipe.aggregator.reinitialises else 0
    start = workspace.decode(job.payload, moving, lambda: _received(job, workspace))
    folds = workspace.folds(job.fold, job.memory.folds)
    workspace.show(recipe, start, folds)
    try:
        trained = train(workspace, rows, job, start, clock + min(seconds, recipe.local.timeout_seconds or math.inf))
    except TimeoutError:
        return Reply(None, remembered(job, start, folds), time.perf_counter() - clock)
    delta = installed.since(start)
    # where noise covers what clients send, nothing leaves without it, not even by a stop of the run
    silent = recipe.privacy.needs_uniform_mean or recipe.local.example_privacy is not None
    if silent and not tree.is_finite(delta):
        delta = tree.zeros_like(delta)
    if trained.steps and not silent:
        check_moved(job.client, trained, delta, groups)
    if job.memory.feedback:
        delta = tree.add(delta, job.memory.feedback)
    rank = recipe.shrink.after(start, tree.add(start, delta), recipe.rank) if recipe.shrink else 0
    if rank and rank < recipe.rank:
        delta = without_ranks(delta, rank)
    seed = named_seed(job.seed, "up")
    thinned = recipe.up.thin(delta, groups, job.round, seed)
    sent = recipe.privacy.clip(thinned)
    report = empty_report(recipe)
    if not silent:
        figures = {"examples": float(trained.examples), "steps": float(trained.steps), "loss": trained.loss}
        report |= {name: torch.tensor(value) for name, value in figures.items()}
        if recipe.shrink:
            report["rank"] = torch.tensor(float(rank))
    elif recipe.privacy.adapts:
        report["below"] = torch.tensor(float(recipe.privacy.clip(thinned) is thinned))
    packet = recipe.up.encode(sent, groups, job.round, seed, {"report": report}, trees=recipe.up.feedback)
    memory = replace(
        remembered(job, start, folds),
        optimizer=trained.optimizer,
        feedback=tree.subtract(delta, join_groups(packet.trees, groups)) if recipe.up.feedback else {},
    )
    return Reply(packet.raw, memory, time.perf_counter() - clock)


def remembered(job: Job, start: Tree, folds: Folds) -> ClientState:
    """What a client remembers of a message, whatever becomes of its turn."""
    return replace(
        job.memory,
        has_setup=job.recipe.memory != "none",
        held=start if job.recipe.memory == "last_round" else {},
        folds=folds if job.recipe.memory != "none" else Folds(),
    )


def _received(job: Job, workspace: Workspace) -> Tree:
    """The parameters that a payload tells, whatever it is relative to."""
    installed, groups = workspace.installed, workspace.installed.groups
    like = {name: value.detach() for name, value in installed.parameters.items()}
    sent = join_groups(wire.unpack(job.payload, split_groups(like, groups)), groups)
    reference = wire.reference_of(job.payload)
    if reference == "init":
        return tree.add(init_of(job.recipe, workspace.init, installed.seed, job.round), sent)
    if reference == "last_round":
        if not job.memory.held:
            raise WireError("The message tells what changed since the last round, and this client remembers none.")
        return tree.add(job.memory.held, sent)
    return sent

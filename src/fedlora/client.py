"""The client's half of a round; the only code that a device runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from fedlora import tree
from fedlora.errors import TrainingError, WireError
from fedlora.folds import FoldMessage
from fedlora.local import Local
from fedlora.recipe import Recipe, init_of
from fedlora.state import ClientState, Folds, generator, named_seed
from fedlora.tasks.base import Rows
from fedlora.transport import wire
from fedlora.transport.link import join_groups, split_groups
from fedlora.tree import Tree
from fedlora.tuning.lora import lora_layers
from fedlora.workspace import Workspace

REPORT = ("examples", "steps", "loss")


class Job(NamedTuple):
    """One client's turn, as a value: the same job gives the same reply in any process.

    Args:
        recipe: what to do.
        client: whose turn it is.
        phase: number of the phase.
        round: rounds finished in this phase.
        progress: rounds finished in the whole run, and rounds in the whole run, for the learning rate.
        seed: where this turn's draws start.
        payload: the parameters of this round.
        setup: the announcement of the phase; None if the client remembers it.
        fold: the edits of frozen weights that the client lacks, if there are any.
        memory: what the client remembers.
    """

    recipe: Recipe
    client: int
    phase: int
    round: int
    progress: tuple[int, int]
    seed: int
    payload: bytes
    setup: bytes | None
    fold: FoldMessage | None
    memory: ClientState


class Reply(NamedTuple):
    """A client's answer: the packet that travels, what stays with the client, and how long it worked."""

    packet: wire.Packet
    memory: ClientState
    seconds: float


class Trained(NamedTuple):
    """What local training reports: mean loss per step, optimiser steps, examples seen, the optimiser's state."""

    loss: float
    steps: int
    examples: int
    optimizer: Tree


def run_job(job: Job, workspace: Workspace, rows: Rows) -> Reply:
    """Takes a client's turn: decode, train, sparsify, clip, round, encode.

    Args:
        job: what to do.
        workspace: the resident model.
        rows: the client's training examples.

    Returns:
        The reply; the trained model stays in ``workspace`` until the next job overwrites it.

    Raises:
        WireError: the payload is not what the recipe expects.
        TrainingError: the loss or the update is not finite, or the adapter did not move.
    """
    clock = time.perf_counter()
    recipe = job.recipe
    workspace.settle(job.phase, recipe, job.setup)
    installed, groups = workspace.installed, workspace.installed.groups
    start = workspace.decode(job.payload, lambda: _received(job, workspace))
    folds = workspace.folds(job.fold, job.memory.folds)
    workspace.show(recipe, start, folds)
    trained = train(workspace, rows, job, start)
    delta = installed.since(start)
    if trained.steps:
        _check_moved(job.client, trained, delta, groups)
    if job.memory.feedback:
        delta = tree.add(delta, job.memory.feedback)
    seed = named_seed(job.seed, "up")
    sent = recipe.privacy.clip(recipe.up.thin(delta, groups, job.round, seed))
    # where noise covers what clients send, nothing leaves without it
    silent = recipe.privacy.needs_uniform_mean
    figures = (0.0, 0.0, 0.0) if silent else (float(trained.examples), float(trained.steps), trained.loss)
    report = {name: torch.tensor(value) for name, value in zip(REPORT, figures, strict=True)}
    packet = recipe.up.encode(sent, groups, job.round, seed, {"report": report}, trees=recipe.up.feedback)
    memory = ClientState(
        has_setup=recipe.memory != "none",
        optimizer=trained.optimizer,
        feedback=tree.subtract(delta, join_groups(packet.trees, groups)) if recipe.up.feedback else {},
        held=start if recipe.memory == "last_round" else {},
        folds=folds if recipe.memory != "none" else Folds(),
    )
    return Reply(packet, memory, time.perf_counter() - clock)


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


def train(workspace: Workspace, rows: Rows, job: Job, start: Tree) -> Trained:
    """Local training of the parameters that are in the model now.

    Args:
        workspace: the resident model.
        rows: the client's training examples.
        job: its settings, seed and memory.
        start: where the client started, for the proximal term.

    Raises:
        TrainingError: the loss is not finite.
    """
    local, task, device = job.recipe.local, workspace.task, workspace.device
    batches = _batches(rows, local, generator(named_seed(job.seed, "shuffle")))
    if not batches:
        return Trained(0.0, 0, 0, {})
    model, parameters = workspace.model, workspace.installed.parameters
    # adapters have dropout of their own, whatever the pre-trained model's is told
    model.train(local.dropout)
    for layer in lora_layers(model).values():
        layer.train()
    # one model serves all clients, so statistics of a client's batches must not stay in it
    for norm in (module for module in model.modules() if isinstance(module, _NormBase)):
        norm.eval()
    for name, parameter in parameters.items():
        parameter.requires_grad_(not job.recipe.tuning.still(name, job.round))
    values = list(parameters.values())
    anchors = [start[name].to(device) for name in parameters] if local.proximal else []
    pruned = job.recipe.prune is not None and job.round >= job.recipe.prune.first
    masks = [(start[name] != 0).to(device) for name in parameters] if pruned else []
    factor = local.schedule.factor(*job.progress)
    optimizer = local.optimizer.build(values, [factor * job.recipe.tuning.rate(name) for name in parameters])
    if local.keep_optimizer:
        _restore(optimizer, parameters, job.memory.optimizer)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed(job.seed, "dropout"))
        for chosen in batches:
            with workspace.autocast(local.compute):
                loss = task.loss(model, task.batch(chosen, device))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            _adjust(values, anchors, masks, local)
            optimizer.step()
            for value, mask in zip(values, masks, strict=False):
                value.data.mul_(mask)
            optimizer.zero_grad()
            workspace.installed.refresh()
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise TrainingError(
            f"client {job.client} got a loss of {mean} in round {sum(job.progress[:1]) + 1}; the learning rate is the "
            "usual reason: lower local.optimizer.lr, or set local.clip_norm"
        )
    kept = _state_of(optimizer, parameters) if local.keep_optimizer else {}
    return Trained(mean, len(batches), sum(len(chosen) for chosen in batches), kept)


def _batches(rows: Rows, local: Local, shuffle: torch.Generator) -> list[Rows]:
    batches: list[Rows] = []
    for _ in range(local.epochs if local.max_steps != 0 else 0):
        order = torch.randperm(len(rows), generator=shuffle).numpy() if local.shuffle else range(len(rows))
        shuffled = rows[order] if local.shuffle else rows
        batches += [shuffled[first : first + local.batch_size] for first in range(0, len(rows), local.batch_size)]
    return batches[: local.max_steps]


def _adjust(values: list[torch.nn.Parameter], anchors: list[Tensor], masks: list[Tensor], local: Local) -> None:
    with torch.no_grad():
        for value, anchor in zip(values, anchors, strict=False):
            if value.grad is not None:
                value.grad.add_(value - anchor, alpha=local.proximal)
        for value, mask in zip(values, masks, strict=False):
            if value.grad is not None:
                value.grad.mul_(mask)
    if local.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(values, local.clip_norm)


def _check_moved(client: int, trained: Trained, delta: Tree, groups: Mapping[str, str]) -> None:
    if not tree.is_finite(delta):
        raise TrainingError(
            f"client {client} trained to values that are not finite; lower local.optimizer.lr, or set local.clip_norm"
        )
    for group in set(groups.values()):
        if not any(bool(value.any()) for value in tree.select(delta, groups, group).values()):
            raise TrainingError(
                f"client {client} took {trained.steps} steps and its {group} did not move; nothing would be learnt: "
                "check the targets, the learning rate and the number of labelled examples"
            )


def _state_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> Tree:
    return {
        f"{name}/{slot}": value.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def _restore(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], kept: Tree) -> None:
    for key, value in kept.items():
        name, slot = key.rsplit("/", 1)
        place = parameters[name]
        # step counters live on the CPU, moments with their parameter
        optimizer.state[place][slot] = value.clone() if value.dim() == 0 else value.to(place.device, copy=True)

"""The client side of a round; the only code that runs on a device."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from fedlora.client.jobs import Job, Reply, report_of
from fedlora.client.training import LocalResult, Ready, check_trained, train
from fedlora.client.workspace import Workspace
from fedlora.core import tree
from fedlora.core.errors import WireError
from fedlora.core.schema import Schema
from fedlora.core.state import ClientState, named_seed
from fedlora.core.store import EMPTY, Store
from fedlora.core.tree import Tree
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe.recipe import restarted
from fedlora.tasks.base import Positions
from fedlora.transport import wire


def run_job(job: Job, workspace: Workspace, rows: Positions, seconds: float = math.inf) -> Reply:
    """Runs a client's turn.

    Args:
        job: the job to run.
        workspace: the resident model.
        rows: the client's training examples.
        seconds: how long the server waits.

    Returns:
        The reply; the trained model stays in ``workspace`` until the next job overwrites it.

    Raises:
        WireError: the payload is not what the recipe expects.
        TrainingError: the loss or the update is not finite.
    """
    ready = open_turn(job, workspace, rows, time.perf_counter() + seconds)
    (trained,) = train(workspace, [ready])
    return close_turn(ready, trained)


def open_turn(job: Job, workspace: Workspace, rows: Positions, deadline: float = math.inf) -> Ready:
    """Begins a client's turn: updates the frozen part to the announced setup and folds, and decodes the initial values.

    Args:
        job: the job to run.
        workspace: a resident model; its trained parameters are left unchanged.
        rows: the client's training examples.
        deadline: when the server stops waiting, as a ``time.perf_counter`` value.

    Raises:
        WireError: the payload is not what the recipe expects.
    """
    clock, local = time.perf_counter(), job.recipe.local
    job = decoded(job, workspace)
    return Ready(
        job=job,
        rows=rows,
        start=_with_personal(job, workspace, job.start or {}),
        folds=workspace.folds(job.fold, job.memory.folds),
        schema=workspace.installed.schema,
        deadline=min(deadline, clock + (local.timeout_seconds or math.inf)),
        seconds=time.perf_counter() - clock,
    )


def decoded(job: Job, workspace: Workspace) -> Job:
    """The job with its parameters decoded and without their bytes, which are a copy of the trained parameters.

    Args:
        job: the job; one that is decoded already stays as it is.
        workspace: a resident model, updated to the announced setup; its trained parameters are left unchanged.

    Raises:
        WireError: the payload is not what the recipe expects.
    """
    recipe, local = job.recipe, job.recipe.local
    base = recipe if local.compute == job.base else replace(recipe, local=replace(local, compute=job.base))
    workspace.apply_setup(job.phase, base, job.setup)
    if not job.payload and job.start is not None:
        return job
    start = workspace.decode(job.payload, job.round, lambda: _received(job, workspace))
    return job._replace(payload=b"", start=start)


def close_turn(ready: Ready, trained: LocalResult) -> Reply:
    """Ends a client's turn: adds the error feedback, prunes ranks, sparsifies, clips, rounds and encodes.

    Args:
        ready: the result of ``open_turn``.
        trained: the result of ``train``.

    Raises:
        TrainingError: the loss or the update is not finite.
    """
    clock = time.perf_counter() - trained.seconds
    job, recipe = ready.job, ready.job.recipe
    schema = recipe.tuning.in_round(ready.schema, job.round).sent()
    memory = _remembered(ready, schema)
    if trained.delta is None:
        return Reply(None, memory, trained.seconds)
    changed, unmoved = _checked(ready, trained, trained.delta)
    personal = {name: ready.start[name] + changed[name] for name in ready.schema.personal}
    delta = {name: changed[name] for name in schema}
    delta = recipe.up.with_lost(delta, job.memory.parts.tree("residual", "lost"))
    start = {name: ready.start[name] for name in schema}
    delta, rank = recipe.rank_pruning.apply(delta, start, schema, recipe.rank)
    seed = named_seed(job.seed, "up")
    sent, below = recipe.privacy.clipped(recipe.up.thin(delta, schema, job.round, seed))
    figures = {"examples": trained.examples, "steps": trained.steps, "loss": trained.loss, "rank": rank, "below": below}
    others = {"report": report_of(recipe, figures)}
    packet = recipe.up.encode(sent, schema, job.round, seed, others, trees=recipe.up.feedback)
    stores = {
        "optimizer": Store({"state": trained.optimizer}),
        "residual": Store({"lost": recipe.up.lost(delta, packet, schema)}),
        "personal": Store({"values": personal if memory.has_setup else {}}),
    }
    memory = replace(memory, parts=memory.parts.having(stores))
    return Reply(packet.raw, memory, time.perf_counter() - clock, unmoved=unmoved)


def _checked(ready: Ready, trained: LocalResult, delta: Tree) -> tuple[Tree, tuple[str, ...]]:
    """``delta``, or zeros if it is not finite and that must not be disclosed: a failure must not leak either.

    Also the groups that did not move, under the same condition.
    """
    if not disclosure_of(ready.job.recipe).failures:
        return (delta if tree.is_finite(delta) else tree.zeros_like(delta)), ()
    return delta, check_trained(ready, trained, delta) if trained.steps else ()


def _remembered(ready: Ready, schema: Schema) -> ClientState:
    """What a client remembers of a message, whether or not its turn succeeds."""
    memory, parts = ready.job.recipe.memory, ready.job.memory.parts
    held = {name: ready.start[name] for name in schema} if memory == "last_round" else {}
    base = ready.folds.store() if memory != "none" else EMPTY
    stores = {"down": Store({"held": held}), "base": base}
    return replace(ready.job.memory, has_setup=memory != "none", parts=parts.having(stores))


def _received(job: Job, workspace: Workspace) -> Tree:
    """The parameters in a payload; the server's own tensors if it is in this process, since they are the same."""
    found = _read(job, workspace)
    return job.start if job.start and tree.have_same_bits(job.start, found) else found


def _read(job: Job, workspace: Workspace) -> Tree:
    """The parameters in a payload, whatever its reference; everything except personal parameters."""
    installed, schema = workspace.installed, workspace.installed.schema.sent()
    like = {name: value.detach() for name, value in installed.parameters.items() if name in schema}
    sent = schema.join(wire.unpack(job.payload, schema.split(like), job.recipe.down.precisions))
    reference = wire.reference_of(job.payload)
    if reference == "init":
        init = workspace.init | restarted(job.recipe, installed.schema, workspace.init, installed.seed, job.round)
        return tree.add({name: init[name] for name in schema}, sent)
    if reference == "last_round":
        held = job.memory.parts.tree("down", "held")
        if not held:
            raise WireError(
                "The message is a difference from the last round, and this client has no state of that round."
            )
        return tree.add(held, sent)
    return sent


def _with_personal(job: Job, workspace: Workspace, shared: Tree) -> Tree:
    """The parameters to start from: the received ones, and the client's personal ones."""
    schema = workspace.installed.schema
    if not schema.personal:
        return shared
    own = job.memory.parts.tree("personal", "values") or workspace.personal
    return {name: own[name] if name in own else shared[name] for name in schema}

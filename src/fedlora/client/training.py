"""Local training: what a client does between receiving parameters and sending its update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedlora.client.jobs import Job
from fedlora.client.together import together
from fedlora.client.workspace import Workspace
from fedlora.core import tree
from fedlora.core.errors import TrainingError
from fedlora.core.progress import LOG
from fedlora.core.schema import Schema
from fedlora.core.state import Folds, named_seed
from fedlora.core.tree import Tree
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe.gradients import GradientSource, Losses, Proximal
from fedlora.tasks.base import Batch, Positions
from fedlora.tasks.models.checkpointing import checkpointing_without_dropout, without_cache
from fedlora.tuning import Installed
from fedlora.tuning.lora import lora_layers


class Ready(NamedTuple):
    """A client's turn before local training: everything needed to train, in any process.

    Args:
        job: the job to run.
        rows: the client's training examples.
        start: the parameters to start from; read-only.
        folds: the edits of frozen weights to start from.
        schema: the trained tensors.
        deadline: when to give up, as a ``time.perf_counter`` value.
        seconds: how long the client has worked so far.
    """

    job: Job
    rows: Positions
    start: Tree
    folds: Folds
    schema: Schema
    deadline: float
    seconds: float


class LocalResult(NamedTuple):
    """The result of local training.

    Args:
        delta: the change of the trained parameters; None if time ran out.
        loss: mean loss over its steps.
        steps: number of optimiser steps.
        examples: number of examples processed, counting every pass.
        optimizer: the optimiser's state, if it is kept.
        seconds: how long the client has worked so far.
    """

    delta: Tree | None
    loss: float
    steps: int
    examples: int
    optimizer: Tree
    seconds: float


def train(workspace: Workspace, turns: Sequence[Ready]) -> list[LocalResult]:
    """Trains several clients one after another on the resident model."""
    return [_train(workspace, ready, time.perf_counter() - ready.seconds) for ready in turns]


def _train(workspace: Workspace, ready: Ready, clock: float) -> LocalResult:
    job, local, installed = ready.job, ready.job.recipe.local, workspace.installed
    workspace.load(job.recipe, ready.start, ready.folds)
    source = local.gradient_source
    draws = source.draws(job.seed)
    batches = source.batches(ready.rows, local.num_steps(len(ready.rows)), local.batch_size, draws)
    if not batches:
        return LocalResult(installed.delta_from(ready.start), 0.0, 0, 0, {}, time.perf_counter() - clock)
    roles = job.recipe.tuning.in_round(ready.schema, job.round)
    for name, parameter in installed.parameters.items():
        parameter.requires_grad_(roles[name].role != "frozen")
    optimizer = _optimizer(installed, job)
    try:
        losses = _take_steps(workspace, ready, source, draws, batches, optimizer)
        kept = _state_of(optimizer, installed.parameters) if local.keep_optimizer else {}
    except TimeoutError:
        return LocalResult(None, 0.0, 0, 0, {}, time.perf_counter() - clock)
    except TrainingError as error:
        if disclosure_of(job.recipe).failures:
            raise
        # whether it fails depends on the data, so it counts as an update of zeros; only the client's own log has it
        LOG.warning("client %d, round %d: %s", job.client, job.progress[0] + 1, error)
        return LocalResult(tree.zeros_like(ready.start), 0.0, 0, 0, {}, time.perf_counter() - clock)
    finally:
        # an optimiser is in a cycle of references, and its moments would stay until a collection
        optimizer.state.clear()
        optimizer.param_groups.clear()
    return LocalResult(
        delta=installed.delta_from(ready.start),
        loss=float(torch.stack(losses).mean()),
        steps=len(batches),
        examples=sum(map(len, batches)),
        optimizer=kept,
        seconds=time.perf_counter() - clock,
    )


def _take_steps(
    workspace: Workspace,
    ready: Ready,
    source: GradientSource,
    draws: torch.Generator | None,
    batches: Sequence[Positions],
    optimizer: torch.optim.Optimizer,
) -> list[Tensor]:
    """The loss of each step.

    Raises:
        TimeoutError: the deadline passed.
    """
    job, recipe, local = ready.job, ready.job.recipe, ready.job.recipe.local
    task, model, device, parameters = workspace.task, workspace.model, workspace.device, workspace.installed.parameters
    values = list(parameters.values())
    with workspace.kernels():  # what it finds must not depend on the order of sums
        one_pass = together(workspace, source, ready.rows, local)
    proximal = Proximal(local.proximal, [ready.start[name].to(device) for name in parameters if local.proximal])
    # pruned entries are zero, and so are ranks that were not sent
    kept = recipe.pruning.kept(ready.start, job.round) or one_pass.kept(ready.start, ready.schema)
    masks = [(parameters[name], mask.to(device)) for name, mask in kept.items()]
    penalty = partial(recipe.rank_pruning.penalty, parameters, ready.schema, recipe.rank)

    def loss(batch: Batch) -> Tensor:
        with workspace.autocast(local.compute):
            return task.loss(model, batch)

    # in the order in which `gradients` passes them
    ahead = task.batches([part for chosen in batches for part in one_pass.passes(chosen)], device)
    loss_of = Losses(loss, task.num_terms, ahead)
    losses = []
    with workspace.kernels(), torch.random.fork_rng(devices=[]), training_mode(model, local.dropout):
        # torch.manual_seed() formats a stack trace for each kind of accelerator that is absent
        seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        seed(named_seed(job.seed, "dropout"))
        for chosen in batches:
            if time.perf_counter() > ready.deadline:
                raise TimeoutError
            losses.append(one_pass.gradients(loss_of, values, chosen, local.batch_size, draws, penalty))
            proximal.add_to(values)
            for value, mask in masks:
                if value.grad is not None:
                    value.grad.mul_(mask)
            if local.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(values, local.clip_norm)
            optimizer.step()
            for value, mask in masks:
                value.data.mul_(mask)
            optimizer.zero_grad()
            workspace.installed.refresh()
    return losses


def _optimizer(installed: Installed, job: Job) -> torch.optim.Optimizer:
    """The optimiser of a turn, with the state that the client remembers, if any."""
    local, parameters = job.recipe.local, installed.parameters
    rates = local.lr_scale.by_name(installed.schema, local.schedule.factor(*job.progress))
    optimizer = local.optimizer.build(list(parameters.values()), [rates[name] for name in parameters])
    for key, value in job.memory.parts.tree("optimizer", "state").items() if local.keep_optimizer else ():
        name, slot = key.rsplit("/", 1)
        place = parameters[name]
        optimizer.state[place][slot] = value.to(place.device, copy=True)
    return optimizer


@contextlib.contextmanager
def training_mode(model: nn.Module, dropout: bool) -> Iterator[None]:
    """Puts a model into training mode for a while.

    Args:
        model: the model with its tuning.
        dropout: whether the pre-trained model's own dropout is active; LoRA's is active in any case, and gradient
            checkpointing works either way.
    """
    model.train(dropout)
    for layer in lora_layers(model).values():
        layer.train()
    # all clients share one model, so statistics of a client's batches must not stay in it
    for norm in (module for module in model.modules() if isinstance(module, _NormBase)):
        norm.eval()
    with without_cache(model), contextlib.nullcontext() if dropout else checkpointing_without_dropout(model):
        yield


def check_trained(ready: Ready, trained: LocalResult, delta: Tree) -> tuple[str, ...]:
    """Refuses results that no training of at least one step can correctly produce.

    A first gradient may be zero: that of an adapter under a head of zeros. So what did not move is returned, and the
    server refuses a round in which it moved for no client.

    Args:
        ready: the turn before training.
        trained: the result of training.
        delta: the change of the trained parameters.

    Returns:
        The groups that did not change at all.

    Raises:
        TrainingError: a value is not finite.
    """
    job = ready.job
    if not math.isfinite(trained.loss):
        raise TrainingError(
            f"client {job.client} got a loss of {trained.loss} in round {job.progress[0] + 1}; the learning rate is "
            "the usual reason: lower local.optimizer.lr, or set local.clip_norm"
        )
    if not tree.is_finite(delta):
        raise TrainingError(
            f"client {job.client} trained to values that are not finite; lower local.optimizer.lr, or set "
            "local.clip_norm"
        )
    parts = ready.schema.split(delta).items()
    return tuple(group for group, part in parts if not any(bool(value.any()) for value in part.values()))


def _state_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> Tree:
    return {
        f"{name}/{slot}": value.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }

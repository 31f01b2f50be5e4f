"""Local training: what a client does between what it receives and what it sends."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedlora import tree
from fedlora.aggregate import factors
from fedlora.errors import TrainingError
from fedlora.jobs import Job
from fedlora.local import Local
from fedlora.state import generator, named_seed
from fedlora.tasks.base import Rows
from fedlora.tasks.checkpointing import checkpointing_without_dropout
from fedlora.tree import Tree
from fedlora.tuning.lora import lora_layers
from fedlora.workspace import Workspace


class Trained(NamedTuple):
    """What local training reports: mean loss per step, optimiser steps, examples seen, the optimiser's state."""

    loss: float
    steps: int
    examples: int
    optimizer: Tree


def train(workspace: Workspace, rows: Rows, job: Job, start: Tree, deadline: float = math.inf) -> Trained:
    """Local training of the parameters that are in the model now.

    Args:
        workspace: the resident model.
        rows: the client's training examples.
        job: its settings, seed and memory.
        start: where the client started, for the proximal term.
        deadline: on ``time.perf_counter``.

    Raises:
        TimeoutError: the deadline passed.
        TrainingError: the loss is not finite.
    """
    local, task, device = job.recipe.local, workspace.task, workspace.device
    noise = local.example_privacy
    draws = noise.draws(job.seed) if noise else None
    if noise:
        batches = noise.batches(rows, local.num_steps(len(rows)), local.batch_size, draws)
    else:
        batches = _batches(rows, local, generator(named_seed(job.seed, "shuffle")))
    if not batches:
        return Trained(0.0, 0, 0, {})
    model, parameters = workspace.model, workspace.installed.parameters
    for name, parameter in parameters.items():
        parameter.requires_grad_(not job.recipe.tuning.still(name, job.round))
    values = list(parameters.values())
    anchors = [start[name].to(device) for name in parameters] if local.proximal else []
    pruned = job.recipe.prune is not None and job.round >= job.recipe.prune.first
    masks = [(start[name] != 0).to(device) for name in parameters] if pruned else []
    if noise and not pruned:
        masks = [mask.to(device) for mask in _sent_ranks(start, parameters)]
    factor, groups = local.schedule.factor(*job.progress), workspace.installed.groups
    rates = local.lr_scale.by_name(groups, job.recipe.tuning.factor_of, factor)
    optimizer = local.optimizer.build(values, [rates[name] for name in parameters])
    if local.keep_optimizer:
        _restore(optimizer, parameters, job.memory.optimizer)
    losses, shrink = [], job.recipe.shrink
    with torch.random.fork_rng(devices=[]), training_mode(model, local.dropout):
        torch.manual_seed(named_seed(job.seed, "dropout"))
        for chosen in batches:
            if time.perf_counter() > deadline:
                raise TimeoutError
            if noise:
                with workspace.autocast(local.compute):
                    loss = noise.gradients(task, model, values, chosen, local.batch_size, device, draws)
            else:
                with workspace.autocast(local.compute):
                    loss = task.loss(model, task.batch(chosen, device))
                penalty = shrink.weight * shrink.tail(parameters, job.recipe.rank) if shrink else 0.0
                (loss + penalty).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            _adjust(values, anchors, masks, local)
            optimizer.step()
            for value, mask in zip(values, masks, strict=False):
                value.data.mul_(mask)
            optimizer.zero_grad()
            workspace.installed.refresh()
    mean = float(torch.stack(losses).mean())
    silent = job.recipe.privacy.needs_uniform_mean or noise is not None
    if not math.isfinite(mean) and not silent:
        raise TrainingError(
            f"client {job.client} got a loss of {mean} in round {sum(job.progress[:1]) + 1}; the learning rate is the "
            "usual reason: lower local.optimizer.lr, or set local.clip_norm"
        )
    kept = _state_of(optimizer, parameters) if local.keep_optimizer else {}
    return Trained(mean, len(batches), sum(len(chosen) for chosen in batches), kept)


@contextlib.contextmanager
def training_mode(model: nn.Module, dropout: bool) -> Iterator[None]:
    """A model ready for training steps.

    Args:
        model: the model with its tuning.
        dropout: whether the pre-trained model's own dropout is on; LoRA's own is on in any case, and without either
            gradient checkpointing still works.
    """
    model.train(dropout)
    for layer in lora_layers(model).values():
        layer.train()
    # one model serves all clients, so statistics of a client's batches must not stay in it
    for norm in (module for module in model.modules() if isinstance(module, _NormBase)):
        norm.eval()
    with contextlib.nullcontext() if dropout else checkpointing_without_dropout(model):
        yield


def _sent_ranks(start: Tree, names: Iterable[str]) -> list[Tensor]:
    """False at ranks of which a client was sent neither factor: they have no gradient, and noise would move them."""
    masks = {name: torch.ones((), dtype=torch.bool) for name in names}
    for a, b in factors(masks):
        sent = start[a].any(1) | start[b].any(0)
        masks[a], masks[b] = sent[:, None], sent
    return list(masks.values())


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


def check_moved(client: int, trained: Trained, delta: Tree, groups: Mapping[str, str]) -> None:
    """Refuses what no training would be right to give.

    Args:
        client: whose turn it was.
        trained: what training reported.
        delta: what it changed.
        groups: the group of every name in ``delta``.

    Raises:
        TrainingError: a value is not finite, or the adapter or the head did not move at all.
    """
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
        optimizer.state[place][slot] = value.to(place.device, copy=True)

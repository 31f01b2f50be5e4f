"""Per-example gradients of a batch in one pass against one example at a time, in the same process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from benchmarks.common import CPU, Figure, Settings, docstrings, figure, opened, ratios, side_by_side, spread_rows
from fedlora.client.together import Together, together
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.tasks.base import Positions
from fedlora.tuning import LoRA

SIZE = 16
LENGTHS = (16, 32, 128)
NOISE = ExampleNoise(clip_norm=1.0, noise_multiplier=0.0, seed=0)


def measure(settings: Settings) -> list[Figure]:
    """A DP-SGD step on 16 texts, one example at a time over all in one pass; with long texts it saves less."""
    formats: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    return [each for compute in formats for each in _one(settings, compute)]


def _one(settings: Settings, compute: Literal["fp32", "bf16"]) -> list[Figure]:
    task, local = docstrings(), Local(compute=compute, batch_size=SIZE)
    recipe = Recipe(tuning=LoRA(rank=16), local=local)
    workspace, state, _ = opened(task, recipe, spread_rows(task.num_examples("train"), 1, SIZE))
    workspace.apply_setup(0, recipe, state.setup)
    model, values = workspace.model.eval(), list(workspace.installed.parameters.values())
    batched = together(workspace, NOISE, np.arange(SIZE), local)
    assert isinstance(batched, Together)

    def step(source: Together | ExampleNoise, rows: Positions) -> list[torch.Tensor]:
        ahead = task.batches(source.passes(rows), CPU)

        def loss_of(_: Positions) -> torch.Tensor:
            with workspace.autocast(compute):
                return task.loss(model, next(ahead))

        source.gradients(loss_of, values, rows, SIZE, NOISE.draws(0))
        found = [value.grad for value in values if value.grad is not None]
        for value in values:
            value.grad = None
        return found

    lengths = task.sequences[0].lengths(np.arange(task.num_examples("train")))
    order, figures = np.argsort(lengths, kind="stable"), []
    for length in LENGTHS:
        first = min(int(np.searchsorted(lengths[order], length)), len(order) - SIZE)
        rows = order[first : first + SIZE]
        steps: dict[str, Callable[[], object]] = {
            "single": functools.partial(step, NOISE, rows),
            "batch": functools.partial(step, batched, rows),
        }
        times = side_by_side(settings, steps, 3 if settings.quick else 7)
        single, batch = (torch.cat([each.flatten() for each in step(source, rows)]) for source in (NOISE, batched))
        note = f"clipped sums {float((single - batch).norm() / single.norm()):.0e} apart"
        figures.append(
            figure(
                f"single / batch, {length} tokens, {compute}",
                ratios(times["single"], times["batch"]),
                "x",
                ">= 2" if length <= 32 else "",
                note,
            )
        )
    return figures

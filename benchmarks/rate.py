"""How much of the machine's rate of matrix products a LoRA step reaches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from benchmarks.common import CPU, Figure, Settings, docstrings, figure, opened, ratios, side_by_side, spread_rows
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.tuning import LoRA

BATCH, LENGTH = 16, 128
TOKENS = BATCH * LENGTH


def measure(settings: Settings) -> list[Figure]:
    """A step on 16 x 128 tokens in bfloat16 against bfloat16 products of the same shapes.

    The useful work is ``4 N tokens``: forward, and the gradient by the activations; frozen weights need no gradient.
    ``N`` counts the backbone's matrices. Attention products, adapters, softmax and the rest are not counted as useful.
    """
    task = docstrings(LENGTH)
    recipe = Recipe(tuning=LoRA(rank=16), local=Local(compute="bf16"))
    workspace, _, _ = opened(task, recipe, spread_rows(task.num_examples("train"), 1, BATCH))
    model, parameters = workspace.model, list(workspace.installed.parameters.values())
    batch = task.batch(np.arange(BATCH), CPU)
    optimizer = recipe.local.optimizer.build(parameters, [1.0] * len(parameters))
    matrices = [
        (tuple(parameter.shape), parameter.numel())
        for name, parameter in model.named_parameters()
        if ".encoder.layer." in name and name.endswith(".weight") and parameter.dim() == 2
    ]
    count = sum(number for _, number in matrices)
    attention = _attention(model)

    def step(dropout: bool) -> None:
        model.train(dropout)
        with workspace.autocast("bf16"):
            loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    products = _products([shape for shape, _ in matrices])
    times = side_by_side(
        settings,
        {"step": lambda: step(False), "dropout": lambda: step(True), "products": products},
        7 if settings.quick else 25,
        warm=2,
    )
    useful = 4 * count * TOKENS
    rate = {name: [useful / value / 1e9 for value in values] for name, values in times.items()}
    counted = f"4 x {count:,} x {TOKENS} FLOP = {useful / 1e9:.0f} GFLOP a step"
    return [
        figure("bfloat16 products of the layers' shapes", rate["products"], "GFLOP/s"),
        figure("LoRA step, useful work", rate["step"], "GFLOP/s", note=counted),
        figure("LoRA step / products", ratios(times["products"], times["step"]), "x", ">= 0.6"),
        figure(
            "the same, attention products counted as useful",
            [value * (useful + attention) / useful for value in ratios(times["products"], times["step"])],
            "x",
            note=f"{attention / 1e9:.1f} GFLOP more",
        ),
        figure("with the model's own dropout / products", ratios(times["products"], times["dropout"]), "x"),
    ]


def _attention(model: torch.nn.Module) -> int:
    """FLOP of the two attention products, forward once and backward twice."""
    config = model.config
    return 3 * 2 * 2 * BATCH * LENGTH * LENGTH * config.hidden_size * config.num_hidden_layers


def _products(shapes: list[tuple[int, ...]]) -> Callable[[], None]:
    """Every product that a step needs, forward and backward, with nothing in between."""
    made = {shape: torch.randn(shape).bfloat16() for shape in shapes}
    weights = [made[shape] for shape in shapes]
    inputs = {size: torch.randn(TOKENS, size).bfloat16() for shape in shapes for size in shape}

    def run() -> None:
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)
            inputs[weight.shape[0]] @ weight

    return run

"""Work on the server that grows with the matrices, for the shapes of two decoders: one layer times their number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Figure, Settings, figure
from fedlora.core.state import generator
from fedlora.server.aggregate.products import truncated_product
from fedlora.tuning.lora_init import SvdOfDelta, SvdOfWeight
from fedlora.tuning.subset import _draw, _scattered

RANK = 16
CLIENTS = 10
MODELS: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "Qwen3-0.6B": (28, {"q": (2048, 1024), "v": (1024, 1024)}),
    "Llama-3.1-8B": (32, {"q": (4096, 4096), "v": (1024, 4096)}),
}
"""Number of layers, and the ``(out, in)`` shapes of the default targets."""


def measure(settings: Settings) -> list[Figure]:
    """SVD starts, FlexLoRA's rule and SLoRA's mask and hand-over at rank 16 on query and value, of one layer."""
    figures = []
    for model, (layers, shapes) in MODELS.items():
        for name, work in _works(shapes).items():
            taken = []
            for _ in range(1 if settings.quick else 3):
                start = settings.seconds()
                work()
                taken.append(layers * (settings.seconds() - start))
            figures.append(figure(f"{name}, {model}", taken, "s", note=f"{layers} layers, from one layer's time"))
    return figures


def _works(shapes: dict[str, tuple[int, int]]) -> dict[str, Callable[[], object]]:
    draws = generator(0)
    weights = [torch.randn(shape, generator=draws) * _decay(shape[1]) for shape in shapes.values()]
    factors = [
        (torch.randn(rows, CLIENTS * RANK, generator=draws).double(), torch.randn(CLIENTS * RANK, columns).double())
        for rows, columns in shapes.values()
    ]
    # as many entries as an adapter of the same rank has
    counts = [RANK * (rows + columns) for rows, columns in shapes.values()]
    deltas = [
        _scattered(
            torch.randn(count, generator=draws), _draw(rows * columns, count, draws), torch.Size((rows, columns))
        )
        for (rows, columns), count in zip(shapes.values(), counts, strict=True)
    ]
    return {
        "SVD start (FeDeRA)": lambda: [SvdOfWeight().factors(each, None, RANK, 1.0, 0) for each in weights],
        f"FlexLoRA's rule, {CLIENTS} clients": lambda: [truncated_product(*each, RANK, "left") for each in factors],
        "SLoRA's mask": lambda: [
            _draw(rows * columns, count, generator(1))
            for (rows, columns), count in zip(shapes.values(), counts, strict=True)
        ],
        "SLoRA's start from its delta": lambda: [
            SvdOfDelta().factors(weight, delta, RANK, 1.0, 0) for weight, delta in zip(weights, deltas, strict=True)
        ],
    }


def _decay(size: int) -> Tensor:
    """Scales of columns that give a matrix falling singular values, as trained ones have."""
    return torch.arange(1, size + 1).float().rsqrt()

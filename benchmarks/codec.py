"""Time and size of a message against the entropy of its positions."""

from __future__ import annotations

import math

import torch

from benchmarks.common import Figure, Settings, docstrings, figure, opened, ratios, side_by_side, spread_rows
from fedlora.client import precisions, split_groups
from fedlora.recipe import Recipe
from fedlora.transport import Float32, Link, TopK, pack, unpack
from fedlora.tuning import LoRA

DENSITIES = {"1": 1.0, "1/4": 1 / 4, "1/16": 1 / 16, "1/64": 1 / 64}


def measure(settings: Settings) -> list[Figure]:
    """The MiniLM adapter of rank 16 and its head against its entropy.

    Values are random and the largest kept, so the least is ``k`` float32 and ``n H(k / n)`` bits of positions.
    """
    task = docstrings()
    _, state, _ = opened(task, Recipe(tuning=LoRA(rank=16)), spread_rows(task.num_examples("train"), 1, 16))
    draws = torch.Generator().manual_seed(0)
    params = {name: torch.randn(value.shape, generator=draws) for name, value in state.params.items()}
    total = sum(value.numel() for value in params.values())
    copied = torch.cat([value.reshape(-1) for value in params.values()])
    figures = []
    for label, density in DENSITIES.items():
        link = Link(sparsify=TopK(density=density)) if density < 1 else Link()
        parts = split_groups(link.prepare(params, state.groups, 0), state.groups)
        formats = precisions(parts, Float32())
        packet = pack(parts, formats)
        times = side_by_side(
            settings,
            {
                "copy": copied.clone,
                "pack": lambda parts=parts, formats=formats: pack(parts, formats),
                "unpack": lambda packet=packet, parts=parts: unpack(packet.raw, parts),
                "top-k": lambda link=link: link.prepare(params, state.groups, 0),
            },
            10 if settings.quick else 40,
        )
        kept, positions = _entropy(parts)
        bound = 4 * kept + positions
        figures.append(
            figure(
                f"bytes / entropy, density {label}",
                [len(packet.raw) / bound],
                "x",
                "<= 1.01",
                f"{len(packet.raw):,} bytes for {kept:,} of {total:,} entries; {4 * total:,} bytes dense",
            )
        )
        if positions:
            spent = len(packet.raw) - 4 * kept
            figures.append(
                figure(
                    f"positions / entropy, density {label}",
                    [spent / positions],
                    "x",
                    note=f"{spent:,} bytes, envelope and counts included",
                )
            )
        for name in ("top-k", "pack", "unpack"):
            if name != "top-k" or density < 1:
                figures.append(figure(f"{name}, density {label}", [1e3 * value for value in times[name]], "ms"))
        both = [a + b for a, b in zip(times["pack"], times["unpack"], strict=True)]
        figures.append(figure(f"pack and unpack / plain copy, density {label}", ratios(both, times["copy"]), "x"))
    return figures


def _entropy(parts: dict[str, dict[str, torch.Tensor]]) -> tuple[int, float]:
    """Entries kept, and bytes that their positions need by Shannon's formula, part by part."""
    kept, least = 0, 0.0
    for part in parts.values():
        size = sum(value.numel() for value in part.values())
        count = sum(int(torch.count_nonzero(value)) for value in part.values())
        kept += count
        if 0 < count < size:
            share = count / size
            least -= size * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
    return kept, least

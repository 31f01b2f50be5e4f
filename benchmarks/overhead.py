"""What fedlora adds to a client's turn: a round of clients that compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from benchmarks.common import Figure, Settings, docstrings, figure, opened, ratios, side_by_side, spread_rows
from fedlora.core import tree
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.rounds.round import run_round
from fedlora.transport import BFloat16, Link, TopK
from fedlora.tuning import LoRA

TARGETS = ("query", "key", "value", "attention.output.dense")
COHORT = 20


def measure(settings: Settings) -> list[Figure]:
    """Milliseconds per client, server's share included, and how many plain copies and sums that is.

    A client that trains nothing would answer with zeros, which cost no bytes, so every client's values are nudged as
    they are loaded: all entries travel, down and up. The nudge is timed apart and taken off.
    """
    nothing = Local(max_steps=0)
    links = {
        "dense float32": Link(),
        "dense bfloat16": Link(precision=BFloat16()),
        "top-k, density 1/4": Link(sparsify=TopK(density=0.25)),
    }
    rounds: dict[str, Callable[[], object]] = {}
    for name, link in links.items():
        recipe = Recipe(tuning=LoRA(rank=16, targets=TARGETS), local=nothing, down=link, up=link)
        rounds[name], params, nudge = _round(recipe)
    arrays = [value.numpy() for value in params.values()]
    sums = [array.copy() for array in arrays]

    def plain() -> None:
        for _ in range(COHORT):
            for total, array in zip(sums, [array.copy() for array in arrays], strict=True):
                total += array

    def nudges() -> None:
        for _ in range(COHORT):
            nudge()

    def kernels() -> None:
        for _ in range(COHORT):
            _least(params, sums)

    functions = {"plain": plain, "kernels": kernels, "nudges": nudges, **rounds}
    times = side_by_side(settings, functions, 5 if settings.quick else 25)
    for name in rounds:
        times[name] = [value - own for value, own in zip(times[name], times["nudges"], strict=True)]
    each = {name: [1e3 * value / COHORT for value in values] for name, values in times.items()}
    size = f"{tree.num_entries(params):,} float32 in {len(params)} tensors, {COHORT} clients a round"
    figures = [figure("NumPy copy and sum of the same arrays", each["plain"], "ms/client", note=size)]
    figures.append(figure("the least kernels of a turn, without their callers", each["kernels"], "ms/client"))
    for name in links:
        goal = "<= 1" if name == "dense float32" else ""
        figures.append(figure(f"no-op client, {name}", each[name], "ms/client", goal))
        figures.append(figure(f"no-op client, {name} / NumPy", ratios(times[name], times["plain"]), "x"))
    figures.append(
        figure("no-op client, dense float32 / kernels", ratios(times["dense float32"], times["kernels"]), "x")
    )
    return figures


def _least(params: tree.Tree, sums: list[NDArray[np.float32]]) -> None:
    """What a dense turn cannot do without, on both sides: load, subtract, check, pack, hash, unpack, measure, add."""
    here = {name: torch.empty_like(value) for name, value in params.items()}
    torch._foreach_copy_(list(here.values()), list(params.values()))
    delta = tree.flatten(here)
    torch._foreach_sub_(list(tree.unflatten(delta, here).values()), list(params.values()))
    vector = delta.numpy()
    assert np.isfinite(vector).all()
    np.count_nonzero(vector != 0)
    raw = b"".join([b"", vector.data])
    assert xxh3_64_intdigest(vector.data) == xxh3_64_intdigest(raw)
    read = np.frombuffer(raw, np.float32).copy()
    assert np.isfinite(read).all()
    np.count_nonzero(read != 0)
    update = tree.unflatten(torch.from_numpy(read), here)
    assert tree.norm(update) >= 0
    torch._foreach_add_([torch.from_numpy(total) for total in sums], list(update.values()))


def _round(recipe: Recipe) -> tuple[Callable[[], object], tree.Tree, Callable[[], None]]:
    task = docstrings()
    workspace, state, engine = opened(task, recipe, spread_rows(task.num_examples("train"), COHORT, 16))
    values = list(workspace.installed.parameters.values())
    draws = torch.Generator().manual_seed(0)
    params = {name: torch.randn(value.shape, generator=draws) for name, value in state.params.items()}
    state = replace(state, params=params)  # as in the middle of a run, where no factor is zero

    def nudge() -> None:
        with torch.no_grad():
            torch._foreach_add_(values, 1e-3)

    workspace.installed.refresh = nudge

    def one_round() -> None:
        nonlocal state  # every round sends new bytes, as in a run
        state, _ = run_round(recipe, state, tuple(range(COHORT)), engine, seed=0, rounds=1)

    return one_round, params, nudge

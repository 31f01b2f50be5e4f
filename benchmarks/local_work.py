"""Local training through fedlora against a plain PyTorch loop over the same model and the same batches."""

from __future__ import annotations

import torch

from benchmarks.common import CPU, Figure, Settings, docstrings, figure, opened, ratios, side_by_side, spread_rows
from fedlora.core.state import generator, named_seed
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.rounds.round import run_round
from fedlora.tuning import LoRA

SIZE = 48
NUM_CLIENTS = 2


def measure(settings: Settings) -> list[Figure]:
    """Examples per second of a whole federated round, and its share of the plain loop's.

    Both run the same batches. The plain loop keeps one optimiser and one set of parameters, and no bytes are made.
    """
    figures = []
    for compute in ("fp32", "bf16"):
        figures += _one(settings, Recipe(tuning=LoRA(rank=16), local=Local(compute=compute)), compute)
    return figures


def _one(settings: Settings, recipe: Recipe, compute: str) -> list[Figure]:
    task = docstrings()
    cohort = tuple(range(1 if settings.quick else NUM_CLIENTS))
    population = spread_rows(task.num_examples("train"), len(cohort), SIZE)
    _, state, engine = opened(task, recipe, population)
    other, _, _ = opened(task, recipe, population)
    size = recipe.local.batch_size
    batches = []
    for client in cohort:
        # the order that the client draws
        seed = named_seed(named_seed(0, "client", 0, client), "shuffle")
        rows = population.rows_of(client)[torch.randperm(SIZE, generator=generator(seed)).numpy()]
        batches += [rows[first : first + size] for first in range(0, SIZE, size)]
    model = other.model.eval()  # the clients' dropout is off
    optimizer = torch.optim.SGD(list(other.installed.parameters.values()), lr=0.05, momentum=0.9)

    def plain() -> None:
        for rows in batches:
            batch = task.batch(rows, CPU)
            with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
                loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def federated() -> None:
        run_round(recipe, state, cohort, engine, seed=0, rounds=1)

    times = side_by_side(settings, {"plain": plain, "federated": federated}, 3 if settings.quick else 8)
    examples = SIZE * len(cohort)
    return [
        figure(f"plain loop, {compute}", [examples / value for value in times["plain"]], "examples/s"),
        figure(f"federated round, {compute}", [examples / value for value in times["federated"]], "examples/s"),
        figure(
            f"federated / plain, {compute}",
            ratios(times["plain"], times["federated"]),
            "x",
            ">= 0.95",
            f"{len(cohort)} clients, {len(batches)} steps of {size} examples in both",
        ),
    ]

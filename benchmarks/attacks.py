"""How many of ten clients may attack before a rule of aggregation fails: ``python -m benchmarks.attacks``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedlora.client.workspace import Workspace
from fedlora.core.errors import FedloraError
from fedlora.core.schema import Pair, Schema
from fedlora.core.state import Change, Update
from fedlora.core.store import Store
from fedlora.core.tree import Tree
from fedlora.recipe import Recipe
from fedlora.recipe.local import AdamW, Local
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.server.aggregate import (
    Accumulator,
    Aggregator,
    CoordinateMedian,
    Krum,
    Mean,
    NormBound,
    ProductExact,
    SparsityWeighted,
    Stack,
    SvdRedistribute,
    TrimmedMean,
)
from fedlora.server.aggregate.products import truncated_product
from fedlora.testing import equal_population, toy_task
from fedlora.testing.attacks import ATTACKS, Attacked, AttackName

CLIENTS, ROWS, ROUNDS, LOSS = 10, 120, 6, 0.1


class _OnProducts(Accumulator):
    """A rule of each coordinate on what updates change in ``B A``; the result gets factors of the old rank by SVD."""

    def __init__(self, rule: CoordinateMedian | TrimmedMean, params: Tree, schema: Schema, plain: Accumulator) -> None:
        self._rule, self._params, self._pairs, self._plain = rule, params, schema.pairs, plain
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._plain.add(update)
        self._updates.append(update)

    def finish(self) -> Change:
        change = self._plain.finish()
        factors: Tree = {}
        for a, b, _ in self._pairs:
            rows = torch.stack([self._moved(update, (a, b, "")).flatten() for update in self._updates])
            old = self._params[b].double() @ self._params[a].double()
            goal = old + self._rule.of(rows).view_as(old)
            eye = torch.eye(old.shape[1], dtype=goal.dtype)
            new_b, new_a = truncated_product(goal, eye, len(self._params[a]), "left")
            factors |= {a: new_a.float() - self._params[a], b: new_b.float() - self._params[b]}
        return change._replace(delta=change.delta | factors)

    @staticmethod
    def _moved(update: Update, pair: Pair) -> torch.Tensor:
        a, b, _ = pair
        start_a, start_b = update.start[a].double(), update.start[b].double()
        return (start_b + update.delta[b]) @ (start_a + update.delta[a]) - start_b @ start_a


class MedianOfProducts(CoordinateMedian):
    """The median of each entry of the products: not offered, as the table shows why."""

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return _OnProducts(self, params, schema, super().begin(params, schema, store))


class TrimmedMeanOfProducts(TrimmedMean):
    """The trimmed mean of each entry of the products: not offered, as the table shows why."""

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return _OnProducts(self, params, schema, super().begin(params, schema, store))


RULES: dict[str, Aggregator] = {
    "mean": Mean(),
    "sparsity_weighted": SparsityWeighted(),
    "svd_redistribute": SvdRedistribute(),
    "product_exact": ProductExact(),
    "stack": Stack(),
    "norm_bound (0.8)": NormBound(norm=0.8),
    "median": CoordinateMedian(),
    "trimmed_mean (0.4)": TrimmedMean(trim=0.4),
    "median of products": MedianOfProducts(),
    "trimmed_mean (0.4) of products": TrimmedMeanOfProducts(trim=0.4),
    "krum (3, 2)": Krum(faulty=3, select=2),
    "krum (3, 2, product)": Krum(faulty=3, select=2, measure="product"),
    "norm_bound (0.8, product)": NormBound(norm=0.8, measure="product"),
}


def accuracy(rule: Aggregator, attack: AttackName, attackers: int) -> float:
    """Training accuracy after ``ROUNDS`` rounds of all clients; 0 if the run fails."""
    workspace = Workspace(toy_task(num_examples=ROWS), 0, torch.device("cpu"))
    recipe = Recipe(aggregator=rule, local=Local(optimizer=AdamW(lr=0.02), batch_size=ROWS // CLIENTS))
    state, _ = open_phase(workspace, 0, recipe, 0, 0, None)
    engine = Attacked(workspace, equal_population(ROWS, CLIENTS), attack, range(attackers))
    try:
        for _ in range(ROUNDS):
            state, _ = run_round(recipe, state, tuple(range(CLIENTS)), engine, 0, ROUNDS)
    except FedloraError:
        return 0.0
    workspace.load(recipe, state.params, state.folds)
    return workspace.evaluate(np.arange(ROWS), "train", "fp32").metrics["accuracy"]


def tolerated(holds: Callable[[int], bool]) -> int:
    """The largest of 0 to 4 attackers that a rule tolerates, if it tolerates any smaller number."""
    if holds(2):
        return 4 if holds(4) else 3 if holds(3) else 2
    return int(holds(1))


def main() -> None:
    """Prints the table, and writes it as JSON to the file named on the command line."""
    torch.set_num_threads(1)
    print("| rule | without attack | " + " | ".join(f"`{name}`" for name in ATTACKS) + " |")
    print("| --- | --- |" + " --- |" * len(ATTACKS))
    table = {}
    for name, rule in RULES.items():
        honest = accuracy(rule, "scaled", 0)
        row = {
            attack: tolerated(lambda count, a=attack, r=rule, h=honest: accuracy(r, a, count) >= h - LOSS)
            for attack in ATTACKS
        }
        table[name] = {"honest": honest, **row}
        print(f"| `{name}` | {honest:.2f} | " + " | ".join(map(str, row.values())) + " |", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

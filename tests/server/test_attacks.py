"""Attacks over every aggregator: a robust rule stays close to the honest clients, and the harness does what it says."""

from __future__ import annotations

import functools

import pytest
import torch

from fedlora.client.workspace import Workspace
from fedlora.core import tree
from fedlora.core.schema import Schema
from fedlora.core.state import Update, generator
from fedlora.core.store import EMPTY
from fedlora.core.tree import Tree
from fedlora.recipe import Recipe
from fedlora.recipe.local import AdamW, Local
from fedlora.rounds.outliers import Outliers
from fedlora.rounds.phases import open_phase
from fedlora.rounds.plan import make_plan
from fedlora.rounds.uplink import Uplink
from fedlora.server.aggregate import AGGREGATORS, Aggregator, Krum, NormBound, measure
from fedlora.testing import equal_population, schema_of, toy_task
from fedlora.testing.attacks import ATTACKS, Attacked, AttackName

CLIENTS = 7
RECIPE = Recipe(local=Local(optimizer=AdamW(lr=0.02), batch_size=12))
ROBUST = ("median", "trimmed_mean", "krum", "norm_bound")
RULES: dict[str, Aggregator] = {
    **{kind: cls() for kind, cls in AGGREGATORS.items() if kind not in ("krum", "norm_bound")},
    "krum": Krum(faulty=2),
    "norm_bound": NormBound(norm=0.1),
}


@functools.cache
def updates(attack: AttackName, attackers: int) -> tuple[tuple[Update, ...], Tree, Schema]:
    """The updates of a round, with the server's parameters and their schema."""
    workspace = Workspace(toy_task(num_examples=84), 0, torch.device("cpu"))
    state, _ = open_phase(workspace, 0, RECIPE, 0, 0, None)
    engine = Attacked(workspace, equal_population(84, CLIENTS), attack, range(attackers))
    plan = make_plan(RECIPE, state, tuple(range(CLIENTS)), {}, 0, 1)
    uplink = Uplink(RECIPE, plan, state.schema, engine, Outliers(RECIPE))
    return tuple(uplink.updates(state.params)), state.params, state.schema.sent()


def change_of(rule: Aggregator, attack: AttackName, attackers: int) -> Tree:
    found, params, schema = updates(attack, attackers)
    accumulator = rule.begin(params, schema, EMPTY)
    for update in found:
        accumulator.add(update)
    return accumulator.finish().delta


def far(one: Tree, other: Tree) -> float:
    return tree.norm(tree.subtract(one, other))


def test_every_aggregator_is_attacked() -> None:
    assert RULES.keys() == AGGREGATORS.keys()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", RULES)
def test_one_attacker_of_seven(kind: str, attack: AttackName) -> None:
    honest = change_of(RULES["mean"], attack, 0)
    moved = change_of(RULES[kind], attack, 1)
    assert tree.is_finite(moved)
    if kind in ROBUST:
        # no farther than an honest client is from the mean of all
        usual = max(far(update.delta, honest) for update in updates(attack, 0)[0])
        assert far(moved, honest) <= usual
    elif kind == "mean" and attack in ("scaled", "random", "constant"):
        assert far(moved, honest) > tree.norm(honest)


@pytest.mark.parametrize("attack", ATTACKS)
def test_only_attackers_answer_with_something_else_and_always_the_same(attack: AttackName) -> None:
    honest, attacked = updates(attack, 0)[0], updates(attack, 2)[0]
    same = [
        all(torch.equal(left.delta[name], right.delta[name]) for name in left.delta)
        for left, right in zip(honest, attacked, strict=True)
    ]
    assert same == [False, False, *[True] * 5]
    lengths = [tree.norm(right.delta) / tree.norm(left.delta) for left, right in zip(honest, attacked, strict=True)]
    factor = {"sign_flipped": 3.0, "label_flipped": lengths[0]}.get(attack, 10.0)
    assert lengths[0] == pytest.approx(factor, rel=1e-4)
    again = ATTACKS[attack](honest[0].delta, 5), ATTACKS[attack](honest[0].delta, 5)
    assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])


# ---- measured on products


def made(seed: int, rows: int = 5) -> tuple[Tree, Tree, Schema]:
    """Factors, a change of them, and their schema, with a head."""
    draws = generator(seed)
    start = {"m.lora_A": torch.randn(2, 4, generator=draws), "m.lora_B": torch.randn(rows, 2, generator=draws)}
    start["head"] = torch.zeros(3)
    delta = {name: torch.randn(value.shape, generator=draws) for name, value in start.items()}
    return start, delta, schema_of({"m.lora_A": "adapter", "m.lora_B": "adapter", "head": "head"})


def dense(start: Tree, delta: Tree) -> torch.Tensor:
    """What a change of factors changes, as one vector."""
    now = tree.add(start, delta)
    product = now["m.lora_B"] @ now["m.lora_A"] - start["m.lora_B"] @ start["m.lora_A"]
    return torch.cat([product.reshape(-1), delta["head"]]).double()


def test_lengths_and_distances_are_those_of_dense_products() -> None:
    start, _, schema = made(0)
    deltas = [made(seed)[1] for seed in (1, 2, 3)]
    found = measure.inner_products([Update(start, delta, 1.0) for delta in deltas], schema.pairs)
    rows = torch.stack([dense(start, delta) for delta in deltas])
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-5, atol=1e-5)
    clipped = measure.bounded(Update(start, deltas[0], 1.0), schema.pairs, 0.5)
    assert float(dense(start, clipped.delta).norm()) == pytest.approx(0.5, rel=0.3)
    assert float(dense(start, clipped.delta).norm()) <= 0.5 * (1 + 1e-5)


def test_factors_that_hide_the_same_product_are_close_on_products_only() -> None:
    start, delta, schema = made(0)
    goal = tree.add(start, delta)
    turn = torch.tensor([[0.0, -5.0], [0.2, 0.0]])
    turned = {"m.lora_A": turn @ goal["m.lora_A"], "m.lora_B": goal["m.lora_B"] @ turn.inverse(), "head": goal["head"]}
    deltas = [tree.subtract(turned, start), *[tree.add(delta, made(seed)[1], 0.2) for seed in (5, 6, 7)]]
    deltas[1:1] = [delta]

    def chosen(rule: Krum) -> Tree:
        accumulator = rule.begin(start, schema, EMPTY)
        for one in deltas:
            accumulator.add(Update(start, one, 1.0))
        return accumulator.finish().delta

    product = chosen(Krum(faulty=1, measure="product"))
    assert far(product, deltas[0]) < 1e-5 or far(product, delta) < 1e-5
    inner = measure.inner_products([Update(start, one, 1.0) for one in (deltas[0], delta)], schema.pairs)
    assert inner[0, 0] == pytest.approx(float(inner[1, 1]), rel=1e-4)
    assert far(deltas[0], delta) > 1.0
    rule = NormBound(norm=0.01, measure="product").begin(start, schema, EMPTY)
    rule.add(Update(start, deltas[0], 1.0))
    assert float(dense(start, rule.finish().delta).norm()) <= 0.0101

"""HetLoRA: clients that give up ranks, and a mean in which the ranks that they lack count as zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.toy import LOCAL, Federation, combined

from fedlora.core import tree
from fedlora.core.errors import ConfigError, WireError
from fedlora.core.state import Update
from fedlora.core.store import Memory
from fedlora.methods import het_lora
from fedlora.population.tiers import Tier
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.rounds.checkpoint import load_state, save_state
from fedlora.rounds.round import run_round
from fedlora.server.aggregate import SparsityWeighted
from fedlora.server.optimizers import Sgd
from fedlora.testing import schema_of
from fedlora.transport import Link, RankSlice, TopK
from fedlora.tuning import Full, LoRA

FACTORS = {
    "m.lora_A": torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]),
    "m.lora_B": torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]),
    "head": torch.tensor([1.0]),
}
SCHEMA = schema_of({"m.lora_A": "adapter", "m.lora_B": "adapter", "head": "head"})


def test_the_tail_by_hand() -> None:
    assert RankPruning(keep=0.99).fewer(3) == 2
    assert RankPruning(keep=0.4).fewer(3) == 1
    assert RankPruning(keep=0.1).fewer(3) == 1
    assert float(RankPruning(keep=0.7).tail(FACTORS, SCHEMA, 3)) == pytest.approx(2.0 * 10.0)
    assert float(RankPruning(keep=0.4).tail(FACTORS, SCHEMA, 3)) == pytest.approx(8**0.5 * 101**0.5)
    # a client of rank 2 has no third
    assert float(RankPruning(keep=0.7).tail(FACTORS, SCHEMA, 2)) == pytest.approx(2.0 * 1.0)


def test_a_tail_that_became_smaller_is_given_up() -> None:
    smaller = {**FACTORS, "m.lora_B": FACTORS["m.lora_B"] * 0.9}
    shrink = RankPruning(keep=0.7)
    assert shrink.after(FACTORS, smaller, SCHEMA, 3) == 2
    assert shrink.after(smaller, FACTORS, SCHEMA, 3) == 3
    assert shrink.after(FACTORS, FACTORS, SCHEMA, 3) == 3


def test_what_is_given_up_is_not_sent() -> None:
    left = RankPruning().keep_ranks(FACTORS, SCHEMA, 2)
    assert left["m.lora_A"].tolist() == [[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]
    assert left["m.lora_B"].tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert left["head"] is FACTORS["head"]
    assert FACTORS["m.lora_A"][2, 0] == 6.0


def test_zero_padding_is_the_weighted_mean_of_padded_adapters() -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = {"m.lora_A": (4, 6), "m.lora_B": (5, 4), "head": (3,)}
    params = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    schema = schema_of(dict.fromkeys(params, "adapter"))
    updates = []
    for rank in (1, 2, 4):
        start = RankSlice(rank=rank)(params, schema, 0)
        delta = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
        updates.append(Update(start, RankPruning().keep_ranks(delta, schema, rank), 1.0))
    whole = [tree.add(update.start, update.delta) for update in updates]
    norms = np.array([float((one["m.lora_B"] @ one["m.lora_A"]).norm()) for one in whole])
    after = tree.add(params, combined(SparsityWeighted(), updates, params).delta)
    for name in shapes:
        expected = sum(w * one[name].numpy() for w, one in zip(norms / norms.sum(), whole, strict=True))
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    kept = tree.add(params, combined(SparsityWeighted(padding="keep"), updates, params).delta)
    expected = params["m.lora_A"][3] + norms[2] / norms.sum() * updates[2].delta["m.lora_A"][3]
    torch.testing.assert_close(kept["m.lora_A"][3], expected.float())


def federation(**settings: float) -> Federation:
    return Federation(het_lora(rounds=8, rank=8, local=LOCAL, server=Sgd(), shrink=RankPruning(keep=0.5, **settings)))


def test_a_strong_penalty_makes_clients_give_up_ranks_and_send_less(tmp_path: Path) -> None:
    whole = federation(weight=3.0)
    start = whole.start()
    end = whole.go_on(start, 8)
    ranks = [row.ranks for row in whole.rows]
    assert ranks[0] == (8, 8, 8)
    assert ranks[1] == (8, 8, 8)  # B was zero, so nothing can have become smaller
    assert min(ranks[-1]) < 8
    assert all(now <= then for then, now in zip(ranks[0], ranks[-1], strict=True))
    assert whole.rows[-1].up_bytes["adapter"] < 0.8 * whole.rows[1].up_bytes["adapter"]
    assert whole.rows[-1].down_bytes["adapter"] < 0.8 * whole.rows[1].down_bytes["adapter"]
    state = start
    rows = []
    for rounds in range(1, 9):
        one = federation(weight=3.0)
        save_state(one.go_on(state, rounds), tmp_path / "state", {})
        state, _ = load_state(tmp_path / "state")
        rows += one.rows
    assert [row.ranks for row in rows] == ranks
    assert all(torch.equal(state.params[name], value) for name, value in end.params.items())


def test_without_a_penalty_clients_that_learn_keep_their_ranks_at_first() -> None:
    free = federation(weight=0.0)
    free.go_on(free.start(), 3)
    assert free.rows[-1].ranks == (8, 8, 8)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"tuning": Full()}, "ranks that are trained"),
        ({"tuning": LoRA(train="B")}, "train 'both'"),
        ({"down": Link(sparsify=TopK(density=0.5))}, "the ranks that are sent down"),
        ({"memory": "last_round"}, "the ranks that are sent down"),
        ({"local": Local(keep_optimizer=True)}, "would bring them back"),
        ({"privacy": CentralGaussian(clip_norm=1.0, noise_multiplier=1.0)}, "without noise"),
    ],
)
def test_what_hides_ranks_is_refused(slots: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(shrink=RankPruning(), **slots)  # type: ignore[arg-type]


def test_ranks_that_a_client_gives_up_are_zero_at_once() -> None:
    shrinking = federation(weight=3.0)
    state = shrinking.start()
    for rounds in range(1, 9):
        before, state = state, shrinking.go_on(state, rounds, cohort=(1,))
        had, has = (known.get(1, Memory()).value("rank", "rank") or 8 for known in (before.known, state.known))
        if has < had:
            b = next(name for name in state.params if name.endswith("lora_B"))
            assert bool(before.params[b][:, has:had].any())
            assert float(state.params[b][:, has:].abs().max()) < 1e-6
            return
    raise AssertionError("no rank was given up")


@pytest.mark.parametrize("told", [-3.0, 0.0, 1e9, 7.5, float(2**40)])
def test_a_rank_that_a_client_cannot_have_is_refused(told: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankPruning, "after", lambda self, before, now, schema, rank: told)
    monkeypatch.setattr(RankPruning, "keep_ranks", lambda self, values, schema, rank: values)
    lying = federation(weight=0.0)
    with pytest.raises(WireError, match="rank pruning does not allow"):
        lying.go_on(lying.start(), 1)


def test_the_ledger_has_the_ranks_of_tiers() -> None:
    tiers = {0: Tier(name="phone", share=0.5, rank=2), 1: Tier(name="desk", share=0.5)}
    unequal = federation(weight=0.0)
    recipe = unequal.phases[0].recipe
    _, row = run_round(recipe, unequal.start(), (0, 1), unequal.engine, seed=0, rounds=6, tiers=tiers)
    assert row.ranks == (2, 8)

"""Every sparsifier, number format and memory, both ways, through the same properties."""

from __future__ import annotations

import gc
import os
import tomllib
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures.toy import LOCAL, Federation, num_nonzero

from fedlora import config
from fedlora.config import Experiment
from fedlora.core import tree
from fedlora.core.errors import ConfigError, WireError
from fedlora.core.state import Update
from fedlora.methods import Phases, fedavg, flasc
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Recipe
from fedlora.rounds.checkpoint import load_state, save_state
from fedlora.rounds.downlink import Downlink
from fedlora.rounds.ledger import RoundRecord
from fedlora.server.aggregate.base import WeightedMean
from fedlora.server.optimizers import Sgd
from fedlora.transport import (
    PRECISIONS,
    SPARSIFIERS,
    BFloat16,
    Dense,
    Float32,
    Link,
    Quota,
    RandomK,
    RankSlice,
    Stage,
    Threshold,
    TopK,
    Uniform,
)
from fedlora.tuning import LoRA

THIN = {
    "dense": Dense(),
    "top_k": TopK(density=0.25, quota=Quota(head=1)),
    "random_k": RandomK(density=0.5, rescale=False),
    "threshold": Threshold(value=1e-3),
    "rank_slice": RankSlice(rank=2),
}
PRECISE = {kind: cls() for kind, cls in PRECISIONS.items()}
FEW_BITS = Uniform(bits=4, block=64, rounding="stochastic")


def link(kind: str, precision: str) -> Link:
    return Link(sparsify=THIN[kind], precision=PRECISE[precision])


def over(**slots: object) -> Phases:
    return fedavg(rounds=6, tuning=LoRA(rank=4), local=LOCAL, **slots)  # type: ignore[arg-type]


LINKS: dict[str, Phases] = {
    **{f"{kind} {number}": over(down=link(kind, number), up=link(kind, number)) for kind in THIN for number in PRECISE},
    "from the start": over(down=Link(sparsify=TopK(density=0.25), reference="init"), memory="init"),
    "from the start, dense": over(down=Link(reference="init"), memory="init"),
    "last round": over(down=Link(sparsify=TopK(density=0.25), precision=FEW_BITS), memory="last_round"),
    "last round, dense": over(memory="last_round"),
    "feedback up": over(up=Link(sparsify=TopK(density=0.1), precision=FEW_BITS, feedback=True), memory="init"),
    "feedback down": over(down=Link(precision=Uniform(bits=2), reference="init", feedback=True)),
    "feedback everywhere": flasc(
        rounds=6, rank=4, local=LOCAL, server=Sgd(), precision=FEW_BITS, feedback=True, memory="last_round"
    ),
    "head apart": over(down=Link(precision=FEW_BITS, head_precision=BFloat16())),
    "stages": over(
        up=Link(stages=(Stage(round=2, sparsify=TopK(density=0.5)), Stage(round=4, precision=Uniform(bits=8))))
    ),
}


# each sparsifier with every other number format, and the rest with the slow tests
MORE = {f"{kind} {number}" for i, kind in enumerate(THIN) for j, number in enumerate(PRECISE) if (i + j) % 2}
TRAINED = [pytest.param(name, marks=[pytest.mark.slow] if name in MORE else []) for name in LINKS]


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def untimed(row: RoundRecord) -> RoundRecord:
    return replace(row, seconds={}, slowest_seconds=0.0, tier_seconds={})


def test_every_value_of_the_tables_is_here() -> None:
    assert (list(THIN), list(PRECISE)) == (list(SPARSIFIERS), list(PRECISIONS))


@pytest.mark.parametrize("name", LINKS)
def test_its_configuration_survives_toml(name: str) -> None:
    experiment = Experiment(phases=LINKS[name])
    assert config.parse(tomllib.loads(config.to_toml(experiment))) == experiment


@pytest.mark.parametrize("name", TRAINED)
def test_its_loss_falls_and_saved_and_loaded_in_every_round_it_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    cohorts = [(2, 0, 1), (1,), (0, 1), (2,), (0, 2), (2, 1, 0)]
    whole = Federation(LINKS[name], 24)
    expected = state = whole.start()
    before = whole.loss(state)
    for rounds, cohort in enumerate(cohorts, 1):
        expected = whole.go_on(expected, rounds, cohort)
    assert whole.loss(expected) < 0.95 * before
    rows: list[RoundRecord] = []
    for rounds, cohort in enumerate(cohorts, 1):
        federation = Federation(LINKS[name], 24)
        save_state(federation.go_on(state, rounds, cohort), tmp_path / "state", {})
        state, _ = load_state(tmp_path / "state")
        rows += federation.rows
    assert all(torch.equal(state.params[name], value) for name, value in expected.params.items())
    assert [untimed(row) for row in rows] == [untimed(row) for row in whole.rows]


def test_the_server_knows_what_each_client_holds() -> None:
    federation = Federation(LINKS["last round"])
    state = federation.start()
    for rounds, cohort in enumerate([(0, 1), (1, 2), (0,)], 1):
        state = federation.go_on(state, rounds, cohort)
    assert set(state.known) == set(state.clients) == {0, 1, 2}
    held = {client: memory.tree("down", "held") for client, memory in state.known.items()}
    for client, its in held.items():
        own = state.clients[client].parts.tree("down", "held")
        assert all(torch.equal(its[name], value) for name, value in own.items())
    assert any(not torch.equal(held[0][name], held[2][name]) for name in state.params)
    assert [row.references for row in federation.rows] == [{"zero": 2}, {"last_round": 1, "zero": 1}, {"last_round": 1}]


def test_the_copy_of_a_client_follows_the_server_though_little_is_sent() -> None:
    (phase,) = over(down=Link(sparsify=TopK(density=0.05), precision=Uniform(bits=4)), memory="last_round")
    federation = Federation((phase,))
    state = federation.go_on(federation.start(), 3)
    held, errors = state.known[0].tree("down", "held"), []
    for number in range(30):
        held = Downlink(phase.recipe, replace(state, round=state.round + number), 0).message(held).start
        errors.append(tree.norm(tree.subtract(state.params, held)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_a_lossless_downlink_sends_the_shortest_message() -> None:
    federation = Federation(over(down=Link(reference="init"), memory="init"))
    federation.go_on(federation.start(), 2)
    first, second = federation.rows
    assert first.references == {"init": 3}  # nothing has moved: a difference of zeros
    assert first.down_bytes["adapter"] < 20
    assert second.references in ({"zero": 3}, {"init": 3})


def test_what_feedback_up_lost_is_kept_to_the_last_bit() -> None:
    thin, whole = (
        Federation(over(up=Link(sparsify=TopK(density=0.1), feedback=True), memory="init")),
        Federation(over(memory="init")),
    )
    one, other = (each.go_on(each.start(), 1, (1,)) for each in (thin, whole))
    sent = tree.subtract(one.params, one.init)
    delta = tree.subtract(other.params, other.init)
    lost = one.clients[1].parts.tree("residual", "lost")
    assert 0 < num_nonzero(sent) < tree.num_entries(sent) / 8
    for name, value in delta.items():
        torch.testing.assert_close(sent[name] + lost[name], value, rtol=1e-6, atol=1e-8)


def test_feedback_brings_in_later_what_top_k_left_out() -> None:
    def distance(feedback: bool) -> float:
        dense = Federation(over())
        thin = Federation(over(up=Link(sparsify=TopK(density=1 / 16), feedback=feedback), memory="init"))
        target, found = (each.loss(each.go_on(each.start(), 6)) for each in (dense, thin))
        return found - target

    assert distance(True) < 0.8 * distance(False)


def test_feedback_down_is_what_the_last_message_lost() -> None:
    federation = Federation(LINKS["feedback down"])
    state = federation.go_on(federation.start(), 2)
    lost = state.parts.tree("down", "lost")
    assert tree.norm(lost) > 0
    assert list(lost) == list(state.params)


def test_stages_change_what_is_sent() -> None:
    federation = Federation(LINKS["stages"])
    federation.go_on(federation.start(), 6)
    sent = [row.up_bytes["adapter"] for row in federation.rows]
    assert sent[1] > 1.5 * sent[2] > 3 * sent[4]
    assert [round(row.density_up, 1) for row in federation.rows[1:4]] == [1.0, 0.5, 0.5]


def test_random_places_cost_their_seed_only() -> None:
    federation = Federation(over(up=Link(sparsify=RandomK(density=1 / 8), precision=BFloat16())))
    state = federation.go_on(federation.start(), 2)
    entries = sum(value.numel() for name, value in state.params.items() if state.schema[name].group == "adapter")
    assert federation.rows[1].up_bytes["adapter"] <= 3 * (2 * entries / 8 + 60)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"up": Link(feedback=True)}, "clients need a memory"),
        ({"down": Link(feedback=True), "memory": "last_round"}, r"set down\.feedback to false"),
        ({"down": Link(sparsify=RandomK(density=0.5))}, r"rescale = false in down\.sparsify"),
        (
            {"up": Link(sparsify=RandomK(density=0.5), feedback=True), "memory": "init"},
            r"rescale = false in up\.sparsify",
        ),
        (
            {"up": Link(stages=(Stage(round=1, sparsify=RandomK(density=0.5)),), feedback=True), "memory": "init"},
            "rescale = false",
        ),
        (
            {
                "up": Link(feedback=True),
                "memory": "init",
                "privacy": CentralGaussian(clip_norm=1.0, noise_multiplier=1.0),
            },
            "the part that clipping removed",
        ),
    ],
)
def test_links_that_would_lie_are_refused(slots: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**slots)  # type: ignore[arg-type]


def test_a_stage_after_the_last_round_is_refused() -> None:
    with pytest.raises(ConfigError, match="a stage begins in round 6, but the phase has rounds 0 to 5 only"):
        over(up=Link(stages=(Stage(round=6, precision=Uniform()),)))


def test_uploads_of_a_cohort_are_never_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    most = 0

    add = WeightedMean.add

    def watched(self: WeightedMean, update: Update) -> None:
        nonlocal most
        alive.append(weakref.ref(next(iter(update.delta.values()))))
        add(self, update)
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))

    monkeypatch.setattr(WeightedMean, "add", watched)
    federation = Federation(over())
    federation.go_on(federation.start(), 1)
    assert len(alive) == 3
    assert most <= 1


def test_a_client_without_memory_is_told_so() -> None:
    federation = Federation(LINKS["last round"])
    state = federation.go_on(federation.start(), 2)
    with pytest.raises(WireError, match="this client has no state of that round"):
        federation.go_on(replace(state, clients={}), 3)


def test_the_heads_start_travels_like_the_head() -> None:
    told = {}
    for name, precision in (("whole", Float32()), ("coarse", Uniform(bits=4))):
        link = Link(precision=precision, reference="init")
        federation = Federation(over(down=link, memory="init"))
        state = federation.start()
        told[name] = state.setup_bytes["init"]
        head = [key for key, group in state.schema.groups.items() if group == "head"]
        same = all(torch.equal(state.init[key], state.params[key]) for key in head)
        assert same == (name == "whole")
        after = federation.go_on(state, 1)
        known = federation.workspace.init
        assert all(torch.equal(known[key], after.init[key]) for key in head)  # both ends have the same start
    assert told["coarse"] < 0.4 * told["whole"]

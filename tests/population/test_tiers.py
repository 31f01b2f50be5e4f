"""Clients of unequal strength: who they are, what they get, and what the ledger says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import experiment, tiny_world
from fixtures.toy import LOCAL, Federation

import fedlora
from fedlora.client.turn import run_job
from fedlora.client.workspace import Workspace
from fedlora.config.federated_data import prepare
from fedlora.core import tree
from fedlora.core.errors import ConfigError, DataError, QuorumError, TrainingError
from fedlora.methods import fedavg, ffa, flora
from fedlora.population.clients import Clients
from fedlora.population.tiers import Tier, assign_tiers, check_tiers
from fedlora.privacy import CentralGaussian
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Recipe
from fedlora.rounds.downlink import Downlink, view
from fedlora.rounds.round import run_round
from fedlora.runs.cost import costs
from fedlora.server.aggregate import Krum, SvdRedistribute
from fedlora.testing import schema_of, toy_task
from fedlora.transport import Link, Quota, RankSlice, TopK, Uniform
from fedlora.tuning import LoRA, SvdOfWeight
from fedlora.tuning.dora import MAGNITUDE

world = pytest.fixture(scope="module")(tiny_world)
NAMES = [f"c{i}" for i in range(7)]
ROWS = [np.array([2 * i, 2 * i + 1]) for i in range(7)]


def shares(*values: float) -> tuple[Tier, ...]:
    return tuple(Tier(name=f"t{i}", share=value) for i, value in enumerate(values))


def assigned(tiers: tuple[Tier, ...], column: Any = None) -> list[str]:
    return [tier.name for tier in assign_tiers(tiers, NAMES, ROWS, column).values()]


def test_equal_shares_are_dealt_in_turn_as_flascs_code_does() -> None:
    assert assigned(shares(1 / 3, 1 / 3, 1 / 3)) == ["t0", "t1", "t2", "t0", "t1", "t2", "t0"]


def test_unequal_shares_are_held_at_every_number_of_clients() -> None:
    found = assigned(shares(0.5, 0.25, 0.25))
    assert found == ["t0", "t1", "t2", "t0", "t0", "t1", "t2"]
    many = assign_tiers(shares(0.7, 0.2, 0.1), [str(i) for i in range(1000)], [], None)
    assert [sum(tier.name == f"t{k}" for tier in many.values()) for k in range(3)] == [700, 200, 100]


def test_tiers_by_the_value_that_most_of_a_clients_rows_have() -> None:
    column = np.array(["phone", "phone", "desk", "desk"] + ["phone", "phone"] * 5)
    tiers = (Tier(name="small", values=("phone",)), Tier(name="large", values=("desk",)))
    assert assigned(tiers, column) == ["small", "large"] + ["small"] * 5
    with pytest.raises(DataError, match="1 clients belong to no tier, such as 'c1'"):
        assigned(tiers[:1], column)


def test_tiers_by_name() -> None:
    tiers = (Tier(name="a", clients=("c0", "c6")), Tier(name="b", clients=tuple(NAMES[1:6])))
    assert assigned(tiers) == ["a", *["b"] * 5, "a"]
    with pytest.raises(DataError, match="names the client 'x'"):
        assigned((Tier(name="a", clients=("x",)),))


@pytest.mark.parametrize(
    ("tiers", "column", "message"),
    [
        (shares(0.5, 0.4), None, "add up to 0.9"),
        ((Tier(name="a", share=1.0), Tier(name="b", clients=("c",))), None, "all of them the same one"),
        ((Tier(name="a"),), None, "needs one of share"),
        ((Tier(name="a", share=1.0, clients=("c",)),), None, "needs one of share"),
        ((Tier(name="a", share=0.5), Tier(name="a", share=0.5)), None, "the same name"),
        ((Tier(name="a", values=("x",)),), None, "set clients.tier_column"),
        (shares(1.0), "size", "and only then"),
        ((), "size", "no effect without clients.tiers"),
        ((Tier(name="a", clients=("c", "d")), Tier(name="b", clients=("d",))), None, "'d' is named twice"),
        ((Tier(name="a", values=("c",)), Tier(name="b", values=("c",))), "size", "'c' is named twice"),
    ],
)
def test_tiers_of_unclear_membership_are_refused(tiers: tuple[Tier, ...], column: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tiers(tiers, column)
    with pytest.raises(ConfigError, match=message):
        Clients(tiers=tiers, tier_column=column)


def test_a_tier_that_would_be_misread_is_refused() -> None:
    with pytest.raises(ConfigError, match="no effect without a rank"):
        Tier(name="a", share=1.0, rank_by="norm")
    with pytest.raises(ConfigError, match="'dense' would be mistaken for other metrics"):
        Tier(name="dense", share=1.0)


THIN = Link(sparsify=TopK(density=0.25), reference="init")


@pytest.mark.parametrize(
    ("tier", "recipe", "message"),
    [
        (Tier(name="a", rank=2, down=THIN), Recipe(down=Link(reference="init")), "in place of the rank"),
        (Tier(name="a", rank=2), Recipe(tuning=LoRA(init=SvdOfWeight())), "'a' has a rank, .* leave out the tier's"),
        (Tier(name="a", rank=2), ffa()[0].recipe, "'a' has a rank, .* leave out the tier's"),
        (Tier(name="a", rank=2), flora()[0].recipe, "flora with reference = 'zero'"),
        (Tier(name="a", compute="fp32"), fedavg(local=LOCAL)[0].recipe, None),
        (Tier(name="a"), Recipe(down=Link(reference="init", feedback=True)), "one error for all clients"),
        (Tier(name="a", down=THIN), Recipe(), "announced to all clients or to none"),
        (Tier(name="a", rank=32), Recipe(), "above the recipe's 16"),
    ],
)
def test_tiers_that_would_lie_are_refused(tier: Tier, recipe: Recipe, message: str | None) -> None:
    if message is None:
        assert tier.applied(recipe).local.compute == "fp32"
        return
    with pytest.raises(ConfigError, match=message):
        tier.applied(recipe)


def test_a_rank_without_lora_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="no phase trains LoRA"):
        experiment(world, "full", "clients.tiers=[{name='a',share=1.0,rank=2}]")


TIERS = (
    "clients.tiers=[{name='small',share=0.5,rank=1,max_steps=1},"
    "{name='large',share=0.5,up={precision={kind='uniform',bits=8}}}]"
)


def test_the_ledger_tells_each_tiers_bytes_and_they_add_up(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, "lora", TIERS, "method.local.batch_size=2", rounds=3), tmp_path / "run")
    for row in result.rows[1:]:
        for key in ("down_bytes", "up_bytes"):
            whole = sum(sum(tier[key].values()) for tier in row.tiers.values())
            assert whole == sum(getattr(row, key).values())
        assert sum(tier["clients"]["num"] for tier in row.tiers.values()) == len(row.cohort)
    assert {"accuracy", "small_accuracy", "large_accuracy"} <= set(result.after)


def test_the_bytes_of_tiers_are_told_before(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", TIERS, "method.local.batch_size=2", "clients.per_round=6", rounds=8)
    result = fedlora.run(chosen, tmp_path / "run")
    (phase,) = costs(chosen, prepare(chosen))
    sent = (sum(result.down_bytes.values()), sum(result.up_bytes.values()))
    assert phase.all_bytes == pytest.approx(sent, rel=0.1)  # six clients a round are not quite half and half


@pytest.mark.parametrize(
    ("tuning", "share"),
    [(LoRA(rank=4), 0.3), (LoRA(rank=4, rank_pattern={"value": 1}), 0.5), (LoRA(rank=4, dora=True, rslora=True), 0.5)],
    ids=["lora", "unequal ranks", "dora"],
)
def test_a_client_of_a_lower_rank_gets_it_trains_it_and_sends_it(tuning: LoRA, share: float) -> None:
    (phase,) = fedavg(rounds=3, tuning=tuning, local=LOCAL)
    federation = Federation((phase,))
    state = federation.go_on(federation.start(), 1)
    tier = Tier(name="small", rank=1, share=1.0)
    own = tier.applied(phase.recipe)
    start = Downlink(own, state, 0).message({}).start
    after, row = run_round(phase.recipe, state, (0,), federation.engine, 0, 3, {0: tier})
    for name, value in after.params.items():
        moved = value - state.params[name]
        if name.endswith("lora_A"):
            assert not start[name][1:].any()
            assert not moved[1:].any()
            assert moved[:1].any()
        elif name.endswith("lora_B"):
            assert not start[name][:, 1:].any()
            assert not moved[:, 1:].any()
            assert moved[:, :1].any()
        elif name.endswith(MAGNITUDE):
            assert start[name].all()
            assert moved.any()
    whole = federation.rows[0].up_bytes["adapter"] / 3
    assert row.up_bytes["adapter"] < share * whole  # the rest is not even told to be zero
    assert row.tiers["small"]["clients"] == {"num": 1}


def test_under_noise_for_examples_a_lower_rank_stays_one() -> None:
    noise = ExampleNoise(clip_norm=1.0, noise_multiplier=1.0, seed=0)
    (phase,) = fedavg(rounds=3, tuning=LoRA(rank=4), local=replace(LOCAL, example_privacy=noise))
    federation = Federation((phase,))
    state = federation.go_on(federation.start(), 1)
    tier = Tier(name="small", rank=1, share=1.0)
    after, _ = run_round(phase.recipe, state, (0,), federation.engine, 0, 3, {0: tier})
    for name, value in after.params.items():
        moved = value - state.params[name]
        if name.endswith("lora_A"):
            assert bool(moved[:1].any())
            assert not moved[1:].any()
        elif name.endswith("lora_B"):
            assert bool(moved[:, :1].any())
            assert not moved[:, 1:].any()


def test_stacked_clients_may_have_unequal_ranks(world: Path, tmp_path: Path) -> None:
    ranks = "clients.tiers=[{name='small',share=0.5,rank=1},{name='large',share=0.5}]"
    chosen = experiment(world, "flora", ranks, "method.reference='zero'", "clients.per_round=6", rounds=2)
    tiers = fedlora.run(chosen, tmp_path / "run").rows[-1].tiers
    small, large = (tiers[name]["up_bytes"]["adapter"] / tiers[name]["clients"]["num"] for name in ("small", "large"))
    assert small < 0.5 * large


def test_flascs_densities_per_tier() -> None:
    (phase,) = fedavg(rounds=3, tuning=LoRA(rank=4), local=LOCAL)
    federation = Federation((phase,))
    state = federation.go_on(federation.start(), 1)
    tiers = {
        i: Tier(
            name=f"t{i}",
            share=1 / 3,
            down=Link(sparsify=TopK(density=4.0 ** (i - 2), quota=Quota(head=1))),
            up=Link(sparsify=TopK(density=4.0 ** (i - 2)), precision=Uniform(bits=8)),
        )
        for i in range(3)
    }
    state, row = run_round(phase.recipe, state, (0, 1, 2), federation.engine, 0, 3, tiers)
    down = [sum(row.tiers[f"t{i}"]["down_bytes"].values()) for i in range(3)]
    up = [sum(row.tiers[f"t{i}"]["up_bytes"].values()) for i in range(3)]
    assert down == sorted(down)
    assert up == sorted(up)
    assert all(torch.isfinite(value).all() for value in state.params.values())


def test_centralised_training_has_no_tiers(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", TIERS, 'mode="centralised"', rounds=1)
    assert fedlora.run(chosen, tmp_path / "run").rows[-1].tiers == {}


def test_the_update_of_a_tier_that_rounds_is_clipped_again() -> None:
    privacy = CentralGaussian(clip_norm=0.1, noise_multiplier=0.0, seed=0)
    (phase,) = fedavg(rounds=3, tuning=LoRA(rank=4), local=LOCAL, privacy=privacy)
    federation = Federation((phase,))
    coarse = Tier(name="a", share=1.0, up=Link(precision=Uniform(bits=1, rounding="stochastic")))
    _, row = run_round(phase.recipe, federation.start(), (0,), federation.engine, 0, 3, {0: coarse})
    assert row.update_norm <= 0.1 * (1 + 1e-5)


def test_a_tier_of_a_lower_rank_that_remembers_is_shown_at_its_rank() -> None:
    (phase,) = fedavg(rounds=3, tuning=LoRA(rank=4), local=LOCAL, memory="last_round")
    federation = Federation((phase,))
    state = federation.go_on(federation.start(), 1)
    shown = view(Tier(name="small", share=1.0, rank=1).applied(phase.recipe), state, 0)
    for name, value in shown.items():
        if name.endswith("lora_A"):
            assert value[:1].any()
            assert not value[1:].any()


def test_ranks_by_norm_are_those_of_flascs_code() -> None:
    draws = torch.Generator().manual_seed(0)
    tree = {"m.lora_A": torch.randn(6, 9, generator=draws), "m.lora_B": torch.randn(7, 6, generator=draws)}
    kept = RankSlice(rank=2, by="norm")(tree, schema_of(dict.fromkeys(tree, "adapter")), 0)
    # each factor for itself, by the Euclidean norm of a rank
    for name, axis in (("m.lora_A", 1), ("m.lora_B", 0)):
        norms = np.linalg.norm(tree[name].numpy(), axis=axis)
        best = set(np.argsort(-norms)[:2].tolist())
        there = {int(rank) for rank in torch.nonzero(kept[name].abs().sum(axis)).flatten()}
        assert there == best
        assert torch.equal(kept[name][kept[name] != 0], tree[name][kept[name] != 0])


def test_a_tier_of_ranks_by_norm_gets_the_longest_and_trains() -> None:
    recipe = fedavg(tuning=LoRA(rank=4), local=LOCAL)[0].recipe
    own = Tier(name="phone", rank=2, rank_by="norm").applied(recipe)
    assert own.down.sparsify == RankSlice(rank=2, by="norm")
    with pytest.raises(ConfigError, match="would be lost"):
        Tier(name="phone", rank=2, rank_by="norm").applied(Recipe(aggregator=SvdRedistribute()))


def test_ranks_by_norm_of_a_difference_are_refused() -> None:
    recipe = fedavg(tuning=LoRA(rank=4), local=LOCAL, memory="last_round")[0].recipe
    with pytest.raises(ConfigError, match="would accumulate all of them"):
        Tier(name="phone", rank=2, rank_by="norm").applied(recipe)
    assert Tier(name="phone", rank=2).applied(recipe).rank == 2


@pytest.mark.parametrize("name", ["dense", "newcomer", "client_mean"])
def test_a_tier_is_not_called_as_another_model(world: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="would be mistaken for other metrics"):
        experiment(world, "lora", f"clients.tiers=[{{name={name!r}, share=1.0}}]")


def test_a_tier_is_evaluated_in_its_own_precision(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    evaluate = Workspace.evaluate

    def watched(self: Workspace, rows: Any, split: Any, compute: str) -> Any:
        seen.append(compute)
        return evaluate(self, rows, split, compute)

    monkeypatch.setattr(Workspace, "evaluate", watched)
    tiers = "clients.tiers=[{name='new', share=0.5, compute='bf16'}, {name='old', share=0.5}]"
    fedlora.run(experiment(world, "lora", tiers, "evaluate.every=1", rounds=1), world / "precisions")
    assert seen[:3] == ["fp32", "bf16", "fp32"]


# ---- clients that run out of time


def slow(federation: Federation, client: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each turn of one client a minute passes with every look at the clock."""
    clock = {"now": 0.0, "step": 0.0}

    def run(jobs: Any) -> Any:
        for job in jobs:
            clock["step"] = 60.0 if job.client == client else 0.0
            yield run_job(job, federation.workspace, federation.engine.population.rows_of(job.client))

    def counter() -> float:
        clock["now"] += clock["step"]
        return clock["now"]

    monkeypatch.setattr("time.perf_counter", counter)
    monkeypatch.setattr(federation.engine, "run", run)


def late_federation(**settings: Any) -> Federation:
    local = replace(LOCAL, timeout_seconds=90.0)
    return Federation(fedavg(rounds=3, tuning=LoRA(rank=4), local=local, **settings))


def test_a_client_that_runs_out_of_time_is_named_and_the_round_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = late_federation()
    start = federation.start()
    slow(federation, 0, monkeypatch)
    state = federation.go_on(start, 2)
    others = late_federation()
    slow(others, -1, monkeypatch)
    expected = others.go_on(others.start(), 2, cohort=(2, 1))
    assert [row.late for row in federation.rows] == [(0,), (0,)]
    assert [row.cohort for row in federation.rows] == [(2, 0, 1)] * 2
    assert all(torch.equal(state.params[name], value) for name, value in expected.params.items())
    # it was sent to all and came back from two
    assert federation.rows[0].up_bytes == others.rows[0].up_bytes
    assert sum(federation.rows[0].down_bytes.values()) == 1.5 * sum(others.rows[0].down_bytes.values())


def test_a_round_with_too_few_clients_in_time_for_its_aggregator_is_one_to_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    federation = late_federation(aggregator=Krum(faulty=0))
    slow(federation, 0, monkeypatch)
    with pytest.raises(QuorumError, match=r"2 of 3 clients answered, but 3 are required \(client 0: out of time\)"):
        federation.go_on(federation.start(), 1)


def test_a_late_client_keeps_what_it_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    up = Link(sparsify=TopK(density=0.1), feedback=True)
    federation = late_federation(up=up, memory="last_round")
    slow(federation, -1, monkeypatch)
    before = federation.go_on(federation.start(), 1)
    slow(federation, 0, monkeypatch)
    after = federation.go_on(before, 2)
    kept, new = (one.clients[0].parts.tree("residual", "lost") for one in (before, after))
    assert all(torch.equal(new[name], value) for name, value in kept.items())
    held = after.clients[0].parts.tree("down", "held")
    assert all(torch.equal(held[name], value) for name, value in after.known[0].tree("down", "held").items())
    kept, new = (one.clients[1].parts.tree("residual", "lost") for one in (before, after))
    assert any(not torch.equal(kept[name], value) for name, value in new.items())


def test_where_all_are_late_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = late_federation()
    start = federation.start()
    slow(federation, 0, monkeypatch)
    with pytest.raises(TrainingError, match=r"local\.timeout_seconds"):
        federation.go_on(start, 1, cohort=(0,))


def test_where_all_are_late_once_the_round_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = late_federation()
    slow(federation, 0, monkeypatch)
    before = federation.go_on(federation.start(), 1)
    after = federation.go_on(before, 2, cohort=(0,))
    assert all(torch.equal(after.params[name], value) for name, value in before.params.items())
    assert federation.rows[-1].late == (0,)
    assert "none of the 1 clients was done in time" in federation.rows[-1].warnings[-1]
    with pytest.raises(TrainingError, match=r"local\.timeout_seconds"):
        federation.go_on(after, 3, cohort=(0,))


def test_a_tier_has_a_limit_of_its_own() -> None:
    recipe = fedavg(local=LOCAL)[0].recipe
    assert Tier(name="phone", timeout_seconds=5.0).applied(recipe).local.timeout_seconds == 5.0
    assert Tier(name="desk").applied(recipe).local.timeout_seconds is None


def test_noise_stays_that_of_the_whole_cohort_when_some_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = CentralGaussian(clip_norm=1e-3, noise_multiplier=0.0)
    federation = late_federation(privacy=silent)
    start = federation.start()
    slow(federation, 0, monkeypatch)
    moved = tree.subtract(federation.go_on(start, 1).params, start.params)
    others = late_federation(privacy=silent)
    slow(others, -1, monkeypatch)
    expected = tree.subtract(others.go_on(others.start(), 1, cohort=(2, 1)).params, start.params)
    assert tree.norm(moved) == pytest.approx(2 / 3 * tree.norm(expected), rel=1e-3)


def test_a_tiers_job_gives_the_same_bytes_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(fedavg(rounds=1, tuning=LoRA(rank=4), local=LOCAL))
    heard: list[tuple[Any, bytes]] = []
    run = federation.engine.run

    def listening(jobs: Any) -> Any:
        for job, reply in zip(jobs, run(jobs), strict=True):
            heard.append((job, reply.raw))
            yield reply

    monkeypatch.setattr(federation.engine, "run", listening)
    tiers = {0: Tier(name="fast", share=0.5, compute="bf16"), 1: Tier(name="plain", share=0.5)}
    recipe = federation.phases[0].recipe
    run_round(recipe, federation.start(), (0, 1), federation.engine, seed=0, rounds=1, tiers=tiers)
    for job, raw in heard:
        fresh = Workspace(toy_task(num_examples=48), 0, torch.device("cpu"))
        reply = run_job(job, fresh, federation.engine.population.rows_of(job.client))
        assert reply.raw == raw

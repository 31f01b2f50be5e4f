"""Updates that are finite and absurd: refused, named, and undone where they got through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.fake_transport import Post, Told, shared_sites
from fixtures.tiny import experiment, ledger, tiny_world

import fedlora
from fedlora import config
from fedlora.client import turn
from fedlora.client.training import LocalResult, Ready
from fedlora.core.errors import DivergedError, QuorumError, TrainingError
from fedlora.core.state import PhaseHandover, ServerState, Update
from fedlora.core.store import Store
from fedlora.engines import Serial
from fedlora.federation.deploy.federate import federate
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.server import remote
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Phase, Recipe
from fedlora.rounds.outliers import FACTOR, Outliers
from fedlora.rounds.phases import close_phase
from fedlora.runs import session
from fedlora.runs.evaluation import evaluate
from fedlora.runs.experiment import run
from fedlora.runs.folder import RunFolder
from fedlora.runs.result import Result
from fedlora.server.aggregate import Krum, Mean
from fedlora.testing.training import LOCAL, toy_run
from fedlora.tuning import Full, LoRA, Tuning

world = pytest.fixture(scope="module")(tiny_world)
ANY = ServerPolicy()
THREE = ("clients.num=3", "clients.per_round=3")


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL", 0.001)


def poison(monkeypatch: pytest.MonkeyPatch, value: float, client: int = 1, rounds: Sequence[int] = range(9)) -> None:
    """From now on a client says that it learnt ``value`` for every entry."""

    def train(workspace: object, turns: Sequence[Ready]) -> list[LocalResult]:
        results = honest(workspace, turns)  # type: ignore[arg-type]
        for place, ready in enumerate(turns):
            if ready.job.client == client and ready.job.progress[0] in rounds:
                delta = {name: torch.full_like(one, value) for name, one in (results[place].delta or {}).items()}
                results[place] = results[place]._replace(delta=delta)
        return results

    honest = turn.train
    monkeypatch.setattr(turn, "train", train)


def on_sites(world: Path, folder: Path, *overrides: str, rules: ServerPolicy = ANY, told: Told | None = None) -> Result:
    chosen = experiment(world, "lora", *THREE, *overrides)
    return federate(
        chosen, folder / "run", Post(shared_sites(folder / "s", 3)), rules, callbacks=[told] if told else []
    )


@pytest.mark.parametrize("value", [1e6, 1e19, 3e38])
def test_one_absurd_update_of_three_is_refused_and_named_and_the_run_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poison(monkeypatch, value)
    result = on_sites(world, tmp_path)
    assert [list(row.refused) for row in result.rows[1:]] == [["1"]] * 3
    assert "is usual in this run; more than 100 times that is refused (outlier_factor)" in result.rows[1].refused["1"]
    assert all(row.up_bytes["refused"] > 0 for row in result.rows[1:])
    assert result.rows[-1].update_norm < 100


def test_the_rule_holds_in_one_process_too_and_is_for_the_user_to_set(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 500.0)
    refused = fedlora.run(experiment(world, "lora", *THREE, rounds=1), tmp_path / "refused")
    assert list(refused.rows[1].refused) == ["1"]
    wide = experiment(world, "lora", *THREE, "method.outlier_factor=1e5", rounds=1)
    assert fedlora.run(wide, tmp_path / "taken").rows[1].refused == {}


def test_a_key_at_its_default_changes_no_digest(world: Path) -> None:
    chosen = experiment(world)
    assert "outlier_factor" not in config.to_toml(chosen)
    assert config.digest(chosen) != config.digest(experiment(world, "lora", "method.outlier_factor=7.0"))


@pytest.mark.parametrize("every", [1, 9])
def test_a_state_from_which_nobody_trains_is_undone_and_its_cause_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    # with every = 1 the server's own evaluation finds out; with 9 the round is saved, and clients find out
    poison(monkeypatch, 1e25, rounds=[1])
    told = Told()
    overrides = ("method.outlier_factor=0.0", f"evaluate.every={every}")
    result = on_sites(world, tmp_path, *overrides, rules=ServerPolicy(min_clients=2), told=told)
    assert [row.round for row in result.rows] == [0, 1, 2, 3]
    assert set(result.rows[1].cohort) == {0, 1, 2}
    assert set(result.rows[2].cohort) == {0, 2}
    assert "a round was undone" in result.rows[2].warnings[0]
    assert "was that of client 1" in result.rows[2].warnings[0]
    assert result.rows[2].warnings[0] in told.messages
    assert math.isfinite(result.after["loss"])
    assert [row["round"] for row in ledger(tmp_path / "run")] == [0, 1, 2, 3]


def test_the_first_round_can_be_undone_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1e25, rounds=[0])
    result = on_sites(world, tmp_path, "method.outlier_factor=0.0", "evaluate.every=9")
    assert [set(row.cohort) for row in result.rows[1:]] == [{0, 2}] * 3


def test_what_cannot_be_undone_ends_with_the_way_back(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1e25, rounds=[1])
    overrides = ("method.outlier_factor=0.0", "evaluate.every=9")
    with pytest.raises(DivergedError, match=r"most clients cannot train .* to go back by hand, remove the newest"):
        on_sites(world, tmp_path, *overrides, rules=ServerPolicy(min_clients=3))
    newest = RunFolder(tmp_path / "run").checkpoints
    assert [folder.name for folder in newest] == ["round-000001", "round-000002"]


def test_a_server_keeps_checkpoints_to_go_back_to(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "head_only", *THREE, "evaluate.every=9", rounds=7)
    federate(chosen, tmp_path / "run", Post(shared_sites(tmp_path / "s", 3)), ServerPolicy())
    assert len(RunFolder(tmp_path / "run").checkpoints) == 5


def test_a_round_of_refusals_alone_ends_with_them(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in (0, 1):
        poison(monkeypatch, 3e38, client)
    chosen = experiment(world, "lora", "clients.num=2", "clients.per_round=2", "method.outlier_factor=0.0")
    with pytest.raises(QuorumError, match="would not be finite"):
        fedlora.run(chosen, tmp_path / "run")


# ---- the rule by itself


def judged(outliers: Outliers, sizes: Sequence[float], entries: int = 4) -> dict[int, str]:
    """Why each of the updates of these sizes per entry is refused."""
    updates = [Update({}, {"x": torch.full((entries,), size)}, 1.0) for size in sizes]
    found = [one for place, update in enumerate(updates) for one in outliers.offer(place, update)]
    found += outliers.rest()
    assert [one.place for one in found] == list(range(len(sizes)))
    return {one.place: one.why for one in found if one.why}


def test_an_update_is_compared_with_the_median_of_the_cohort_and_of_earlier_rounds() -> None:
    assert list(judged(Outliers(Recipe()), [1e3, 0.1, 0.1])) == [0]
    assert list(judged(Outliers(Recipe()), [1e3, 0.1])) == [0]
    assert list(judged(Outliers(Recipe()), [1e3])) == []
    earlier = Outliers(Recipe(), Store(values={"recent": [0.2, 0.2, 0.2]}))
    assert list(judged(earlier, [1e3])) == [0]


def test_an_honest_run_is_never_refused() -> None:
    assert judged(Outliers(Recipe()), [1e-9, 1e-9, 1e-9, 0.99]) == {}  # the floor
    assert judged(Outliers(Recipe()), [0.1, 0.2, 0.05, 0.1 * 0.9 * FACTOR]) == {}
    assert judged(Outliers(Recipe()), [0.0, 0.0, 0.0, 2.0, 3.0]) == {}  # who has no examples sends zeros


def test_at_most_two_updates_are_held_back_and_none_in_later_rounds() -> None:
    def admitted(outliers: Outliers, sizes: Sequence[float]) -> list[int]:
        """How many updates are admitted with each of these sizes per entry."""
        updates = [Update({}, {"x": torch.full((4,), size)}, 1.0) for size in sizes]
        return [len(list(outliers.offer(place, update))) for place, update in enumerate(updates)]

    assert admitted(Outliers(Recipe()), [2.0, 2.0, 2.0, 2.0, 2.0]) == [0, 0, 3, 1, 1]
    assert admitted(Outliers(Recipe()), [1.0, 1.0, 1.0]) == [1, 1, 1]  # none of them can be refused for its norm
    assert admitted(Outliers(Recipe()), [0.1, 2.0, 0.1]) == [1, 0, 2]  # in the order of the cohort
    assert admitted(Outliers(Recipe(outlier_factor=0.0)), [2.0, 2.0]) == [1, 1]
    later = Outliers(Recipe(), Store(values={"recent": [1.0, 1.0, 1.0]}))
    assert admitted(later, [2.0, 2.0, 2.0]) == [1, 1, 1]


def test_a_sum_that_would_not_be_finite_is_refused_with_its_weights() -> None:
    off = Recipe(outlier_factor=0.0)
    assert list(judged(Outliers(off), [1e38, 1e38, 1e30])) == [1]
    weighted = Recipe(outlier_factor=0.0, aggregator=Mean(weighting="examples"))
    outliers = Outliers(weighted)
    heavy = Update({}, {"x": torch.full((4,), 1e30)}, 2.0**40)
    assert [one.why != "" for one in [*outliers.offer(0, heavy), *outliers.rest()]] == [True]


def test_under_client_level_noise_the_clip_is_the_rule_and_nothing_is_stored() -> None:
    noised = Recipe(privacy=CentralGaussian(clip_norm=1.0, noise_multiplier=1.0))
    outliers = Outliers(noised)
    assert judged(outliers, [0.1, 0.1, 3e38]) == {}
    assert not outliers.store([0, 1, 2])


def test_krum_counts_a_refused_update_among_its_faulty(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    five = ("clients.num=5", "clients.per_round=5", "method.aggregator={kind='krum', faulty=1}")
    poison(monkeypatch, 1e6)
    result = fedlora.run(experiment(world, "lora", *five), tmp_path / "run")
    assert [list(row.refused) for row in result.rows[1:]] == [["1"]] * 3
    assert Krum(faulty=2).without(1) == Krum(faulty=1)
    assert Krum(faulty=1).without(3) == Krum(faulty=0)
    # where none may be faulty, updates are lacking: the client is named
    three = ("clients.num=3", "clients.per_round=3", "method.aggregator={kind='krum', faulty=0}")
    with pytest.raises(QuorumError, match=r"2 of 3 clients answered, but 3 are required \(client 1: its update"):
        fedlora.run(experiment(world, "lora", *three), tmp_path / "other")


@pytest.mark.parametrize(
    ("first", "second"),
    [(Full(), LoRA(rank=2)), (LoRA(rank=4), LoRA(rank=2)), (LoRA(rank=2), Full())],
    ids=["full, lora", "lora, lora", "lora, full"],
)
def test_the_first_round_of_a_later_phase_is_undone_with_its_hand_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Tuning, second: Tuning
) -> None:
    """What the first phase learnt is handed over again, not what the model of the second phase holds."""

    class Sites(Serial):
        trusted = False

        def present(self) -> frozenset[int]:
            return frozenset(range(6))

    def evaluated(experiment: Any, data: Any, workspace: Any, recipe: Recipe, state: ServerState, *rest: Any) -> Any:
        if state.phase == 1 and len(handed) == 1:
            raise TrainingError("accuracy is not finite")
        return evaluate(experiment, data, workspace, recipe, state, *rest)

    def closed(*given: Any) -> PhaseHandover:
        handed.append(close_phase(*given))
        return handed[-1]

    handed: list[PhaseHandover] = []
    monkeypatch.setattr(session, "evaluate", evaluated)
    monkeypatch.setattr(session, "close_phase", closed)
    phases = tuple(Phase(recipe=Recipe(local=LOCAL, tuning=tuning), rounds=2) for tuning in (first, second))
    chosen, data = toy_run(phases)
    chosen = replace(chosen, evaluate=replace(chosen.evaluate, every=1))
    result = run(chosen, tmp_path / "run", data=data, engine=Sites)
    assert any("accuracy is not finite" in warning for row in result.rows for warning in row.warnings)
    once, again = (one.delta for one in handed)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(bool(value.any()) for value in again.values())

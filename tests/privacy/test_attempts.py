"""Attempts at rounds that were interrupted count in the account where their noise was disclosed and is drawn anew."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora.client.jobs import Job, Reply
from fedlora.core.errors import CheckpointError
from fedlora.engines.serial import Serial
from fedlora.privacy.accountant import SamplingScheme, open_account
from fedlora.runs import session
from fedlora.runs.attempts import FILE, Attempts
from fedlora.runs.experiment import Stopped

pytest.importorskip("dp_accounting", reason="the extra fedlora[privacy] is not installed")
world = pytest.fixture(scope="module")(tiny_world)
EVERY = ("evaluate.every=1", "clients.num=6", "clients.per_round=6")
CLIENTS = "method.privacy={kind='central_gaussian', clip_norm=1.0, noise_multiplier=4.0, delta=0.01, accountant='rdp'}"
EXAMPLES = "method.local.example_privacy={clip_norm=1.0, noise_multiplier=1.0, delta=0.01}"


def seeded(noise: str) -> str:
    return noise.replace("delta", "seed=3, delta")


class Interrupted(Serial):
    """Stops when the last client of a cohort has answered, on the second round."""

    calls = 0

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        yield from super().run(jobs)
        type(self).calls += 1
        if type(self).calls == 2:
            raise KeyboardInterrupt


def stop_at_call(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original, calls = session.evaluate, []

    def evaluate(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(session, "evaluate", evaluate)


def rows_of(chosen: Any, folder: Path, **how: Any) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in fedlora.run(chosen, folder, **how).rows]


def epsilons(chosen: Any, counts: Sequence[int]) -> list[Any]:
    """Of the ledger's rows, where so many attempts were disclosed before each."""
    budget, phases = open_account(chosen.phases, SamplingScheme(6, 6, "fixed"))
    assert budget
    return [None, *(budget.spent(phases, 1, [1] * (count - 1)) for count in counts)]


def test_noise_that_was_evaluated_and_is_drawn_anew_counts_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = experiment(world, "lora", CLIENTS, *EVERY)
    with monkeypatch.context() as patch:
        stop_at_call(patch, 3)  # of the start, of round 1, of round 2
        with pytest.raises(Stopped):
            fedlora.run(chosen, tmp_path / "run")
    rows = rows_of(chosen, tmp_path / "run")
    assert [row["epsilon"] for row in rows] == pytest.approx(epsilons(chosen, [1, 3, 4]))
    assert "round 2 ended before the end" in " ".join(rows[2]["warnings"])
    assert "round 2" not in " ".join(rows[3]["warnings"])
    (tmp_path / "run" / FILE).write_text("{}\n")
    with pytest.raises(CheckpointError, match="by which the privacy account is kept"):
        fedlora.run(chosen, tmp_path / "run")


@pytest.fixture(scope="module")
def by_round(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    """What a run with noise on examples spends if it is not interrupted."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    return [row["example_epsilon"] for row in rows_of(experiment(world, "lora", EXAMPLES, *EVERY), folder)]


def test_updates_that_the_server_has_not_used_count_where_clients_add_the_noise(
    world: Path, tmp_path: Path, by_round: list[Any]
) -> None:
    chosen = experiment(world, "lora", EXAMPLES, *EVERY)
    Interrupted.calls = 0
    with pytest.raises(Stopped):
        fedlora.run(chosen, tmp_path / "run", engine=Interrupted)
    found = [row["example_epsilon"] for row in rows_of(chosen, tmp_path / "run")]
    assert found[:2] == by_round[:2]
    assert found[2] == by_round[3] < found[3]


@pytest.mark.parametrize("noise", [CLIENTS, seeded(EXAMPLES)])
def test_an_attempt_that_disclosed_nothing_new_counts_once(
    world: Path, tmp_path: Path, by_round: list[Any], noise: str
) -> None:
    chosen = experiment(world, "lora", noise, *EVERY)
    Interrupted.calls = 0
    with pytest.raises(Stopped):
        fedlora.run(chosen, tmp_path / "run", engine=Interrupted)
    rows = rows_of(chosen, tmp_path / "run")
    if noise == CLIENTS:
        assert [row["epsilon"] for row in rows] == epsilons(chosen, [1, 2, 3])
    else:
        assert [row["example_epsilon"] for row in rows] == by_round
        assert not (tmp_path / "run" / FILE).exists()


def test_the_same_noise_after_an_evaluation_discloses_nothing_new(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = experiment(world, "lora", seeded(CLIENTS), *EVERY)
    with monkeypatch.context() as patch:
        stop_at_call(patch, 3)
        with pytest.raises(Stopped):
            fedlora.run(chosen, tmp_path / "run")
    assert [row["epsilon"] for row in rows_of(chosen, tmp_path / "run")] == epsilons(chosen, [1, 2, 3])
    assert not (tmp_path / "run" / FILE).exists()


def test_a_budget_is_spent_by_attempts_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = epsilons(experiment(world, "lora", CLIENTS, *EVERY), [3])[-1]
    budget = CLIENTS.replace("delta", f"max_epsilon={three + 1e-6}, delta")
    chosen = experiment(world, "lora", budget, *EVERY, "evaluate.every=2", rounds=4)
    with monkeypatch.context() as patch:
        stop_at_call(patch, 2)
        with pytest.raises(Stopped):
            fedlora.run(chosen, tmp_path / "run")
    again = fedlora.run(chosen, tmp_path / "run")
    assert (again.rounds, again.rows[-1].epsilon) == (2, pytest.approx(three))
    assert "accuracy" in again.after


def test_a_budget_that_interrupted_attempts_have_spent_ends_the_run_with_its_metrics(
    world: Path, tmp_path: Path
) -> None:
    two = epsilons(experiment(world, "lora", CLIENTS, *EVERY), [2])[-1]
    budget = CLIENTS.replace("delta", f"max_epsilon={two + 1e-6}, delta")
    chosen, folder = experiment(world, "lora", budget, *EVERY, "evaluate.every=2", rounds=4), tmp_path / "run"
    fedlora.run(chosen, folder, until=1)
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    Attempts(folder, chosen.phases).noised(2)
    found = fedlora.run(chosen, folder)
    assert found.rounds == 1 == len(rows) - 1
    assert "would exceed privacy.max_epsilon" in found.stopped
    assert "accuracy" in found.after


def test_attempts_are_those_beyond_the_ledgers_and_a_torn_line_is_none(tmp_path: Path, world: Path) -> None:
    phases = experiment(world, "lora", CLIENTS, EXAMPLES).phases
    made = Attempts(tmp_path, phases)
    for round, cohort in ((1, (0, 1)), (2, (1, 2)), (2, (3,)), (3, ())):
        made.asked(round, cohort)
        made.noised(round)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"round": 4, "coh')
    held = Attempts(tmp_path, phases)
    assert (held.cohorts(2), held.rounds(2)) == ([(1, 2), ()], [2, 3])
    assert (held.cohorts(3), held.rounds(3)) == ([(1, 2)], [2])
    assert (held.note(3), len(held.note(1))) == ((), 1)
    held.noised(4)
    assert Attempts(tmp_path, phases).rounds(3) == [2, 4]


def test_a_round_without_clients_costs_nothing_unless_its_cohort_is_secret(world: Path, tmp_path: Path) -> None:
    poisson = (*EVERY[:2], "clients.sampling=poisson", "clients.per_round=1")
    rows = rows_of(experiment(world, "lora", EXAMPLES, *poisson, rounds=4), tmp_path / "known")
    empty = [number for number, row in enumerate(rows) if number > 1 and not row["cohort"]]
    assert empty
    assert all(rows[number]["example_epsilon"] == rows[number - 1]["example_epsilon"] for number in empty)
    hidden = rows_of(experiment(world, "lora", EXAMPLES, CLIENTS, *poisson, rounds=4), tmp_path / "secret")
    assert not any(row["cohort"] for row in hidden)
    spent = [row["example_epsilon"] for row in hidden[1:]]
    assert spent == sorted({*spent})

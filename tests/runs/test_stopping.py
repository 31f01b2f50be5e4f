"""Runs that end before their last round: by a condition of the configuration, or by a callback."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fixtures.tiny import experiment, ledger, tiny_world

import fedlora
from fedlora.config import digest, resolved, to_toml
from fedlora.config.stop import Stop
from fedlora.core.errors import CallbackError, ConfigError
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.runs.stopping import reason_to_stop

world = pytest.fixture(scope="module")(tiny_world)


def rows(*values: float | None, **changed: float) -> list[RoundRecord]:
    """A ledger with an accuracy per round, absent where None, and 100 bytes each way after the first row."""
    return [
        RoundRecord(
            round=number, phase=0, cohort=(0,), examples=1, steps=1, loss=0.0, density_down=1.0, density_up=1.0,
            down_bytes={"adapter": 100} if number else {}, up_bytes={"adapter": 100} if number else {}, update_norm=1.0,
            metrics={} if value is None else {"accuracy": value, "loss": -value}, seconds={"clients": 2.0}, **changed,
        )
        for number, value in enumerate(values)
    ]  # fmt: skip


def test_without_improvement_a_run_ends_after_as_many_evaluations_as_its_patience() -> None:
    def ends(stop: Stop, *values: float | None, higher: bool = True) -> bool:
        return bool(reason_to_stop(stop, rows(*values), "accuracy", higher))

    two = Stop(patience=2)
    assert not ends(two, 0.5, 0.4)
    assert ends(two, 0.5, 0.4, None, 0.5)
    assert not ends(two, 0.5, 0.4, 0.5, None)  # decided at evaluations only
    assert not ends(two, 0.5, 0.4, 0.6, 0.5)
    assert not ends(two, 0.5, 0.4, 0.3, higher=False)
    assert ends(Stop(patience=2, min_delta=0.25), 0.5, 0.6, 0.7)
    assert not ends(Stop(patience=2, min_delta=0.125), 0.5, 0.6, 0.75)
    assert ends(Stop(patience=1, metric="loss", higher_is_better=False), 0.5, 0.4)
    assert not ends(Stop(patience=1, metric="loss", higher_is_better=False), 0.5, 0.6)


def test_bytes_seconds_and_epsilon_end_a_run_where_they_are_reached() -> None:
    two = rows(0.5, None, None, epsilon=1.5)
    for stop, ends in ((Stop(bytes=400), True), (Stop(bytes=401), False), (Stop(seconds=6), True),
                       (Stop(seconds=6.1), False), (Stop(epsilon=1.5), True), (Stop(epsilon=1.6), False)):  # fmt: skip
        assert bool(reason_to_stop(stop, two, "accuracy", True)) is ends
    assert reason_to_stop(Stop(bytes=400), two, "accuracy", True) == "stop.bytes = 400 was reached (400)"


def test_a_condition_that_cannot_hold_is_refused(world: Path, tmp_path: Path) -> None:
    for text, message in (
        ("stop={}", "no condition"),
        ("stop={metric='loss', bytes=1}", "stop.metric has no effect without stop.patience"),
        ("stop={higher_is_better=false, bytes=1}", "stop.higher_is_better has no effect without stop.patience"),
    ):
        with pytest.raises(ConfigError, match=message):
            experiment(world, "lora", text)
    for text, message in (
        ("stop={epsilon=1.0}", "keeps no privacy account"),
        ("stop={patience=1, metric='f1'}", "'f1' is not evaluated in this run; choose from accuracy"),
        ("stop={patience=1, metric='loss'}", "set stop.higher_is_better"),
    ):
        with pytest.raises(ConfigError, match=message):
            fedlora.run(experiment(world, "lora", text), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_only_a_configuration_that_has_conditions_mentions_them(world: Path) -> None:
    plain, stops = experiment(world), experiment(world, "lora", "stop.patience=2")
    assert "stop" not in resolved(plain)
    assert digest(plain) != digest(stops)
    assert fedlora.parse(resolved(stops)).stop == Stop(patience=2)
    assert "[stop]\npatience = 2" in to_toml(stops)


def test_a_run_that_ends_early_is_whole_and_stays_finished(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "stop.patience=1", "stop.min_delta=5", "evaluate.num_examples=6", rounds=5)
    found = fedlora.run(chosen, tmp_path / "run")
    assert found.rounds == 2  # where the first evaluation was
    assert found.stopped == "accuracy did not improve by more than 5 in 1 evaluations (stop.patience)"
    assert found.adapter
    assert (found.adapter / "adapter_model.safetensors").exists()
    assert [row["stopped"] for row in ledger(tmp_path / "run")] == ["", "", found.stopped]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["stopped"] == found.stopped
    again = fedlora.run(chosen, tmp_path / "run")
    assert (again.rounds, again.stopped, again.after) == (2, found.stopped, found.after)
    (tmp_path / "run" / "result.json").unlink()  # killed before the end was written
    assert fedlora.run(chosen, tmp_path / "run").after == found.after
    assert len(ledger(tmp_path / "run")) == 3
    assert fedlora.load_run(tmp_path / "run").evaluate(world / "test.jsonl").metrics["accuracy"] == pytest.approx(
        found.after["accuracy"]
    )


class Ends(Callback):
    """Ends a run after a round, and writes down its calls."""

    def __init__(self, after: int = 99) -> None:
        self.after = after
        self.calls: list[str] = []

    def on_round_end(self, row: RoundRecord) -> bool | None:
        self.calls.append(f"end {row.round}")
        return True if row.round == self.after else None

    def row_recorded(self, row: RoundRecord) -> None:
        self.calls.append(f"row {row.round}")

    def on_evaluate(self, row: RoundRecord) -> None:
        self.calls.append(f"evaluate {row.round} {'accuracy' in row.metrics}")

    def on_save(self, round: int, checkpoint: Path) -> None:
        assert checkpoint.is_dir()
        self.calls.append(f"save {round} {checkpoint.name}")


def test_a_callback_ends_a_run_after_an_evaluation_as_at_its_end(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "evaluate.every=5", rounds=4)
    one = Ends(after=1)
    found = fedlora.run(chosen, tmp_path / "run", callbacks=[one, Callback()])
    assert one.calls == [
        *("row 0", "evaluate 0 True", "end 1", "save 1 round-000001", "row 1", "evaluate 1 True"),
    ]
    assert (found.rounds, found.stopped) == (1, "the callback Ends ended the run")
    assert found.adapter is not None
    assert fedlora.run(chosen, tmp_path / "run").rounds == 1
    # up to there it is the run that was not ended
    fedlora.run(chosen, tmp_path / "whole", until=1)
    whole = ledger(tmp_path / "whole")
    assert [{**row, "stopped": ""} for row in ledger(tmp_path / "run")] == whole


def test_the_last_round_cannot_end_early(world: Path, tmp_path: Path) -> None:
    one = Ends(after=1)
    found = fedlora.run(experiment(world, rounds=1), tmp_path / "run", callbacks=[one])
    assert (found.stopped, "end 1" in one.calls) == ("", True)


def test_a_hook_that_fails_is_named(world: Path, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_round_end(self, row: RoundRecord) -> bool | None:
            raise ValueError("no room")

    with pytest.raises(CallbackError, match=r"Fails failed in on_round_end \(ValueError: no room\)"):
        fedlora.run(experiment(world, rounds=2), tmp_path / "run", callbacks=[Fails()])
    assert fedlora.run(experiment(world, rounds=2), tmp_path / "run").rounds == 2


def test_rows_are_reported_by_what_they_hold() -> None:
    calls: list[str] = []

    class Notes(Callback):
        def on_evaluate(self, row: RoundRecord) -> None:
            calls.append(f"evaluate {row.round}")

        def on_refusal(self, round: int, client: int, reason: str) -> None:
            calls.append(f"refusal {round} {client} {reason}")

    first, second = rows(0.5, None)
    both = CallbackList([Notes()])
    both.report(first)
    both.report(dataclasses.replace(second, refused={"7": "it has NaN"}))
    assert calls == ["evaluate 0", "refusal 1 7 it has NaN"]

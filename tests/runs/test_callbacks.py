"""What is called as a run goes on: in which order, and what happens where one fails or is of an earlier version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures.tiny import experiment, ledger, tiny_world

import fedlora
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData
from fedlora.core.errors import CallbackError, ConfigError, DataError
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.runs.experiment import Stopped
from fedlora.runs.result import Result
from fedlora.runs.trackers import TensorBoard

world = pytest.fixture(scope="module")(tiny_world)


class Notes(Callback):
    """Writes down its calls, after the name of the one who does."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def run_started(self, experiment: Experiment, data: FederatedData, rows: Sequence[RoundRecord]) -> None:
        self.calls.append(f"{self.name} started after {len(rows)} of {experiment.rounds + 1}, {data.split}")

    def row_recorded(self, row: RoundRecord) -> None:
        self.calls.append(f"{self.name} row {row.round}")

    def run_finished(self, result: Result) -> None:
        self.calls.append(f"{self.name} finished {result.rounds}")

    def close(self) -> None:
        self.calls.append(f"{self.name} closed")


class Fails(Callback):
    """Fails in one method: after the second round, or at the end."""

    def __init__(self, method: str) -> None:
        self.method = method

    def row_recorded(self, row: RoundRecord) -> None:
        if self.method == "row_recorded" and row.round == 2:
            raise ValueError("no room")

    def run_finished(self, result: Result) -> None:
        if self.method == "run_finished":
            raise ValueError("no room")


def test_callbacks_are_called_in_order_from_the_start_to_the_end(world: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    fedlora.run(experiment(world, rounds=2), tmp_path / "run", callbacks=[Notes("a", calls), Notes("b", calls)])
    expected = ["started after 0 of 3, test", "row 0", "row 1", "row 2", "finished 2", "closed"]
    assert calls == [f"{name} {call}" for call in expected for name in "ab"]
    again: list[str] = []
    fedlora.run(experiment(world, rounds=2), tmp_path / "run", callbacks=[Notes("c", again)])
    assert again == ["c started after 3 of 3, test", "c finished 2", "c closed"]


def test_a_row_is_in_the_ledger_before_it_is_reported(world: Path, tmp_path: Path) -> None:
    class Looks(Callback):
        def row_recorded(self, row: RoundRecord) -> None:
            assert ledger(tmp_path / "run")[-1]["round"] == row.round

    fedlora.run(experiment(world, rounds=1), tmp_path / "run", callbacks=[Looks()])


def test_alone_each_client_is_a_run_and_all_are_closed_once(world: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    chosen = experiment(world, "lora", "mode='local'", "num_local=2", rounds=1)
    fedlora.run(chosen, tmp_path / "run", callbacks=[Notes("a", calls)])
    one = ["a started after 0 of 2, test", "a row 0", "a row 1", "a finished 1"]
    assert calls == [*one, *one, "a closed"]


def test_tensorboard_has_no_events_of_clients_that_train_alone(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for mode in ("local", "centralised"):
        chosen = experiment(world, "lora", f"mode={mode!r}", "num_local=1", rounds=1)
        fedlora.run(chosen, tmp_path / mode, callbacks=[TensorBoard(tmp_path / f"{mode}-events")])
    assert not (tmp_path / "local-events").exists()
    assert list((tmp_path / "centralised-events").iterdir())


def test_tensorboard_has_the_figures_of_training_where_the_cohort_is_secret(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = TensorBoard(tmp_path)
    callback.run_started(experiment(world), SimpleNamespace(), ())  # type: ignore[arg-type]
    for number in (0, 1):
        row = dict.fromkeys((field.name for field in fields(RoundRecord)[:12]), 0.5)
        row |= {"round": number, "cohort": (), "down_bytes": {}, "up_bytes": {}, "metrics": {}}
        callback.row_recorded(RoundRecord(**row))  # type: ignore[arg-type]
    callback.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    for name in ("train/loss", "train/update_norm", "density/down", "density/up"):
        assert [event.step for event in found.Scalars(name)] == [1]


def test_whatever_ends_a_run_closes_its_callbacks(world: Path, tmp_path: Path) -> None:
    class Stops(Callback):
        def row_recorded(self, row: RoundRecord) -> None:
            raise KeyboardInterrupt

    calls: list[str] = []
    with pytest.raises(Stopped):
        fedlora.run(experiment(world), tmp_path / "run", callbacks=[Notes("a", calls), Stops()])
    with pytest.raises(DataError):
        fedlora.run(experiment(world, "lora", "data.train=no.jsonl"), tmp_path / "b", callbacks=[Notes("b", calls)])
    assert calls == ["a started after 0 of 4, test", "a row 0", "a closed", "b closed"]


@pytest.mark.parametrize("method", ["row_recorded", "run_finished"])
def test_one_that_fails_is_named_and_the_run_goes_on_without_it(world: Path, tmp_path: Path, method: str) -> None:
    chosen = experiment(world, "lora", "checkpoint_every=10")
    message = rf"the callback Fails failed in {method} \(ValueError: no room\); every finished round is saved"
    with pytest.raises(CallbackError, match=message):
        fedlora.run(chosen, tmp_path / "run", callbacks=[Fails(method)])
    calls: list[str] = []
    fedlora.run(chosen, tmp_path / "run", callbacks=[Notes("a", calls)])
    assert calls[0] == f"a started after {3 if method == 'row_recorded' else 4} of 4, test"
    fedlora.run(chosen, tmp_path / "whole")
    assert ledger(tmp_path / "run") == ledger(tmp_path / "whole")


def test_one_that_fails_to_close_leaves_none_open() -> None:
    class Stuck(Callback):
        def close(self) -> None:
            raise ValueError("no room")

    calls: list[str] = []
    with pytest.raises(CallbackError, match="the callback Stuck failed in close"):
        CallbackList([Notes("a", calls), Stuck(), Notes("b", calls)]).close()
    assert calls == ["a closed", "b closed"]


def test_what_an_earlier_version_called_is_refused_with_the_new_names(world: Path, tmp_path: Path) -> None:
    class Watcher(Callback):
        def finished_round(self, row: RoundRecord) -> None: ...

    class Tracker(Callback):
        def started(self, rows: list[RoundRecord]) -> None: ...

        def log(self, row: RoundRecord) -> None: ...

    class Other(Callback):
        log = "a file"

    for old in (Watcher(), Tracker()):
        with pytest.raises(ConfigError, match=r"would never be called: .* `finished_round` and `log` row_recorded"):
            fedlora.run(experiment(world), tmp_path / "run", callbacks=[old])
    assert not (tmp_path / "run").exists()
    CallbackList([Other()])

"""Trackers through ``accelerate``: each where it is installed, on local files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora.config import digest, resolved, to_toml
from fedlora.config.track import Track
from fedlora.core.errors import ConfigError
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs import services
from fedlora.runs.callbacks import Callback
from fedlora.runs.experiment import Stopped
from fedlora.runs.services import Service, flat, numbers
from fedlora.runs.trackers import make_tracker

world = pytest.fixture(scope="module")(tiny_world)


class Kept:
    """A tracker as ``accelerate`` has them, that keeps what it is given."""

    def __init__(self, held: str | None) -> None:
        self.held = held
        self.calls: list[tuple[Any, ...]] = []

    def start(self) -> None:
        print("welcome")
        self.calls.append(("start", self.held))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("configuration", values))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        assert all(isinstance(value, int | float) for value in values.values())
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


class Fake(Service):
    """The service of ``Kept``."""

    kind, package = "fake", "json"
    made: list[Kept] = []  # noqa: RUF012

    def _begin(self, held: str | None) -> Any:
        self.made.append(Kept(held))
        return self.made[-1]

    def _name_of_run(self) -> str | None:
        return "name-there"


class Interrupts(Callback):
    def row_recorded(self, row: RoundRecord) -> None:
        if row.round == 1:
            raise KeyboardInterrupt


def test_a_tracker_has_the_configuration_every_row_the_result_and_the_adapter(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(services.SERVICES, "fake", Fake)
    Fake.made.clear()
    chosen = experiment(world, "lora", "track.kind=fake", rounds=3)
    with pytest.raises(Stopped):
        fedlora.run(chosen, tmp_path / "run", callbacks=[Interrupts()])
    found = fedlora.run(chosen, tmp_path / "run")
    fedlora.run(chosen, tmp_path / "run")  # finished: nothing more to send
    first, second = (one.calls for one in Fake.made)
    assert [one[:2] for one in first] == [("start", None), ("configuration", first[1][1]), ("log", 0), ("finish",)]
    assert first[1][1]["clients/per_round"] == 3
    assert first[1][1]["phases/0/recipe/tuning/rank"] == 4
    assert [one[1] for one in second if one[0] == "log"] == [2, 3, 3]
    assert second[0] == ("start", "name-there")
    last, result = (one[2] for one in second if one[0] == "log" and one[1] == 3)
    assert last["metrics/accuracy"] == found.after["accuracy"] == result["result/after/accuracy"]
    assert (last["bytes/down"], last["bytes/up"]) == (sum(found.down_bytes.values()), sum(found.up_bytes.values()))
    assert second[-2:] == [("configuration", {"adapter": str(found.adapter)}), ("finish",)]
    assert "welcome" not in capsys.readouterr().out


def test_figures_before_the_first_round_leave_out_what_was_not_trained() -> None:
    row = RoundRecord(
        round=0, phase=0, cohort=(), examples=0, steps=0, loss=0.0, down_bytes={}, up_bytes={}, density_down=0.0,
        density_up=0.0, update_norm=0.0, metrics={"accuracy": 0.5}, warnings=("w",), seconds={"evaluate": 1.0},
    )  # fmt: skip
    assert numbers(row) == {"phase": 0, "metrics/accuracy": 0.5, "seconds/evaluate": 1.0, "slowest_seconds": 0.0}
    assert flat({"a": {"b": 1}, "c": [{"d": 2}], "e": [3, 4]}) == {"a/b": 1, "c/0/d": 2, "e": "3, 4"}


def test_trackers_are_no_part_of_a_run_digest(world: Path, tmp_path: Path) -> None:
    plain = experiment(world)
    table = experiment(world, "lora", "track={kind='wandb', project='p', options={mode='offline'}}")
    several = experiment(world, "lora", "track=[{kind='tensorboard'}, {kind='mlflow'}]")
    assert digest(plain) == digest(table) == digest(several)
    assert "track" not in resolved(plain)
    assert table.track == (Track(kind="wandb", project="p", options={"mode": "offline"}),)
    assert fedlora.parse(tomllib.loads(to_toml(table))) == table
    assert [one.kind for one in several.track] == ["tensorboard", "mlflow"]
    # more rounds and another tracker
    fedlora.run(experiment(world, rounds=1), tmp_path / "run")
    more = experiment(world, "lora", "track.kind=tensorboard", rounds=2)
    pytest.importorskip("tensorboard")
    assert fedlora.run(more, tmp_path / "run").rounds == 2
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_tracker_that_does_not_exist_is_refused_before_anything_is_made(world: Path, tmp_path: Path) -> None:
    for text, message in (
        ("track.kind=paper", "there is no tracker 'paper'; there are: tensorboard, wandb"),
        ("track={kind='tensorboard', project='p'}", "tensorboard takes no project"),
    ):
        with pytest.raises(ConfigError, match=message):
            fedlora.run(experiment(world, "lora", text), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    class Absent(Fake):
        package = "no_such_package"

    with pytest.raises(ConfigError, match="no_such_package is not installed"):
        Absent(Track(kind="fake"), tmp_path)


def interrupted_and_resumed(world: Path, folder: Path, kind: str, **options: Any) -> fedlora.Result:
    one = experiment(world, "lora", rounds=3)
    track = Track(kind=kind, project="tiny", options=options)
    with pytest.raises(Stopped):
        fedlora.run(one, folder, callbacks=[make_tracker(track, folder), Interrupts()])
    return fedlora.run(one, folder, callbacks=[make_tracker(track, folder)])


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_has_all_rounds_in_one_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted_and_resumed(world, tmp_path / "run", "wandb", mode="offline")
    name = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert all(part.name.endswith(name) for part in parts)
    assert b"metrics/accuracy" in b"".join(file.read_bytes() for file in parts[1].glob("*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_all_rounds_and_the_adapter_in_one_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    found = interrupted_and_resumed(world, tmp_path / "run", "mlflow", logging_dir=f"file://{tmp_path}/artifacts")
    client = mlflow.MlflowClient()
    (kept,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    history = client.get_metric_history(kept.info.run_id, "bytes/up")
    assert [one.step for one in history] == [0, 1, 2, 3]
    assert kept.data.metrics["result/after/accuracy"] == found.after["accuracy"]
    assert kept.data.params["clients/per_round"] == "3"
    assert "adapter/adapter_model.safetensors" in [
        one.path for one in client.list_artifacts(kept.info.run_id, "adapter")
    ]


@pytest.mark.filterwarnings("ignore")
def test_trackio_has_all_rounds_in_one_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    found = interrupted_and_resumed(world, tmp_path / "run", "trackio", auto_log_cpu=False, auto_log_gpu=False)
    (run,) = list(trackio.Api().runs("tiny"))
    assert run.name == "run"
    assert run.config["clients/per_round"] == 3
    assert found.adapter is not None

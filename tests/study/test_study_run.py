"""Whole studies: tuned, gated, run with every seed, stopped, killed and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fixtures.tiny import LOCAL, tiny_world
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.runs.experiment import Stopped
from fedlora.study import GateError, parse_study, pool, run_study
from fedlora.study.results import compact
from fedlora.study.runner import Runner

world = pytest.fixture(scope="module")(tiny_world)
LINES = {"centralised": False, "local_only": {"set": {"num_local": 2}}}


def document(world: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "seeds": [0, 1],
        "base": {
            "model": {"path": str(world / "bert")},
            "data": {"kind": "files", "train": str(world / "train.jsonl"), "test": str(world / "test.jsonl")},
            "clients": {"num": 9, "per_round": 3, "partition": {"kind": "iid"}},
            "evaluate": {"every": 2},
            "method": {"rounds": 3, "local": LOCAL},
        },
        "methods": {"lora": {"kind": "lora", "rank": 4}},
        "tune": {"trials": 2, "holdout": 0.3, "vary": {"local.optimizer.lr": [1e-3, 3e-2]}},
        "lines": LINES,
        "report": {"target": 0.01, "link": "down=1Mbit,up=1Mbit"},
        **more,
    }


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what the clock says."""
    found: dict[str, Any] = json.loads(json.dumps(results))
    for row in found["rows"]:
        row.pop("seconds", None)
        row.pop("link_seconds", None)
    for row in found["tuning"]:
        for trial in row["trials"]:
            del trial["seconds"]
    return found


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    return folder, run_study(parse_study(document(world)), folder)


def test_a_study_goes_on_from_its_results_alone(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _ = whole
    (tmp_path / "results.json").write_text((held / "results.json").read_text())

    def perform(job: pool.Job) -> pool.Outcome:
        raise AssertionError(f"{job.name} was run again")

    monkeypatch.setattr(pool, "perform", perform)
    run_study(parse_study(document(world)), tmp_path)
    one, other = (timeless(json.loads((folder / "results.json").read_text())) for folder in (held, tmp_path))
    assert one == other


def test_what_is_left_is_counted_from_results_alone(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text((whole[0] / "results.json").read_text())
    left = Runner(parse_study(document(world)), tmp_path).left()
    assert left["tune"]["runs"] == left["final"]["runs"] == 0


def test_times_over_another_link_are_not_those_of_this_one(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text((whole[0] / "results.json").read_text())
    assert any("link_seconds" in row for row in whole[1]["rows"])
    values = document(world, report={"target": 0.01, "link": "down=1Gbit,up=1Gbit"})
    found = run_study(parse_study(values), tmp_path, stage="table")
    assert not any("link_seconds" in row for row in found["rows"])
    assert len(found["rows"]) == len(whole[1]["rows"])


def test_a_study_without_some_of_its_results_runs_those_alone(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _ = whole
    kept = json.loads((held / "results.json").read_text())
    kept["rows"] = [row for row in kept["rows"] if (row["stage"], row["method"], row["seed"]) != ("final", "lora", 1)]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    done: list[str] = []
    perform = pool.perform

    def counted(job: pool.Job) -> pool.Outcome:
        done.append(job.name)
        return perform(job)

    monkeypatch.setattr(pool, "perform", counted)
    again = run_study(parse_study(document(world)), tmp_path)
    assert len(done) == 1
    assert "lora" in done[0]
    expected = timeless(json.loads((held / "results.json").read_text()))
    assert timeless(json.loads((tmp_path / "results.json").read_text())) == expected
    assert again["labels"] == expected["labels"]


def test_a_study_tunes_everything_alike_and_runs_every_seed(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, found = whole
    labels = ["lora", "head_only", "local_lora"]
    assert found["labels"] == labels
    assert [row["method"] for row in found["tuning"]] == labels
    for row in found["tuning"]:
        assert (len(row["trials"]), row["done"], row["rounds"]) == (2, True, [1, 2, 3])
        assert set(row["best"]) == {"local.optimizer.lr"}
    ended = [row for row in found["rows"] if "test" in row]
    assert sorted((row["method"], row["seed"]) for row in ended) == sorted((m, s) for m in labels for s in (0, 1))
    for row in ended:
        alone = row["method"] == "local_lora"
        assert (row["down_bytes"] == 0) == alone
        assert ("link_seconds" in row) != alone
    rounds = [
        row["round"] for row in found["rows"] if (row["stage"], row["method"], row["seed"]) == ("final", "lora", 1)
    ]
    assert rounds == [0, 2, 3]
    configuration = next(folder.glob("final/all/lora/seed-0-*/config.toml")).read_text()
    assert "test.jsonl" in configuration
    trial = next(folder.glob("tune/all/lora/*/config.toml")).read_text()
    assert "every = 3" in trial
    assert not list(folder.glob("tune/**/checkpoints"))


def test_nothing_is_run_twice(world: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found = whole
    monkeypatch.setattr(pool, "run", None)
    assert run_study(parse_study(document(world)), folder) == found


def test_what_was_stopped_goes_on_to_the_same(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = pool.run

    def stopping(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (3, 15):
            raise Stopped("stopped")
        return real(*arguments, **named)

    monkeypatch.setattr(pool, "run", stopping)
    study = parse_study(document(world))
    for _ in range(2):
        with pytest.raises(Stopped):
            run_study(study, tmp_path / "study")
    assert timeless(run_study(study, tmp_path / "study")) == timeless(whole[1])


def test_stages_and_methods_can_be_asked_for_alone(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    study = parse_study(document(world))
    with pytest.raises(ConfigError, match="run --stage tune first"):
        run_study(study, tmp_path / "study", stage="final")
    first = run_study(study, tmp_path / "study", stage="tune", only=["lora"])
    assert {row["method"] for row in first["rows"]} == {"lora"}
    second = run_study(study, tmp_path / "study", only=["head_only", "local_lora"])
    assert {row["method"] for row in second["rows"] if "test" in row} == {"head_only", "local_lora"}
    assert timeless(run_study(study, tmp_path / "study", stage="final")) == timeless(whole[1])
    assert timeless(run_study(study, tmp_path / "study", stage="table")) == timeless(whole[1])
    with pytest.raises(ConfigError, match="no method 'nothing'"):
        run_study(study, tmp_path / "study", only=["nothing"])


def test_what_another_command_finished_meanwhile_is_in_the_results(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    runner = Runner(parse_study(document(world)), tmp_path / "study", ["lora"])
    assert runner.gather()["tuning"] == []
    shutil.copytree(whole[0], tmp_path / "study", dirs_exist_ok=True)
    assert timeless(runner.gather()) == timeless(whole[1])


def test_a_gate_stops_before_the_final_runs(world: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    gated = parse_study(document(world, gates={"rules": ["lora >= 2"]}))
    with pytest.raises(GateError, match=r"'lora >= 2' does not hold on held-out data: lora 0\."):
        run_study(gated, folder, stage="tune")
    lenient = parse_study(document(world, gates={"rules": ["lora >= 2"], "stop": False}))
    assert len(run_study(lenient, folder)["broken_gates"]) == 2


def test_runs_that_fail_are_recorded_and_stop_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool.run

    def failing(experiment: Any, folder: Path, **named: Any) -> Any:
        if experiment.label == "lora" and named["until"] is None and experiment.seed == 1:
            raise TrainingError("the loss is not finite")
        if experiment.label == "head_only":
            raise KeyError("a slip")
        return real(experiment, folder, **named)

    monkeypatch.setattr(pool, "run", failing)
    few = document(world, lines={"centralised": False, "local_only": False})
    found = run_study(parse_study(few), tmp_path / "s")
    reasons = [(one["stage"], one["method"], one["reason"]) for one in found["failures"]]
    assert reasons == [("tune", "head_only", "KeyError: 'a slip'"), ("final", "lora", "the loss is not finite")]
    assert len([row for row in found["rows"] if "test" in row]) == 1
    for rule, where in (("lora >= head_only", "held-out"), ("lora >= 0", "test")):
        with pytest.raises(GateError, match=f"cannot be judged on {where} data, as"):
            run_study(parse_study({**few, "gates": {"rules": [rule]}}), tmp_path / "s")


def test_a_damaged_record_of_a_trial_is_named_with_what_mends_it(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(whole[0], folder)
    (folder / "results.json").unlink()
    damaged = sorted((folder / "tune").rglob("rungs.json"))[0]
    damaged.write_text("{")
    study = parse_study(document(world))
    with pytest.raises(ConfigError, match=rf"rungs\.json is damaged.*remove the folder {damaged.parent}"):
        run_study(study, folder)
    shutil.rmtree(damaged.parent)
    assert timeless(run_study(study, folder)) == timeless(whole[1])


@pytest.mark.parametrize(("tune", "expected"), [({}, "no final run has a result"), (None, "no trial has a result")])
def test_a_study_without_any_result_says_why_and_goes_on_once_that_is_mended(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: dict[str, Any] | None, expected: str
) -> None:
    values = document(world, seeds=[0], lines={"centralised": False, "local_only": False, "head_only": False})
    study = parse_study({**values, **({} if tune is None else {"tune": tune})})

    def refused(*arguments: Any, **named: Any) -> Any:
        raise ConfigError("there is no file")

    with monkeypatch.context() as broken:
        broken.setattr(pool, "run", refused)
        with pytest.raises(ConfigError, match=f"{expected}.*: there is no file"):
            run_study(study, tmp_path / "study")
    # from results.json alone, as on another machine
    for folder in ("tune", "final"):
        shutil.rmtree(tmp_path / "study" / folder, ignore_errors=True)
    assert run_study(study, tmp_path / "study")["failures"] == []


def test_results_of_another_machine_are_kept_when_a_part_is_run_again(
    world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = json.loads((whole[0] / "results.json").read_text())
    best = next(row for row in held["tuning"] if row["method"] == "lora")
    place = f"tune/all/lora/{next(one['run'] for one in best['trials'] if one['values'] == best['best'])}"
    for trial in best["trials"]:
        trial["ranks"].pop("3", None)
        trial["ranks"].pop("2", None)
    (tmp_path / "results.json").write_text(json.dumps(held))
    study = parse_study(document(world))
    table = run_study(study, tmp_path, stage="table")
    ended = [(row["method"], row["seed"]) for row in table["rows"] if "test" in row]
    assert sorted(ended) == sorted((label, seed) for label in held["labels"] for seed in (0, 1))

    def stopping(*arguments: Any, **named: Any) -> Any:
        (tmp_path / place).mkdir(exist_ok=True)  # as if it had begun
        raise Stopped("stopped")

    with monkeypatch.context() as stopped:
        stopped.setattr(pool, "run", stopping)
        with pytest.raises(Stopped):
            run_study(study, tmp_path)
    for row in held["rows"]:
        if (row["method"], row["stage"]) == ("head_only", "final"):
            (tmp_path / "final" / "all" / "head_only" / row["run"]).mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    again = run_study(study, tmp_path, log=lines.append)
    assert [line.split(":")[0].rpartition(", ")[2] for line in lines] == ["round 2", "round 3"]
    assert [row["best"] for row in again["tuning"]] == [row["best"] for row in held["tuning"]]
    finals = [[row for row in timeless(one)["rows"] if row["stage"] == "final"] for one in (held, again)]
    assert finals[0] == json.loads(json.dumps(compact(finals[1])))


def test_without_anything_to_tune_only_the_final_runs_are_done(world: Path, tmp_path: Path) -> None:
    values = document(world, tune={}, seeds=[0], lines={"centralised": False, "local_only": False, "head_only": False})
    found = run_study(parse_study(values), tmp_path / "study")
    assert found["tuning"] == []
    assert {row["stage"] for row in found["rows"]} == {"final"}


def test_runs_before_and_after_a_change_of_the_data_are_reported_with_a_warning(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = document(world, tune={}, seeds=[0], lines={"centralised": False, "local_only": False, "head_only": False})
    values["base"]["data"]["test"] = str(tmp_path / "test.jsonl")
    rows = (world / "test.jsonl").read_text().splitlines(keepends=True)
    for seeds, kept in (([0], rows), ([0, 1], rows[:-3])):
        assert "different rows" not in caplog.text
        (tmp_path / "test.jsonl").write_text("".join(kept))
        run_study(parse_study({**values, "seeds": seeds}), tmp_path / "study")
    assert "were trained or tested on different rows" in caplog.text


def test_a_spent_budget_begins_nothing(world: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = run_study(parse_study(document(world)), tmp_path / "study", budget=0.0, log=lines.append)
    assert found["rows"] == []
    assert lines == ["the budget was spent before the end; run the same command to resume"]


def test_the_command(world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = whole
    (tmp_path / "study.toml").write_text(tomli_w.dumps(document(world)))
    arguments = ["study", str(tmp_path / "study.toml"), "--jobs", "1", "--out"]
    shown = CliRunner().invoke(app, [*arguments, str(folder)], catch_exceptions=False)
    assert "| lora | 0." in shown.stdout
    counted = CliRunner().invoke(app, [*arguments, str(tmp_path / "new"), "--dry-run"], catch_exceptions=False)
    assert "3 tunings (of several trials each) are left, 12 rounds" in counted.stdout
    assert "6 final runs are left, 18 rounds" in counted.stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_what_was_killed_goes_on_to_the_same(world: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(tomli_w.dumps(document(world)))
    command = [sys.executable, "-m", "fedlora", "study", str(tmp_path / "study.toml"), "--jobs", "2"]
    command += ["--out", str(tmp_path / "study")]
    environment = {**os.environ, "FEDLORA_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1"}
    for lines in (4, 8):
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stderr is not None
            for _ in range(lines):
                assert process.stderr.readline()
            process.send_signal(signal.SIGKILL)
        time.sleep(1.0)
    found = run_study(parse_study(document(world)), tmp_path / "study", jobs=2)
    assert timeless(found) == timeless(whole[1])

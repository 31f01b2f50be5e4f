"""Successive halving: who goes on, what is kept, how it goes on after it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fixtures.tiny import document, tiny_world
from typer.testing import CliRunner

from fedlora import config
from fedlora.cli.main import app
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.runs.experiment import Stopped
from fedlora.study import pool, tune
from fedlora.study.halving import Halving
from fedlora.study.pool import Job, Outcome
from fedlora.study.tuning import seconds_of

world = pytest.fixture(scope="module")(tiny_world)
VARY = {"local.optimizer.lr": [1e-3, 1e-2, 1e-1], "rank": [2, 4]}


def halved(world: Path, folder: Path, value: Any, trials: int = 8, rounds: int = 9) -> tuple[Halving, list[list[int]]]:
    """A halving whose figures are made up, and who ran to each round."""
    vary = {"local.optimizer.lr": [10.0**-number for number in range(trials)]}
    halving = Halving("it", document(world, rounds=rounds), vary, folder, trials=trials)
    steps: list[list[int]] = []
    while not halving.done:
        jobs = []
        while job := halving.take():
            jobs.append(job)
        numbers = [next(n for n, t in enumerate(halving.trials) if t.folder == job.folder) for job in jobs]
        steps.append(numbers)
        for job, number in zip(jobs, numbers, strict=True):
            halving.record(job, value(number, job))
    return halving, steps


def figure(value: float, higher: bool = True, loss: float = 0.0) -> Outcome:
    return Outcome({"m": value, "loss": loss}, "m", higher)


def test_eight_three_one(world: Path, tmp_path: Path) -> None:
    halving, steps = halved(world, tmp_path, lambda number, job: figure(number))
    assert halving.rungs == [3, 6, 9]
    assert steps == [list(range(8)), [7, 6, 5], [7]]
    assert halving.best is halving.trials[7]
    assert halving.ends == ["local.optimizer.lr"]
    halving, steps = halved(world, tmp_path, lambda number, job: figure(number, higher=False))
    assert steps[1:] == [[0, 1, 2], [0]]


def test_equal_figures_are_told_apart_by_the_loss(world: Path, tmp_path: Path) -> None:
    _, steps = halved(world, tmp_path, lambda number, job: figure(0.5, loss=abs(number - 4)))
    assert steps[1:] == [[4, 3, 5], [4]]


def test_one_that_diverges_has_lost(world: Path, tmp_path: Path) -> None:
    def value(number: int, job: Job) -> Outcome:
        failed = number == 7 or (number == 6 and job.until == 6)
        return Outcome({}, failure="it diverged", cause="diverged") if failed else figure(number)

    halving, steps = halved(world, tmp_path, value)
    assert steps == [list(range(8)), [6, 5, 4], [5]]
    assert halving.trials[7].failure == "it diverged"
    assert halving.best is halving.trials[5]
    late = halved(world, tmp_path, lambda number, job: value(7 if job.until == 9 else number, job))[0]
    assert (late.done, late.best) == (True, late.trials[4])
    assert [(trial.failure, trial.cause) for trial in (late.trials[5], late.best)] == [
        ("it diverged", "diverged"),
        ("", ""),
    ]
    halving, steps = halved(world, tmp_path, lambda number, job: Outcome({}, failure="no", cause="diverged"))
    assert (halving.best, len(steps)) == (None, 1)


def test_one_setting_runs_to_the_end_at_once(world: Path, tmp_path: Path) -> None:
    halving, steps = halved(world, tmp_path, lambda number, job: figure(1), trials=1)
    assert (halving.rungs, steps) == ([9], [[0]])


def test_trials_are_compared_by_rounds_which_are_the_same(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="number of rounds"):
        Halving("it", document(world), {"rounds": [1, 2]}, tmp_path, trials=2)


def test_two_spellings_of_a_value_are_one_trial(world: Path, tmp_path: Path) -> None:
    halving = Halving("it", document(world), {"local.optimizer.lr": [1e-3, "1e-3", 1e-2]}, tmp_path, trials=4)
    assert [trial.values["local.optimizer.lr"] for trial in halving.trials] == [1e-3, 1e-2]


def test_an_unknown_key_is_refused_before_anything_runs(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'method\.sever'"):
        tune(document(world), {"sever.lr": [1.0]}, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_seed_is_not_tuned(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the seed is no setting to tune: the best one would be luck"):
        tune(document(world), {"seed": [0, 1]}, tmp_path / "t")


def test_the_best_values_are_written_and_nothing_is_run_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    found = tune(document(world, rounds=3), VARY, tmp_path / "t", trials=4, holdout=0.3, log=lines.append)
    assert len(found.trials) == 4
    assert found.rounds == (1, 2, 3)
    assert [sum(round_ in trial.metrics for trial in found.trials) for round_ in found.rounds] == [4, 2, 1]
    assert len(lines) == 7
    best = config.load(tmp_path / "t" / "best.toml")
    assert found.best is not None
    assert best.data == config.parse(document(world)).data
    assert best.phases[0].recipe.local.optimizer.lr == found.best["local.optimizer.lr"]  # type: ignore[attr-defined]
    written = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert len(written.pop("digest")) == 16
    assert written == json.loads(json.dumps(found.as_dict()))
    monkeypatch.setattr(pool, "run", None)
    again = tune(document(world, rounds=3), VARY, tmp_path / "t", trials=4, holdout=0.3)
    assert again.as_dict() == found.as_dict()


def test_what_was_stopped_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = pool.run

    def stopping(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stopped("stopped")
        return real(*arguments, **named)

    monkeypatch.setattr(pool, "run", stopping)
    arguments = (document(world, rounds=3), {"local.optimizer.lr": "1e-3..1e-1"})
    with pytest.raises(Stopped, match="Run the same command to resume"):
        tune(*arguments, tmp_path / "stopped", trials=3, holdout=0.3)
    stopped = tune(*arguments, tmp_path / "stopped", trials=3, holdout=0.3)
    assert calls == 6
    whole = tune(*arguments, tmp_path / "whole", trials=3, holdout=0.3)
    assert stopped.as_dict() == whole.as_dict()


def test_a_budget_ends_with_the_best_so_far(world: Path, tmp_path: Path) -> None:
    found = tune(document(world), VARY, tmp_path / "t", trials=2, budget=0.0)
    assert (found.best, found.value) == (None, None)
    assert "the budget was spent" in found.warnings[-1]


def test_a_fault_is_no_lost_trial(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **named: Any) -> Any:
        raise KeyError("a slip")

    monkeypatch.setattr(pool, "run", failing)
    with pytest.raises(RuntimeError, match="KeyError: 'a slip'"):
        tune(document(world), VARY, tmp_path / "t", trials=2)

    def diverging(*arguments: Any, **named: Any) -> Any:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(pool, "run", diverging)
    found = tune(document(world), VARY, tmp_path / "t", trials=2)
    assert [trial.failure for trial in found.trials] == ["the loss is not finite"] * 2
    assert found.best is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("0.5h", 1800)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["45", "h", "2 hours", "", "-3h"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a budget is a time"):
        seconds_of(text)


def test_the_command(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document(world, rounds=2)))
    arguments = [
        "tune",
        str(tmp_path / "run.toml"),
        "--vary",
        "local.optimizer.lr=1e-3,1e-2",
        "--out",
        str(tmp_path / "t"),
    ]
    arguments += ["--holdout", "0.3", "--jobs", "1"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "best" in shown.stdout
    assert "is at an end of the values tried (0.001, 0.01)" in shown.stderr
    printed = CliRunner().invoke(app, [*arguments, "--format", "json"], catch_exceptions=False)
    assert json.loads(printed.stdout)["rounds"] == [1, 2, 2]

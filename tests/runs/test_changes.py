"""Runs that go on with another configuration: more rounds, other evaluations, another learning rate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import contents, experiment, ledger, tiny_world

import fedlora
from fedlora.core.errors import CheckpointError
from fedlora.recipe.local import AdamW
from fedlora.runs.folder import RunFolder

world = pytest.fixture(scope="module")(tiny_world)
NOISE = "kind='central_gaussian', clip_norm=1.0, target_epsilon=50.0, delta=0.1, accountant='rdp', seed=1"
RATE = "method.local.optimizer.lr=0.002"


def params(folder: Path) -> dict[str, torch.Tensor]:
    latest = RunFolder(folder).latest()
    assert latest is not None
    return latest[0].params


def same_run(one: Path, other: Path) -> None:
    """The same state, adapter and result; the evaluation at the old end is in one ledger only."""
    left, right = params(one), params(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert {name: raw for name, raw in contents(one / "adapter").items() if name != "README.md"} == {
        name: raw for name, raw in contents(other / "adapter").items() if name != "README.md"
    }
    plain = [
        [{key: value for key, value in row.items() if key not in ("metrics", "warnings")} for row in ledger(folder)]
        for folder in (one, other)
    ]
    assert plain[0] == plain[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for result in results:
        del result["seconds"], result["digest"]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "settings",
    [
        ["method.server={kind='adam', lr=0.01}"],
        ["method.memory='last_round'", "method.up.sparsify={kind='top_k', density=0.3}", "method.up.feedback=true"],
        ["mode='centralised'"],
    ],
    ids=["server state", "memories", "centralised"],
)
def test_three_rounds_and_three_more_are_six(world: Path, tmp_path: Path, settings: list[str]) -> None:
    fedlora.run(experiment(world, "lora", *settings, rounds=6), tmp_path / "six")
    for rounds in (3, 6):
        result = fedlora.run(experiment(world, "lora", *settings, rounds=rounds), tmp_path / "three")
        assert result.rounds == rounds
    same_run(tmp_path / "six", tmp_path / "three")


def test_phases_and_an_unfinished_run(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "slora", rounds=4), tmp_path / "four")
    fedlora.run(experiment(world, "slora", rounds=2), tmp_path / "two", until=1)
    fedlora.run(experiment(world, "slora", rounds=3), tmp_path / "two")
    fedlora.run(experiment(world, "slora", rounds=4), tmp_path / "two")
    same_run(tmp_path / "four", tmp_path / "two")


def test_changes_are_in_the_ledger_and_in_the_configuration(world: Path, tmp_path: Path) -> None:
    first = fedlora.run(experiment(world, rounds=2), tmp_path)
    longer = experiment(world, "lora", RATE, "evaluate.every=1", rounds=4)
    result = fedlora.run(longer, tmp_path)
    assert result.rows[2].warnings == first.rows[2].warnings
    said = [sentence for sentence in result.rows[3].warnings if sentence.startswith("from this round on")]
    assert said == [
        "from this round on, after 2 rounds, evaluate.every: 2 against 1",
        "from this round on, after 2 rounds, phases.0.recipe.local.optimizer.lr: 0.01 against 0.002",
        "from this round on, after 2 rounds, phases.0.rounds: 2 against 4",
    ]
    assert not any("from this round" in sentence for sentence in result.rows[4].warnings)
    assert result.rows[3].metrics
    assert fedlora.load(tmp_path) == longer
    # the rate matters, and from there on alone
    other = fedlora.run(experiment(world, rounds=4), tmp_path / "other")
    assert [row.loss for row in other.rows[:4]] == [row.loss for row in result.rows[:4]]
    assert other.rows[4].loss != result.rows[4].loss
    assert fedlora.run(longer, tmp_path).rows == result.rows


def test_a_changed_run_that_is_stopped_goes_on(world: Path, tmp_path: Path) -> None:
    longer = experiment(world, "lora", RATE, rounds=4)
    for folder, stops in (("whole", ()), ("stopped", (3,))):
        fedlora.run(experiment(world, rounds=2), tmp_path / folder)
        for until in (*stops, None):
            fedlora.run(longer, tmp_path / folder, until=until)
    same_run(tmp_path / "whole", tmp_path / "stopped")
    warnings = [[row["warnings"] for row in ledger(tmp_path / name)] for name in ("whole", "stopped")]
    assert warnings[0] == warnings[1]


def test_a_crash_before_the_configuration_is_written_loses_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, longer = experiment(world, rounds=2), experiment(world, rounds=3)
    fedlora.run(short, tmp_path)
    write = RunFolder.write

    def broken(files: RunFolder, name: str, text: str) -> None:
        if name == "config.toml":
            raise KeyboardInterrupt
        write(files, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", broken)
        with pytest.raises(fedlora.FedloraError):
            fedlora.run(longer, tmp_path)
    assert fedlora.run(short, tmp_path).rounds == 2
    result = fedlora.run(longer, tmp_path)
    said = [sentence for sentence in result.rows[3].warnings if "from this round" in sentence]
    assert said == ["from this round on, after 2 rounds, phases.0.rounds: 2 against 3"]


def test_an_evaluation_that_comes_too_late_changes_no_figure(world: Path, tmp_path: Path) -> None:
    first = fedlora.run(experiment(world, rounds=1), tmp_path)
    again = fedlora.run(experiment(world, "lora", "evaluate.every=1", rounds=1), tmp_path)
    assert (again.after, again.rows, again.adapter) == (first.after, first.rows, first.adapter)


def test_a_schedule_over_the_rounds_is_named(world: Path, tmp_path: Path) -> None:
    cosine = "method.local.schedule={shape='cosine'}"
    fedlora.run(experiment(world, "lora", cosine, rounds=1), tmp_path)
    result = fedlora.run(experiment(world, "lora", cosine, rounds=2), tmp_path)
    assert "the schedule of local.lr spans 2 rounds from this round on" in result.rows[2].warnings


REFUSED: dict[str, tuple[str, list[str], int, list[str], int, str]] = {
    "another rank": ("lora", [], 1, ["method.rank=5"], 2, r"tuning\.rank: 4 against 5.*choose another folder"),
    "another seed": ("lora", [], 1, ["seed=3"], 2, r"seed: 0 against 3"),
    "fewer rounds": ("lora", [], 2, [], 1, "but 2 rounds of phase 0 are done: ask for as many or more"),
    "a rate without a round": ("lora", [], 1, [RATE], 1, "no round of phase 0 is left for the learning rate"),
    "a phase that is over": ("slora", [], 2, ["method.warm_rounds=2"], 3, "phase 0 is over: leave its settings"),
    "calibrated noise": (
        "lora",
        [f"method.privacy={{{NOISE}}}", "clients.sampling='poisson'"],
        1,
        [],
        2,
        r"its noise was calibrated by target_epsilon for the old number of rounds",
    ),
    "clients apart": ("lora", ["mode='local'", "num_local=2"], 1, [], 2, "has a run of its own for each client"),
}


def test_a_rate_of_a_phase_that_has_no_round_left_is_refused(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "slora", rounds=3), tmp_path, until=1)  # the first phase has one round
    other = experiment(world, "slora", rounds=3)
    first = dataclasses.replace(other.phases[0].recipe.local, optimizer=AdamW(lr=0.5))
    recipe = dataclasses.replace(other.phases[0].recipe, local=first)
    phases = (dataclasses.replace(other.phases[0], recipe=recipe), *other.phases[1:])
    with pytest.raises(CheckpointError, match="no round of phase 0 is left for the learning rate"):
        fedlora.run(dataclasses.replace(other, phases=phases), tmp_path)


def test_a_run_that_ended_early_gets_no_more_rounds(world: Path, tmp_path: Path) -> None:
    class Ends(fedlora.Callback):
        def on_round_end(self, row: Any) -> bool:
            return True

    first = fedlora.run(experiment(world, rounds=2), tmp_path, callbacks=[Ends()])
    for changed in (experiment(world, rounds=3), experiment(world, "lora", RATE, rounds=2)):
        with pytest.raises(CheckpointError, match=r"the run has ended early \(the callback Ends ended the run\)"):
            fedlora.run(changed, tmp_path)
    assert fedlora.run(experiment(world, rounds=2), tmp_path) == first


def test_what_decides_no_result_may_change_with_the_rounds(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, rounds=1), tmp_path)
    result = fedlora.run(experiment(world, "lora", "checkpoint_every=2", rounds=2), tmp_path)
    said = [sentence for sentence in result.rows[2].warnings if "from this round" in sentence]
    assert said == ["from this round on, after 1 rounds, phases.0.rounds: 1 against 2"]
    assert fedlora.load(tmp_path).checkpoint_every == 2


@pytest.mark.parametrize("name", REFUSED)
def test_other_changes_are_refused_and_leave_the_run_as_it_is(world: Path, tmp_path: Path, name: str) -> None:
    method, settings, rounds, changes, more, expected = REFUSED[name]
    fedlora.run(experiment(world, method, *settings, rounds=rounds), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        fedlora.run(experiment(world, method, *settings, *changes, rounds=more), tmp_path)
    assert contents(tmp_path) == before


def test_the_command_line_extends_a_folder(world: Path, tmp_path: Path, capsys: Any) -> None:
    from fedlora.cli.train import run

    fedlora.run(experiment(world, rounds=1), tmp_path)
    run(tmp_path, set_=["rounds=2"])
    assert fedlora.load(tmp_path).rounds == 2
    assert len(ledger(tmp_path)) == 3

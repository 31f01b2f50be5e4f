"""A run's folder with a damaged file: every command that reads the file names it, with what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.tiny import experiment, tiny_world
from typer.testing import CliRunner

import fedlora
from fedlora.cli.common import write_page
from fedlora.cli.main import app
from fedlora.core import files
from fedlora.core.errors import CheckpointError, ConfigError, FedloraError
from fedlora.runs.inference import load_run
from fedlora.runs.result import Result
from fedlora.show.curves import read_run

world = pytest.fixture(scope="module")(tiny_world)
READS = {
    "predict": lambda run: ["predict", run, "w1"],
    "compare": lambda run: ["compare", run, "--target", "0.1"],
    "report": lambda run: ["report", run, "--out", str(Path(run).parent / "r.html")],
}
Damage = Callable[[str], str]


@pytest.fixture(scope="module")
def whole(world: Path) -> Result:
    return fedlora.run(experiment(world, "lora", rounds=2), world / "whole")


def damaged(whole: Result, tmp_path: Path, name: str, damage: Damage) -> Path:
    shutil.copytree(whole.folder, tmp_path / "run")
    file = tmp_path / "run" / name
    file.write_text(damage(file.read_text()))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("command", "name", "damage", "why"),
    [
        ("compare", "config.toml", lambda text: text[:90], "config.toml is not TOML"),
        ("report", "config.toml", lambda text: text[:90], "config.toml is not TOML"),
        ("compare", "config.toml", lambda text: "", "config.toml is empty"),
        ("report", "config.toml", lambda text: "\n", "config.toml is empty"),
        ("predict", "config.toml", lambda text: "", "config.toml describes another model than the checkpoint"),
        (
            "predict",
            "config.toml",
            lambda text: text.replace("rank = ", "rank = 1"),
            "config.toml describes another model than the checkpoint",
        ),
        ("report", "partition.json", lambda text: text[:40], "its partition.json is damaged; write it anew with"),
        ("report", "partition.json", lambda text: text.replace("2", "3", 1), "its partition.json is damaged"),
        ("report", "result.json", lambda text: text[:40], "its result.json is damaged; write it anew with"),
        ("predict", "result.json", lambda text: "{}", "its result.json is damaged; write it anew with"),
        ("report", "ledger.jsonl", lambda text: text[: text.index("\n") + 1], "lacks some of the 2 rounds"),
        ("report", "ledger.jsonl", lambda text: "", "lacks some of the 2 rounds"),
        ("compare", "ledger.jsonl", lambda text: text.split("\n", 1)[1], "lacks some of the 2 rounds"),
    ],
)
def test_damage_is_named_by_what_reads_it(
    whole: Result, tmp_path: Path, command: str, name: str, damage: Damage, why: str
) -> None:
    if command == "report":
        pytest.importorskip("matplotlib")
    run = damaged(whole, tmp_path, name, damage)
    with pytest.raises(FedloraError, match=why):
        CliRunner().invoke(app, READS[command](str(run)), catch_exceptions=False)


def test_a_folder_in_place_of_the_configuration_is_named(whole: Result, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    (tmp_path / "run" / "config.toml").unlink()
    (tmp_path / "run" / "config.toml").mkdir()
    with pytest.raises(ConfigError, match=r"there is no file .*config\.toml"):
        CliRunner().invoke(app, READS["compare"](str(tmp_path / "run")), catch_exceptions=False)


def test_a_changed_configuration_is_noted_and_that_of_the_run_is_not(whole: Result, tmp_path: Path) -> None:
    run = damaged(whole, tmp_path, "config.toml", lambda text: text.replace("batch_size = ", "batch_size = 1"))
    (note,) = load_run(run).notes
    assert note.startswith(f"{run / 'config.toml'} is not the one that the run was trained with")
    assert not load_run(whole.folder).notes
    more = fedlora.load(whole.folder, ["phases.0.rounds=3"])
    shutil.copytree(whole.folder, tmp_path / "more")
    fedlora.run(more, tmp_path / "more")
    assert not load_run(tmp_path / "more").notes


def test_a_damaged_checkpoint_names_the_command_that_goes_on(whole: Result, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "round-000002" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=rf"with: fedlora run {tmp_path / 'run'}$"):
        load_run(tmp_path / "run")


def test_the_ledger_of_a_whole_run_is_read(whole: Result) -> None:
    assert [row.round for row in read_run(Path(whole.folder)).rows] == [0, 1, 2]


def test_a_page_replaces_the_old_one_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "new" / "page.html"
    with pytest.raises(ConfigError, match="name a file in an existing folder"):
        write_page(page, "one")
    page.parent.mkdir()
    write_page(page, "one")
    write_page(Path("/dev/null"), "one")  # no file to replace

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); make room"):
        write_page(page, "two")
    assert page.read_text() == "one"
    assert [entry.name for entry in page.parent.iterdir()] == ["page.html"]

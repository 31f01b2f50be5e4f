"""What a run depends on: found again from elsewhere, and not exchanged in silence."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from fixtures.tiny import document, experiment, save_model, tiny_world
from safetensors.torch import load_file, save_file

import fedlora
from fedlora import config
from fedlora.cli.common import experiment_of
from fedlora.core.errors import CheckpointError
from fedlora.rounds.checkpoint import load_state
from fedlora.runs.folder import RunFolder
from fedlora.tasks.models.fingerprints import base_digest

world = pytest.fixture(scope="module")(tiny_world)


def exchange(folder: Path) -> None:
    """Another model of the same shapes."""
    file = folder / "model.safetensors"
    weights = {name: value + 0.5 if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def retokenise(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w1"', '"other"'))


@pytest.fixture
def project(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration whose paths are relative, beside a folder with another model of that path."""
    values = document(world, rounds=2)
    values["model"]["path"], values["data"] = "model", {"kind": "files", "train": "t.jsonl"}
    for name in ("here", "here/elsewhere"):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name / "model")
    exchange(tmp_path / "here" / "elsewhere" / "model")
    shutil.copy(world / "train.jsonl", tmp_path / "here" / "t.jsonl")
    (tmp_path / "here" / "run.toml").write_text(tomli_w.dumps(values))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_run_from_elsewhere_reads_what_lies_beside_its_configuration(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fedlora.run(fedlora.load("run.toml"), tmp_path / "run")
    expected = fedlora.load_run(tmp_path / "run").predict(["w1 red"])
    for place in (project / "elsewhere", Path("/")):
        monkeypatch.chdir(place)
        run = fedlora.load_run(tmp_path / "run")
        assert run.predict(["w1 red"]) == expected
        assert run.notes == ()
        again = fedlora.run(fedlora.load(project / "run.toml"), tmp_path / f"again-{place.name}")
        assert again.after == first.after
        assert fedlora.run(fedlora.load(tmp_path / "run"), tmp_path / "run").after == first.after


def test_from_python_the_working_folder_is_recorded(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config.parse(read(project / "run.toml"))
    assert plain.root is None
    fedlora.run(plain, tmp_path / "run")
    monkeypatch.chdir(project / "elsewhere")
    run = fedlora.load_run(tmp_path / "run")
    assert (run.experiment.root, run.notes) == (str(project), ())


@pytest.mark.parametrize("train", [["t.jsonl", "u.jsonl"], "t*.jsonl", ["t.json[l]"]])
def test_several_files_and_patterns_are_found_from_elsewhere_too(
    project: Path, monkeypatch: pytest.MonkeyPatch, train: Any
) -> None:
    values = read(project / "run.toml")
    values["model"]["path"], values["data"]["train"] = "embedded", train
    (project / "several.toml").write_text(tomli_w.dumps(values))
    shutil.copy(project / "t.jsonl", project / "u.jsonl")
    monkeypatch.chdir("/")
    chosen = fedlora.load(project / "several.toml")
    assert chosen.root == str(project)
    found = config.places.located_data(chosen.data, chosen.root)
    assert len(found.load().train) == 72 * (2 if len(train) == 2 else 1)


def test_other_machines_are_sent_names_of_files_alone(world: Path) -> None:
    data = f"data={{kind='sites', test=['{world / 'test.jsonl'}', '~/b/*.csv']}}"
    chosen = experiment(world, "lora", data, f"init_from='{world}'")
    sent = config.places.elsewhere(dataclasses.replace(chosen, root=str(world)))
    assert (sent.model.path, sent.data.test, sent.root, sent.init_from) == ("bert", ("test.jsonl", "*.csv"), None, None)
    hub = dataclasses.replace(chosen, model=fedlora.Model(path="google/bert"))
    assert config.places.elsewhere(hub).model.path == "google/bert"


def read(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text())


def test_the_working_folder_still_counts_with_a_note(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "configurations").mkdir()
    file = tmp_path / "configurations" / "run.toml"
    (project / "run.toml").rename(file)
    chosen, _ = experiment_of(file, None, None)
    assert chosen.root == str(project)
    assert "note: relative paths start from the working folder" in caplog.text
    # where things lie does not name a run
    assert config.digest(chosen) == config.digest(config.parse(read(file)))
    fedlora.run(chosen, tmp_path / "run")


def test_a_hub_id_and_absolute_paths_need_no_root(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document(world)))
    assert fedlora.load(tmp_path / "run.toml").root is None
    (tmp_path / "hub.toml").write_text('[model]\npath = "google/bert"\n')
    assert fedlora.load(tmp_path / "hub.toml").root is None


def test_a_home_folder_is_expanded(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world))
    chosen = experiment(world, "lora", "model.path='~/bert'", rounds=1)
    assert fedlora.run(chosen, tmp_path / "run").rounds == 1
    assert base_digest(chosen.model) == base_digest(experiment(world).model)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "model": (exchange, "the base model has changed since"),
    "tokenizer": (retokenise, "the tokenizer has changed since"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_exchanged_is_named(world: Path, tmp_path: Path, name: str) -> None:
    model = Path(shutil.copytree(world / "bert", tmp_path / "model"))
    chosen = experiment(world, "lora", f"model.path='{model}'", rounds=2)
    fedlora.run(chosen, tmp_path / "run", until=1)
    assert fedlora.load_run(tmp_path / "run").notes == ()
    change, expected = CHANGES[name]
    change(model)
    with pytest.raises(CheckpointError, match=f"{expected} the checkpoint in .* put the old {name} back"):
        fedlora.run(chosen, tmp_path / "run")
    run = fedlora.load_run(tmp_path / "run")
    assert len(run.notes) == 1
    assert run.notes[0].startswith(f"{expected} the run in {tmp_path / 'run'} was trained")
    assert run.evaluate(world / "test.jsonl").warnings[0] == run.notes[0]


def test_the_same_model_in_another_place_is_no_other_model(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "bert", tmp_path / "model")
    prints = [
        json.loads((folder / "manifest.json").read_text())["fingerprints"]
        for place, folder in ((world / "bert", tmp_path / "one"), (tmp_path / "model", tmp_path / "two"))
        if fedlora.run(experiment(world, "lora", f"model.path='{place}'", rounds=1), folder)
    ]
    assert prints[0] == prints[1]
    assert prints[0].keys() == {"model", "tokenizer"}


def test_a_run_of_an_older_version_has_no_fingerprints_and_goes_on(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, rounds=2)
    fedlora.run(chosen, tmp_path / "run", until=1)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del manifest["fingerprints"], manifest["digest"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    file = RunFolder(tmp_path / "run").checkpoints[-1]
    state = json.loads((file / "state.json").read_text())
    assert state["facts"].keys() == {"config", "data", "model", "tokenizer"}
    state["facts"] = {name: state["facts"][name] for name in ("config", "data")}
    (file / "state.json").write_text(json.dumps(state))
    (file / "digests.json").unlink()  # older versions wrote none
    assert torch.is_tensor(next(iter(load_state(file)[0].params.values())))
    assert fedlora.load_run(tmp_path / "run").notes == ()
    assert fedlora.run(chosen, tmp_path / "run").rounds == 2

"""Runs that start from an adapter: a finished run's, or one of ``peft``."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures.tiny import experiment, tiny_world, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import fedlora
from fedlora.core.errors import CheckpointError, ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.tasks.models.fingerprints import adapter_digest

world = pytest.fixture(scope="module")(tiny_world)
POOLED = 'task={kind="text_classification", pooling="mean"}'


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    fedlora.run(experiment(world, rounds=2), world / "trained")
    return world / "trained"


def start(world: Path, folder: Path, adapter: Path, *settings: str, method: str = "lora") -> fedlora.Result:
    return fedlora.run(experiment(world, method, f'init_from="{adapter}"', *settings, rounds=1), folder)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["method.rank=6"],
        ["method.alpha=32.0"],
        ["method.up.sparsify={kind='top_k', density=0.5}", "method.down.reference='init'", "method.memory='init'"],
    ],
    ids=["same", "larger rank", "other scale", "links relative to the init"],
)
def test_a_run_starts_where_another_ended(world: Path, tmp_path: Path, trained: Path, settings: list[str]) -> None:
    ended = json.loads((trained / "result.json").read_text())["after"]
    result = start(world, tmp_path, trained, *settings)
    assert result.before["loss"] == pytest.approx(ended["loss"], rel=1e-4)
    assert result.rows[1].loss < ended["loss"] + 0.1
    adapter = start(world, tmp_path / "other", trained / "adapter", *settings)
    assert adapter.before == result.before


def test_clients_of_a_sparse_downlink_start_near_the_adapter(world: Path, tmp_path: Path, trained: Path) -> None:
    ended = json.loads((trained / "result.json").read_text())["after"]
    with pytest.raises(ConfigError, match="would mix the adapter of init_from with random values"):
        start(world, tmp_path / "init", trained, method="flasc")
    zero = start(world, tmp_path / "zero", trained, "method.reference='zero'", method="flasc")
    whole = start(world, tmp_path / "whole", trained, "method.down=1.0", method="flasc")
    assert zero.before["dense_loss"] == whole.before["loss"] == pytest.approx(ended["loss"], rel=1e-4)


def test_a_pooled_classifier_with_its_head(world: Path, tmp_path: Path) -> None:
    first = fedlora.run(experiment(world, "lora", POOLED, rounds=2), tmp_path / "first")
    result = start(world, tmp_path / "second", tmp_path / "first", POOLED)
    assert result.before["loss"] == pytest.approx(first.after["loss"], rel=1e-4)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_the_classes_of_a_head_are_put_in_the_order_of_the_task(world: Path, tmp_path: Path, pooling: str) -> None:
    pooled = f"task.pooling={pooling}"
    first = fedlora.run(experiment(world, "lora", pooled, rounds=2), tmp_path / "first")
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        numbers = {"red": 0, "blue": 1, "green": 2}
        others = [{**row, "label": numbers[row["label"]], "label_name": row["label"]} for row in rows]
        write_rows(tmp_path / f"{name}.jsonl", others)
    data = [f"data.{name}='{tmp_path / name}.jsonl'" for name in ("train", "test")]
    second = start(world, tmp_path / "second", tmp_path / "first", pooled, *data)
    assert second.before["loss"] == pytest.approx(first.after["loss"], rel=1e-4)
    adapter = tmp_path / "named"
    shutil.copytree(tmp_path / "first" / "adapter", adapter, ignore=shutil.ignore_patterns("digests.json"))
    (adapter / "id2label.json").write_text(json.dumps({"0": "blau", "1": "grün", "2": "rot"}))
    other = start(world, tmp_path / "other", adapter, pooled)
    assert other.before["loss"] == pytest.approx(first.after["loss"], rel=1e-4)
    assert any("is of other classes (blau, grün, rot, ...)" in note for note in other.rows[0].warnings)
    (adapter / "id2label.json").write_text("[")
    with pytest.raises(ConfigError, match=r"id2label\.json cannot be read"):
        start(world, tmp_path / "broken", adapter, pooled)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_head_with_another_number_of_classes_is_left_out(world: Path, tmp_path: Path, pooling: str) -> None:
    pooled = f"task.pooling={pooling}"
    fedlora.run(experiment(world, "lora", pooled, rounds=2), tmp_path / "first")
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        others = [row for row in rows if row["label"] != "red"]
        write_rows(tmp_path / f"{name}.jsonl", others)
    data = [f"data.{name}='{tmp_path / name}.jsonl'" for name in ("train", "test")]
    second = start(world, tmp_path / "second", tmp_path / "first", pooled, *data)
    (said,) = [note for note in second.rows[0].warnings if ".weight" in note]
    assert said.startswith("the head starts fresh in ")
    assert said.endswith("first/adapter and (2, 32) here")


def test_an_adapter_of_peft(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=3)
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft against this version of transformers
        adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(str(tmp_path / "adapter"))  # type: ignore[arg-type]
    start(world, tmp_path / "run", tmp_path / "adapter", "method.targets=['query', 'value']", "method.server.lr=0.0001")
    latest = RunFolder(tmp_path / "run").latest()
    assert latest is not None
    given = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query"
    factors = (given[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    b, a = (latest[0].params[f"{name}.lora_{side}"] for side in "BA")
    left, right = factors
    torch.testing.assert_close(16 / 4 * b @ a, 8 / 2**0.5 * left @ right, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        latest[0].params["classifier.weight"], given["base_model.model.classifier.weight"], atol=1e-4, rtol=1e-3
    )


def changed(trained: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(trained / "adapter", folder, ignore=shutil.ignore_patterns("digests.json"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def test_an_initialisation_that_leaves_the_base_as_it_was_is_read(world: Path, tmp_path: Path, trained: Path) -> None:
    plain = start(world, tmp_path / "plain", trained)
    assert (
        start(world, tmp_path / "run", changed(trained, tmp_path / "eva", init_lora_weights="eva")).before
        == plain.before
    )


def test_what_cannot_be_started_from(world: Path, tmp_path: Path, trained: Path) -> None:
    def refused(adapter: Path, *settings: str, method: str = "lora") -> str:
        with pytest.raises(ConfigError) as error:
            start(world, tmp_path / "run", adapter, *settings, method=method)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "has no adapter_config.json, and no finished run's adapter" in refused(world / "bert")
    assert "rank 4, and method.rank = 2 is too small" in refused(trained, "method.rank=2")
    assert "which this run does not train" in refused(trained, "method.targets=['query']")
    assert "starts from an SVD: use `lora`" in refused(trained, method="federa")
    assert "the first phase trains something else" in refused(trained, method="bitfit")
    assert "with DoRA, and this run has tuning.dora = false" in refused(
        changed(trained, tmp_path / "dora", use_dora=True)
    )
    for init in ("pissa", "pissa_niter_4", "olora", "CorDA"):
        adapter = changed(trained, tmp_path / init, init_lora_weights=init)
        assert "belongs to a base that `peft` edits" in refused(adapter)
    assert "of the kind IA3" in refused(changed(trained, tmp_path / "ia3", peft_type="IA3"))
    broken = changed(trained, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    assert "adapters are read in the format safetensors" in refused(broken)
    other = changed(trained, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: torch.zeros(4, 7) if "lora_A" in name else one for name, one in tensors.items()},
        other / "adapter_model.safetensors",
    )
    assert "but the model has (4, " in refused(other)
    fedlora.run(experiment(world, "full", rounds=1), tmp_path / "full")
    assert f"set model.path to {tmp_path / 'full' / 'model'} instead" in refused(tmp_path / "full")


def test_configurations_without_it_keep_their_digest() -> None:
    from fedlora import config

    assert "init_from" not in config.resolved(fedlora.Experiment())


def test_another_adapter_in_its_place_is_named(world: Path, tmp_path: Path, trained: Path) -> None:
    folder = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    chosen = experiment(world, "lora", f'init_from="{folder}"', rounds=2)
    fedlora.run(chosen, tmp_path / "run", until=1)
    recorded = json.loads((tmp_path / "run" / "manifest.json").read_text())["fingerprints"]["adapter"]
    assert adapter_digest(folder) == adapter_digest(trained) == {"adapter": recorded}
    (folder / "digests.json").unlink()
    file = folder / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="the adapter of init_from has changed since the checkpoint"):
        fedlora.run(chosen, tmp_path / "run")
    # what a run started from is in its checkpoint
    shutil.rmtree(folder)
    assert fedlora.run(chosen, tmp_path / "run").rounds == 2

"""Model cards of exported folders: metadata that the Hub reads, honest words, and text that loads what is there."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import COLOURS, experiment, save_model, tiny_world
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

import fedlora
from fedlora import config
from fedlora.runs.card import model_card
from fedlora.runs.partition import partition_record
from fedlora.tasks import Hub, Model, Sites

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    (world / "bert" / "README.md").write_text("---\nlicense: mit\n---\n")
    fedlora.run(experiment(world, "federa"), world / "run")
    return world / "run"


def card_of(folder: Path) -> ModelCard:
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert str(card) == text
    return card


@pytest.mark.parametrize("merge", [False, True])
def test_the_card_names_base_method_figures_and_costs(run: Path, tmp_path: Path, merge: bool) -> None:
    fedlora.load_run(run).export(tmp_path / "out", merge=merge)
    card, result = card_of(tmp_path / "out"), json.loads((run / "result.json").read_text())
    assert {one.metric_name: one.metric_value for one in card.data.eval_results} == result["after"]
    assert {one.task_type for one in card.data.eval_results} == {"text-classification"} == {card.data.pipeline_tag}
    assert card.data.library_name == ("transformers" if merge else "peft")
    assert card.data.tags == ["fedlora", "federated-learning", "federa"]
    assert card.data.license == "mit"
    assert card.data.base_model is None  # a folder's name is no hub id
    assert "`bert` is the name of a local folder or file, not a hub id" in card.text
    assert f"| accuracy | {result['after']['accuracy']:.4f} |" in card.text
    assert "Method `federa`, tuning `lora`, 3 rounds, 3 of 9 clients per round, partition `iid`, seed 0." in card.text
    assert "simulation: the training rows were divided among 9 clients" in card.text
    down, up = (sum(result[way].values()) for way in ("down_bytes", "up_bytes"))
    assert f"Sent in all: {down:,} bytes to clients, {up:,} bytes from clients." in card.text
    assert "No differential privacy" in card.text
    assert ("PeftModel.from_pretrained" in card.text) != merge


def test_a_second_export_has_the_same_card(run: Path, tmp_path: Path) -> None:
    fedlora.load_run(run).export(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (run / "adapter" / "README.md").read_bytes()


def test_the_text_of_a_card_loads_the_adapter_with_the_names_of_its_classes(
    world: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    (source,) = re.findall(r"```python\n(.*?)```", card_of(run / "adapter").text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(source.replace("THIS FOLDER", str(run / "adapter")), found)
    model, trained = found["model"].eval(), fedlora.load_run(run)
    assert model.config.id2label == dict(enumerate(COLOURS))
    assert model.config.label2id == {name: number for number, name in enumerate(COLOURS)}
    batch = trained.task.tokenizer("red w1 w2", return_tensors="pt")  # type: ignore[attr-defined]
    with torch.no_grad():
        shares = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(1)[0]
    (ours,) = trained.predict(["red w1 w2"])
    for number, name in model.config.id2label.items():
        assert float(shares[number]) == pytest.approx(ours[name], abs=1e-4)


def test_the_text_of_a_decoder_s_card_names_the_padding_that_its_configuration_lacks(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    save_model(world / "gpt2", "gpt2")
    kept = json.loads((world / "gpt2" / "config.json").read_text())
    (world / "gpt2" / "config.json").write_text(json.dumps({**kept, "pad_token_id": None}))
    fedlora.run(experiment(world, "lora", "model.path=gpt2", f"root={world}", rounds=1), tmp_path / "run")
    (source,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "run" / "adapter").text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(source.replace("THIS FOLDER", str(tmp_path / "run" / "adapter")), found)
    trained, texts = fedlora.load_run(tmp_path / "run"), ["red w1 w2", "w3"]
    batch = trained.task.tokenizer(texts, return_tensors="pt", padding=True)  # type: ignore[attr-defined]
    with torch.no_grad():
        shares = found["model"].eval()(**batch).logits.softmax(1)
    for row, ours in zip(shares, trained.predict(texts), strict=True):
        assert {name: float(row[n]) for n, name in enumerate(COLOURS)} == pytest.approx(ours, abs=1e-4)


def test_a_card_says_that_a_base_stored_in_bfloat16_was_trained_in_float32(world: Path, tmp_path: Path) -> None:
    save_model(world / "half")
    AutoModelForSequenceClassification.from_pretrained(world / "half", dtype=torch.bfloat16).save_pretrained(
        world / "half"
    )
    fedlora.run(experiment(world, "lora", "model.path=half", f"root={world}", rounds=1), tmp_path / "run")
    text = card_of(tmp_path / "run" / "adapter").text
    assert (
        'stored in bfloat16, and the weights stay in that unless `from_pretrained` is given `dtype="float32"`' in text
    )
    assert "rounded to that" in model_card(fedlora.load_run(tmp_path / "run"), merged=True)


@pytest.mark.parametrize("method", ["peft", "full", "bottleneck"])
def test_no_exported_file_holds_a_path_of_this_machine(world: Path, tmp_path: Path, method: str) -> None:
    run = tmp_path / "run"
    fedlora.run(experiment(world, method, rounds=1), run)
    (folder,) = (path for path in (run / "adapter", run / "model") if path.exists())
    if method == "peft":
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "bert"
    assert (folder / "id2label.json").exists() == (method != "full")
    for file in folder.rglob("*"):
        assert not file.is_file() or str(world).encode() not in file.read_bytes(), file
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file


@pytest.mark.parametrize("method", ["lora", "peft"])
def test_a_hub_id_for_a_local_folder_is_given_with_its_revision(world: Path, tmp_path: Path, method: str) -> None:
    named = experiment(world, method, "model.hub_id='owner/bert'", "model.revision='v1'", rounds=1)
    fedlora.run(named, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/bert", "v1")
    card = card_of(adapter)
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/bert", "adapter")
    assert 'from_pretrained("owner/bert", revision="v1"' in card.text
    assert "not a hub id" not in card.text
    again = fedlora.load_run(tmp_path / "run")
    assert again.predict(["red w1"])
    started = experiment(world, "lora", f"init_from={adapter}", rounds=1)
    if method == "lora":
        assert fedlora.run(started, tmp_path / "warm").rounds == 1


def test_a_hub_id_is_no_part_of_the_digest_and_may_be_added_later(world: Path, tmp_path: Path) -> None:
    plain, named = (experiment(world, "lora", *more, rounds=1) for more in ((), ("model.hub_id='owner/bert'",)))
    assert config.digest(plain) == config.digest(named)
    assert "hub_id" not in config.to_toml(plain)
    fedlora.run(plain, tmp_path / "run")
    longer = experiment(world, "lora", "model.hub_id='owner/bert'", rounds=2)
    fedlora.run(longer, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/bert"


def test_a_private_run_states_its_budget(world: Path, tmp_path: Path) -> None:
    noise = "method.privacy={kind='central_gaussian', clip_norm=1.0, noise_multiplier=1.0, delta=0.01}"
    fedlora.run(experiment(world, "lora", noise, rounds=1), tmp_path / "run")
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    delta = json.loads((tmp_path / "run" / "manifest.json").read_text())["privacy"]["delta"]
    text = card_of(tmp_path / "run" / "adapter").text
    stated = f"Differential privacy of clients: epsilon = {ledger[-1]['epsilon']:.3g} at delta = {delta:.3g}; the noise"
    assert stated in text
    assert "No differential privacy" not in text
    assert "Bytes sent are left out" in text
    assert "bytes from clients" not in text


def test_sites_and_a_single_client_are_no_simulation(world: Path, run: Path, tmp_path: Path) -> None:
    trained = fedlora.load_run(run)
    sites = dataclasses.replace(trained.experiment, data=Sites(test=str(world / "test.jsonl")))
    text = model_card(dataclasses.replace(trained, experiment=sites), merged=False)
    assert "The training rows stayed with 9 sites" in text
    assert "simulation" not in text
    assert "3 of 9 clients per round, seed 0" in text  # no partition, as the rows are the sites' own
    assert partition_record(sites, fedlora.prepare(trained.experiment))["scheme"] == "the sites' own rows"
    alone = dataclasses.replace(trained.experiment, mode="centralised")
    card = ModelCard(model_card(dataclasses.replace(trained, experiment=alone), merged=False))
    assert "not the result of a federation: one client held all training rows" in card.text
    assert "Sent in all" not in card.text
    assert card.data.tags == ["fedlora", "federa"]


def test_a_data_set_of_the_hub_is_named(run: Path) -> None:
    trained = fedlora.load_run(run)
    data = Hub(path="owner/rows", name="plain", revision="abc")
    card = ModelCard(
        model_card(dataclasses.replace(trained, experiment=dataclasses.replace(trained.experiment, data=data)), True)
    )
    assert card.data.datasets == ["owner/rows"]
    found = card.data.eval_results[0]
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == ("owner/rows", "plain", "test")
    assert found.dataset_revision == "abc"


def test_the_rounded_weights_of_smollm2_are_mentioned(run: Path) -> None:
    trained = fedlora.load_run(run)
    small = dataclasses.replace(trained.experiment, model=Model(path="smollm2"))
    text = model_card(dataclasses.replace(trained, experiment=small), merged=False)
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "rounded to 4 bits" in text


def test_an_unfinished_run_says_so(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "lora", rounds=2), tmp_path / "run", until=1)
    fedlora.load_run(tmp_path / "run").export(tmp_path / "out")
    card = card_of(tmp_path / "out")
    assert card.data.eval_results is None
    assert "The run is unfinished: 2 rounds were planned." in card.text


def test_a_folder_without_its_ledger_is_exported_all_the_same(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "ledger.jsonl").unlink()
    fedlora.load_run(tmp_path / "run").export(tmp_path / "out")
    assert "its bytes and its privacy budget are unknown" in card_of(tmp_path / "out").text

"""What servers ask of exported language models: the rules of vLLM's and llama.cpp's readers of adapters and models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from fixtures.tiny_language import language_world
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora
from fedlora import config

world = pytest.fixture(scope="module")(language_world)


@pytest.fixture(scope="module", params=["lora", "federa"])
def run(world: Path, request: pytest.FixtureRequest) -> Path:
    method = request.param
    experiment = config.parse(
        {
            "model": {"path": str(world / "llama")},
            "task": {"kind": "causal_lm", "block_size": 16},
            "data": {"kind": "files", "train": str(world / "texts.jsonl"), "test": str(world / "test.jsonl")},
            "clients": {"num": 2, "per_round": 2, "partition": {"kind": "iid"}},
            "method": {"kind": method, "rank": 2, "rounds": 1, "targets": "all-linear"},
        }
    )
    return fedlora.run(experiment, world / method).folder


def test_an_adapter_obeys_the_rules_of_vllm_and_of_the_converter_of_llama_cpp(world: Path, run: Path) -> None:
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    # vLLM refuses an adapter with any of these
    assert [settings[name] for name in ("modules_to_save", "use_dora", "bias")] == [None, False, "none"]
    rank, alpha = settings["r"], settings["lora_alpha"]
    assert (rank, alpha / rank) == (4 if run.name == "federa" else 2, pytest.approx(16.0 / 2))
    modules = dict(AutoModelForCausalLM.from_pretrained(world / "llama").named_modules())
    found = set()
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match, name
        linear = modules[match[1]]
        assert isinstance(linear, torch.nn.Linear)
        shape = (rank, linear.in_features) if match[2] == "A" else (linear.out_features, rank)
        assert tuple(tensor.shape) == shape
        found.add(match[1])
    assert sorted(found) == settings["target_modules"]
    # class names are of classifiers
    assert not (run / "adapter" / "id2label.json").exists()


def test_a_merged_model_is_a_folder_as_from_the_hub(world: Path, run: Path, tmp_path: Path) -> None:
    trained = fedlora.load_run(run)
    trained.export(tmp_path / "merged", merge=True)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    base = json.loads((world / "llama" / "config.json").read_text())
    assert settings == base
    assert settings["architectures"] == ["LlamaForCausalLM"]
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(world / "llama").state_dict().items()}
    assert {*load_file(tmp_path / "merged" / "model.safetensors")} <= names
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("w1 w2 w3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = trained.workspace.model.eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, ours, atol=1e-4, rtol=0)

"""What a run leaves: adapters that ``peft`` loads onto the original base, and merged models that need nothing."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.more import some_of
from fixtures.tiny import COLOURS, contents, document, experiment, save_model, tiny_world
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedlora
from fedlora.config import parse
from fedlora.core.errors import ConfigError

FAMILIES = ("bert", "gpt2", "distilbert", "albert")
ADAPTERS = ("lora", "flasc", "federa", "slora")
MERGED = (*ADAPTERS, "full", "bitfit", "head_only", "fedex", "flora")
# every method on one family, and what a family stores in its own way: transposed matrices, and shared ones
SOME = {
    *product(["bert"], ADAPTERS),
    ("gpt2", "slora"),
    ("gpt2", "federa"),
    ("albert", "slora"),
    ("distilbert", "flasc"),
}
SOME_MERGED = {
    *product(["bert"], MERGED),
    ("gpt2", "fedex"),
    ("gpt2", "flora"),
    ("albert", "fedex"),
    ("albert", "full"),
}
TEXTS = ["red w1 w2", "w3 blue", "w4 w5 w6 green w7 green"]
world = pytest.fixture(scope="module")(tiny_world)


def run_of(world: Path, family: str, method: str, *overrides: str) -> Path:
    """The folder of a short run, made once."""
    folder = world / "runs" / "-".join([family, method, *overrides])
    if not folder.exists():
        if not (world / family).exists():
            save_model(world / family)
        # a scale that is not one shows where it is left out or put in twice
        settings = ("method.alpha=12.0",) if method in ADAPTERS else ()
        chosen = experiment(world, method, f"model.path={world / family}", *settings, *overrides)
        fedlora.run(chosen, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _models(world: Path) -> None:
    for family in FAMILIES:
        save_model(world / family, family)


def probabilities(model: nn.Module, base: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for text in TEXTS:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows.append(logits.softmax(1)[0])
    return torch.stack(rows)


def ours(run: Path) -> Tensor:
    found = fedlora.load_run(run).predict(TEXTS)
    return torch.tensor([[one[name] for name in COLOURS] for one in found])


def original(world: Path, family: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(world / family, num_labels=3)


def with_peft(world: Path, family: str, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(original(world, family), str(adapter))


@pytest.mark.parametrize(("family", "method"), some_of(product(FAMILIES, ADAPTERS), SOME))
def test_peft_on_the_original_base_says_what_the_run_says(world: Path, family: str, method: str) -> None:
    run = run_of(world, family, method)
    model = with_peft(world, family, run / "adapter")
    torch.testing.assert_close(probabilities(model, world / family), ours(run), atol=1e-4, rtol=0)
    untrained = probabilities(original(world, family), world / family)
    assert float((ours(run) - untrained).abs().max()) > 1e-3


@pytest.mark.parametrize(("family", "method"), some_of(product(FAMILIES, MERGED), {*SOME, *SOME_MERGED}))
def test_a_merged_model_says_what_the_run_says(world: Path, tmp_path: Path, family: str, method: str) -> None:
    run = run_of(world, family, method)
    fedlora.load_run(run).export(tmp_path / "merged", merge=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(probabilities(model, tmp_path / "merged"), ours(run), atol=1e-4, rtol=0)
    assert model.config.id2label == dict(enumerate(COLOURS))


MASK = {"kind": "sparse_mask", "density": 0.3}
LORA = {"kind": "lora", "rank": 4, "init": {"kind": "svd_of_delta", "fold": "rest"}}
LATER: dict[str, list[dict[str, Any]]] = {
    "full, full": [{"kind": "full"}, {"kind": "full"}],
    "full, mask": [{"kind": "full"}, MASK],
    "mask, bitfit, lora": [{**MASK, "biases": True}, {"kind": "bitfit"}, LORA],
}


@pytest.mark.parametrize("tunings", LATER.values(), ids=LATER)
def test_a_model_of_several_phases_has_the_changes_of_all(world: Path, tmp_path: Path, tunings: Any) -> None:
    """The values of a later phase start from those of earlier ones, so their change is not the whole change."""
    whole = document(world, "full")
    optimisers = {key: whole["method"][key] for key in ("local", "server")}
    phases = [{"rounds": 2, "recipe": {"tuning": tuning, **optimisers}} for tuning in tunings]
    chosen = parse({**{key: value for key, value in whole.items() if key != "method"}, "phases": phases})
    fedlora.run(chosen, tmp_path / "run")
    fedlora.load_run(tmp_path / "run").export(tmp_path / "merged", merge=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(probabilities(model, tmp_path / "merged"), ours(tmp_path / "run"), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "rank"), [("lora", 4), ("flasc", 4), ("slora", 4), ("federa", 8)])
def test_the_rank_doubles_where_the_base_lost_the_start(world: Path, method: str, rank: int) -> None:
    adapter = run_of(world, "bert", method) / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", rank, 12.0 / 4 * rank)
    assert settings["base_model_name_or_path"] == "bert"
    assert settings["modules_to_save"] == ["classifier"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"].shape == (rank, 32)


def test_a_damaged_adapter_or_model_is_named_where_it_is_read(world: Path, tmp_path: Path) -> None:
    fedlora.load_run(run_of(world, "bert", "lora")).export(tmp_path / "merged", merge=True)
    fedlora.load_run(run_of(world, "bert", "lora")).export(tmp_path / "adapter")
    for name, key in (("merged/model.safetensors", "model.path"), ("adapter/adapter_model.safetensors", "init_from")):
        file = tmp_path / name
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        chosen = experiment(world, "lora", f"{key}={file.parent}")
        with pytest.raises(ConfigError, match=f"{file} is missing or differs from what was written"):
            fedlora.run(chosen, tmp_path / "run")


def test_gpt2_says_that_its_weights_are_transposed(world: Path) -> None:
    adapter = run_of(world, "gpt2", "lora") / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_a_hand_over_with_a_fold_leaves_a_whole_model(world: Path) -> None:
    run = run_of(world, "bert", "slora", "method.fold='rest'")
    assert not (run / "adapter").exists()
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    torch.testing.assert_close(probabilities(model, run / "model"), ours(run), atol=1e-4, rtol=0)


def test_a_fold_is_no_adapter(world: Path, tmp_path: Path) -> None:
    run = run_of(world, "bert", "slora", "method.fold='rest'")
    with pytest.raises(ConfigError, match="use --merge to write the whole model"):
        fedlora.load_run(run).export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_peft_installed_is_loaded_by_peft(world: Path) -> None:
    run = run_of(world, "bert", "peft")
    model = with_peft(world, "bert", run / "adapter")
    torch.testing.assert_close(probabilities(model, world / "bert"), ours(run), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["peft", "bottleneck"])
def test_what_cannot_be_merged_is_refused(world: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError):
        fedlora.load_run(run_of(world, "bert", method)).export(tmp_path / "out", merge=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="already exists; name a new folder"):
        fedlora.load_run(run_of(world, "bert", "lora")).export(tmp_path)
    assert contents(tmp_path) == {"mine": b"precious"}


def test_bfloat16_training_leaves_a_float32_adapter_that_agrees(world: Path) -> None:
    run = run_of(world, "bert", "lora", "method.local.compute='bf16'")
    assert {tensor.dtype for tensor in load_file(run / "adapter" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    model = with_peft(world, "bert", run / "adapter")
    torch.testing.assert_close(probabilities(model, world / "bert"), ours(run), atol=2e-2, rtol=0)
    assert 'trained and evaluated with `compute = "bf16"`' in (run / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_merged_model_has_the_number_format_of_the_base_and_the_mode_of_its_folder(
    world: Path, tmp_path: Path, pooling: str
) -> None:
    half = world / "half"
    if not half.exists():
        save_model(half)
        AutoModelForSequenceClassification.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    run = tmp_path / "run"
    fedlora.run(experiment(world, "lora", f"model.path={half}", f"task.pooling={pooling}", rounds=1), run)
    fedlora.load_run(run).export(tmp_path / "merged", merge=True)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    for folder in (tmp_path / "merged", run / "adapter"):
        modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert modes == {folder.stat().st_mode & 0o666}
    assert "trained and evaluated with" not in (run / "adapter" / "README.md").read_text()

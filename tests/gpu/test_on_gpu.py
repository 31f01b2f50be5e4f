"""Runs on a GPU: the same bits twice, after a kill, and for all tunings and tasks; near those of a CPU; and memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fixtures import tiny_language
from fixtures.tiny import METHODS, document, ledger, save_model, tiny_world, write_rows
from fixtures.tiny_language import language_world
from PIL import Image

import fedlora
from fedlora import config
from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.core.devices import pick_device
from fedlora.core.errors import ConfigError
from fedlora.core.tree import Tree
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.checkpoint import load_state
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.tasks import Model
from fedlora.tasks.models.loading import load_pretrained
from fedlora.testing import equal_population
from fedlora.tuning import LoRA

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
world = pytest.fixture(scope="module")(tiny_world)
language = pytest.fixture(scope="module")(language_world)
CLOSE = {"fp32": 1e-3, "bf16": 0.1}
"""The largest distance of what a run of two rounds has learnt from that on a CPU, as a share of its norm: the order of
sums alone differs in float32; a number of bfloat16 has 8 bits, and so a rounding that goes the other way is 0.4 %."""
BASE = {"fp32": 1e-5, "bf16": 2e-2}
"""The largest difference of the loss before the first round."""


def on(device: str, root: Path, method: str, *words: str, rounds: int = 2) -> Experiment:
    return config.parse(document(root, method, *words, f"device={device}", rounds=rounds))


def params(folder: Path) -> Tree:
    return load_state(sorted((folder / "checkpoints").glob("round-*"))[-1])[0].params


def check_same(one: Path, other: Path) -> None:
    assert ledger(one) == ledger(other)
    left, right = params(one), params(other)
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- the same bits


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "flasc", "federa", "slora"])
def test_a_run_has_the_same_bits_twice(world: Path, tmp_path: Path, device: str, method: str, compute: str) -> None:
    words = (f"method.local.compute={compute}", "method.local.dropout=true")
    for name in ("one", "other"):
        fedlora.run(on(device, world, method, *words), tmp_path / name)
    check_same(tmp_path / "one", tmp_path / "other")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert (manifest["deterministic"], manifest["device"]) == (True, device)


CHILD = """
import json, os, signal, sys
import fedlora
from fedlora import config
from fedlora.runs.callbacks import Callback

class Killer(Callback):
    def row_recorded(self, row):
        if row.round == 1:
            os.kill(os.getpid(), signal.SIGKILL)

fedlora.run(config.parse(json.load(open(sys.argv[1]))), sys.argv[2], callbacks=[Killer()])
"""


@pytest.mark.parametrize("method", ["lora", "flasc"])
def test_a_killed_run_goes_on_with_the_same_bits(world: Path, tmp_path: Path, device: str, method: str) -> None:
    values = document(world, method, f"device={device}", "method.local.compute='bf16'")
    (tmp_path / "run.json").write_text(json.dumps(values))
    words = [sys.executable, "-c", CHILD, str(tmp_path / "run.json"), str(tmp_path / "killed")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert [row["round"] for row in ledger(tmp_path / "killed")] == [0, 1]
    for name in ("killed", "whole"):
        fedlora.run(config.parse(values), tmp_path / name)
    check_same(tmp_path / "killed", tmp_path / "whole")


# ---- near a CPU


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_run_is_near_that_of_a_cpu(world: Path, tmp_path: Path, device: str, compute: str) -> None:
    words = (f"method.local.compute={compute}", "method.local.dropout=false", "method.local.optimizer.kind='sgd'")
    words = (*words, "method.local.optimizer.lr=0.5")
    here, there = (fedlora.run(on(name, world, "lora", *words), tmp_path / f"on-{name}-") for name in ("cpu", device))
    assert there.before["loss"] == pytest.approx(here.before["loss"], abs=BASE[compute])
    left, right = params(here.folder), params(there.folder)
    apart = sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5
    assert apart <= CLOSE[compute] * sum(float(value.square().sum()) for value in left.values()) ** 0.5


# ---- all tunings and tasks


@pytest.mark.parametrize("method", METHODS)
def test_every_tuning_runs(world: Path, tmp_path: Path, device: str, method: str) -> None:
    result = fedlora.run(on(device, world, method, "method.local.compute='auto'"), tmp_path / "run")
    assert result.after["loss"] != result.before["loss"]


def tasks(world: Path, language: Path, root: Path) -> dict[str, dict[str, Any]]:
    words, tags = ["w1", "red", "w2"], ["O", "B-x", "O"]
    write_rows(root / "tags.jsonl", [{"tokens": words[:size], "tags": tags[:size]} for size in (2, 3) * 12])
    answer = {"text": ["w3"], "answer_start": [6]}
    asked = [{"context": "w1 w2 w3" + " w4" * (row % 3), "question": "w2 w1", "answers": answer} for row in range(24)]
    write_rows(root / "asked.jsonl", asked)
    save_model(world / "llama", "llama")
    for split, colour in ((split, colour) for split in ("train", "test") for colour in ("blue", "red")):
        folder = root / "pictures" / split / colour
        folder.mkdir(parents=True)
        for number in range(12):
            noise = np.random.default_rng([number, split == "test"]).integers(0, 99, (32, 32, 3))
            noise[..., 0 if colour == "red" else 2] += 150
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
    vit = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    own = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(own))

    def files(path: Path) -> dict[str, Any]:
        return {"kind": "files", "train": str(path), "test": str(path)}

    bert, pictures = {"path": str(world / "bert")}, str(root / "pictures")
    texts = files(world / "train.jsonl")
    return {
        "text": {"task": {"kind": "text_classification"}, "data": texts, "model": bert},
        "pooled": {"task": {"kind": "text_classification", "pooling": "mean"}, "data": texts, "model": bert},
        "decoder": {"task": {"kind": "text_classification"}, "data": texts, "model": {"path": str(world / "llama")}},
        "tags": {"task": {"kind": "token_classification"}, "data": files(root / "tags.jsonl"), "model": bert},
        "questions": {"task": {"kind": "question_answering"}, "data": files(root / "asked.jsonl"), "model": bert},
        "language": {
            "task": {"kind": "causal_lm", "block_size": 16},
            "data": files(language / "texts.jsonl"),
            "model": {"path": str(language / "llama")},
        },
        "images": {
            "task": {"kind": "image_classification", "augmentation": "crop_flip"},
            "data": {"kind": "image_folder", "path": pictures},
            "model": {"path": str(root / "vit")},
        },
    }


@pytest.mark.parametrize("kind", ["text", "pooled", "decoder", "tags", "questions", "language", "images"])
def test_every_task_runs(world: Path, language: Path, tmp_path: Path, device: str, kind: str) -> None:
    values = document(world, "lora", f"device={device}", "method.local.compute='auto'", "clients.num=3", rounds=2)
    values |= tasks(world, language, tmp_path)[kind]
    for name in ("one", "other"):
        result = fedlora.run(config.parse(values), tmp_path / name)
        assert result.after["loss"] != result.before["loss"]
    check_same(tmp_path / "one", tmp_path / "other")


# ---- quantised bases


@pytest.mark.parametrize("load", ["8bit", "4bit", "4bit_double"])
def test_adapters_train_on_a_quantised_base(language: Path, tmp_path: Path, device: str, load: str) -> None:
    pytest.importorskip("bitsandbytes")
    if device == "cpu" and load != "8bit":
        pytest.skip("in evaluation mode, 4-bit products have no gradients on a CPU")
    values = document(language, "lora", f"device={device}", "method.local.compute='bf16'", "clients.num=3", rounds=2)
    files = {"kind": "files", "train": str(language / "texts.jsonl"), "test": str(language / "texts.jsonl")}
    values |= {"task": {"kind": "causal_lm", "block_size": 16}, "data": files}
    values["model"] = {"path": str(language / "llama"), "load": load}
    result = fedlora.run(config.parse(values), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]


# ---- memory, and devices by number


def test_loading_takes_no_more_than_the_rounded_weights(tmp_path: Path, device: str) -> None:
    if device == "cpu":
        pytest.skip("tests/tasks/test_rounded.py measures the host")
    settings = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=1024, num_hidden_layers=8, num_attention_heads=8, intermediate_size=4096
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    num = sum(value.numel() for value in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded, _ = load_pretrained(
        "AutoModelForCausalLM", Model(path=str(tmp_path)), 0, torch.device(device), fresh_head=False, compute="bf16"
    )
    assert {value.device.type for value in loaded.parameters()} == {"cuda"}
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * 2 * num


@pytest.mark.parametrize("dropout", [True, False])
def test_checkpointing_saves_memory(language: Path, device: str, dropout: bool) -> None:
    if device == "cpu":
        pytest.skip("for a GPU")
    peaks = []
    for twice in (False, True):
        model = Model(path=str(language / "llama"), gradient_checkpointing=twice)
        prepared = tiny_language.prepare(language, block_size=16)
        prepared._model = model
        local = Local(optimizer=Sgd(lr=0.1), batch_size=64, max_steps=2, epochs=64, dropout=dropout)
        workspace, recipe = Workspace(prepared, 0, pick_device(device)), Recipe(tuning=LoRA(rank=2), local=local)
        state, _ = open_phase(workspace, 0, recipe, 0, 0, None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        population = equal_population(prepared.num_examples("train"), 1)
        run_round(recipe, state, (0,), Serial(workspace, population), seed=0, rounds=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0]


def test_a_device_has_a_number(world: Path, tmp_path: Path, device: str) -> None:
    if device == "cpu":
        pytest.skip("for a GPU")
    result = fedlora.run(on("cuda:0", world, "lora"), tmp_path / "run")
    assert json.loads((result.folder / "manifest.json").read_text())["device"] == "cuda:0"
    with pytest.raises(ConfigError, match="numbered from 0"):
        fedlora.run(on("cuda:99", world, "lora"), tmp_path / "absent")

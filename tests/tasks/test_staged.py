"""Batches on their way to a device; the device is simulated."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fixtures import tiny_language
from fixtures.simulated import SYNCS, Remote, simulated_device
from fixtures.tiny import save_model, tiny_world, write_rows
from fixtures.tiny_language import language_world
from torch import nn
from torch.overrides import TorchFunctionMode

from fedlora.client.workspace import Workspace
from fedlora.core.state import named_seed
from fedlora.engines import Serial
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.tasks import Files, Model, QuestionAnswering, TextClassification, TokenClassification, text
from fedlora.tasks.base import Prepared
from fedlora.tasks.lm import tokens_out
from fedlora.tasks.models import staged
from fedlora.testing import equal_population
from fedlora.tuning import LoRA

CPU = torch.device("cpu")
world = pytest.fixture(scope="module")(tiny_world)
language = pytest.fixture(scope="module")(language_world)


@pytest.fixture(scope="module", autouse=True)
def _more(world: Path) -> None:
    save_model(world / "llama", "llama")
    tags = [
        {"tokens": ["w1", "red", "w2"][: 2 + row % 2], "tags": ["O", "B-x", "O"][: 2 + row % 2]} for row in range(16)
    ]
    write_rows(world / "tags.jsonl", tags)
    answer = {"text": ["w3"], "answer_start": [6]}
    asked = [{"context": "w1 w2 w3" + " w4" * (row % 3), "question": "w2 w1", "answers": answer} for row in range(16)]
    write_rows(world / "asked.jsonl", asked)


def prepared(kind: str, world: Path, language: Path) -> Prepared:
    if kind == "language":
        return tiny_language.prepare(language, block_size=8)
    family, task, name = {
        "text": ("bert", TextClassification(), "train"),
        "pooled": ("bert", TextClassification(pooling="mean"), "train"),
        "decoder": ("llama", TextClassification(), "train"),
        "tags": ("bert", TokenClassification(), "tags"),
        "questions": ("bert", QuestionAnswering(), "asked"),
    }[kind]
    rows = str(world / f"{name}.jsonl")
    files = Files(train=rows, test=rows)
    # attention for CPUs is not used on a device
    return task.prepare(Model(path=str(world / family), attention="sdpa"), files)  # type: ignore[attr-defined]


KINDS = ("text", "pooled", "decoder", "tags", "questions", "language")


# ---- what is copied


@pytest.mark.parametrize("kind", KINDS)
def test_batches_arrive_as_they_are_on_the_host(
    kind: str, world: Path, language: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepared(kind, world, language)
    parts = [np.arange(first, first + 3) for first in (0, 3, 6)]
    hosts = [task.batch(part, CPU) for part in parts]
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(hosts, task.batches(parts, CPU), strict=True) for name in b
    )
    for most in (1, staged.STAGED_BYTES):
        monkeypatch.setattr(staged, "STAGED_BYTES", most)
        with simulated_device() as device:
            SYNCS.clear()
            there = list(task.batches(parts, device))
            assert not SYNCS
        for host, found in zip(hosts, there, strict=True):
            assert all(isinstance(value, Remote) for value in found.values())
            # a decoder's tokens do not see the padding on their right
            idle = {"attention_mask"} if kind == "language" or bool(host["attention_mask"].all()) else set()
            assert host.keys() - idle == found.keys() - {staged.LEARNT}
            assert all(torch.equal(found[name].held, host[name]) for name in host.keys() - idle)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("device", "waits"), [("mps", True), ("xpu", False)])
def test_on_an_apple_gpu_the_host_waits_for_a_copy(device: str, waits: bool) -> None:
    class Value:
        def to(self, device: torch.device, non_blocking: bool) -> bool:
            return not non_blocking

    assert staged.sent(Value(), torch.device(device)) is waits  # type: ignore[arg-type,comparison-overlap]


def test_a_mask_of_ones_is_left_out() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    assert staged.without_idle_mask({"input_ids": ids, "attention_mask": ids}).keys() == {"input_ids"}
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert staged.without_idle_mask(padded) is padded


class NoFloatsAdded(TorchFunctionMode):
    """Refuses what CUDA has no deterministic kernel for: running sums of numbers that are no integers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name != "cumsum" or not args[0].is_floating_point(), "running sums of floats"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["CausalLM", "SequenceClassification"])
def test_a_model_that_counts_its_mask_keeps_it(
    world: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    settings = transformers.OPTConfig(
        vocab_size=64, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, **sizes
    )
    shutil.copytree(language / "llama", tmp_path / "opt", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    getattr(transformers, f"AutoModelFor{head}").from_config(settings).save_pretrained(tmp_path / "opt")
    files = Files(train=str(world / "train.jsonl"), test=str(world / "train.jsonl"))
    task: Any = (
        tiny_language.prepare(language, str(tmp_path / "opt"))
        if head == "CausalLM"
        else TextClassification(max_length=5).prepare(Model(path=str(tmp_path / "opt")), files)
    )
    model = task.load_model(0, "fp32", CPU)[0].eval()
    host = task.host_batch(np.arange(1), "train")
    expected = task.loss(model, host)
    for module in (text, tokens_out):  # on a device batches stay whole
        monkeypatch.setattr(module, "by_length", lambda batch: [batch])
    with NoFloatsAdded():
        found = task.loss(model, task.for_device(host))
    torch.testing.assert_close(found, expected)


def test_learnt_places_are_those_with_a_label() -> None:
    labels = torch.tensor([[7, 5, tokens_out.IGNORED], [7, tokens_out.IGNORED, 6]])
    listed = (labels[:, 1:] != tokens_out.IGNORED).flatten().nonzero().flatten()
    found = staged.learnt_places({"labels": labels, staged.LEARNT: listed}, 2)
    assert found is not None
    assert [value.tolist() for value in found] == [[0, 1], [0, 1]]
    assert staged.learnt_places({"labels": labels}, 2) is None


# ---- how often the host waits


class Elsewhere:
    """Gives a task a model that was loaded on the CPU before the simulation began."""

    def __init__(self, task: Prepared) -> None:
        self.model, self.head = task.load_model(named_seed(0, "head"), "fp32", CPU)
        staged.allow_no_mask(self.model)

    def __call__(self, seed: int, compute: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        return copy.deepcopy(self.model).to(device), self.head


def turn(task: Prepared, device: torch.device, steps: int, **local: Any) -> Any:
    own = Local(optimizer=Sgd(lr=0.1), batch_size=4, max_steps=steps, epochs=9, clip_norm=1.0, **local)
    recipe = Recipe(tuning=LoRA(rank=2), local=own)
    workspace = Workspace(task, 0, device)
    state, _ = open_phase(workspace, 0, recipe, 0, 0, None)
    SYNCS.clear()
    return run_round(recipe, state, (0,), Serial(workspace, equal_population(8, 1)), seed=0, rounds=1)[0].params


def waited(task: Prepared, **local: Any) -> float:
    """How often the host waits in one more step."""
    counts = []
    for steps in (2, 6):
        with simulated_device() as device:
            turn(task, device, steps, **local)
            counts.append(SYNCS.total())
    return (counts[1] - counts[0]) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_at_most_once_a_step(
    kind: str, world: Path, language: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepared(kind, world, language)
    here = turn(task, CPU, 2)
    monkeypatch.setattr(task, "load_model", Elsewhere(task))
    with simulated_device() as device:
        there = turn(task, device, 2)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, atol=1e-5, rtol=0, msg=name)
    # transformers looks twice at a padded mask of a decoder
    assert waited(task) <= (2 if kind == "decoder" else 1), SYNCS


def test_the_host_waits_once_for_a_clipped_example(
    world: Path, language: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepared("text", world, language)
    monkeypatch.setattr(task, "load_model", Elsewhere(task))
    noise = ExampleNoise(clip_norm=1.0, noise_multiplier=0.0, seed=1)
    assert (
        waited(task, example_privacy=noise) <= 2 * 8 + 2 * 14
    )  # a mask and a norm of each example, noise of each tensor

"""How a model is held: attention, precision, and activations computed twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import COLOURS, experiment, ledger, save_model, tiny_world, write_rows
from torch import nn

import fedlora
from fedlora.core.errors import ConfigError
from fedlora.tasks import Files, Model, TextClassification
from fedlora.tasks.models.cpu import ATTENTION
from fedlora.tasks.models.loading import load_pretrained
from fedlora.tasks.text import PreparedText
from fedlora.testing import tiny_model

CPU = torch.device("cpu")
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module", autouse=True)
def _models(world: Path) -> None:
    for family in ("gpt2", "llama"):
        save_model(world / family, family)
    # without dropout a model in training mode computes what it computes in evaluation mode
    save_model(world / "still")
    file = world / "still" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), **still}))


def prepare(world: Path, family: str = "bert", **model: Any) -> PreparedText:
    files = Files(train=str(world / "train.jsonl"), test=str(world / "test.jsonl"))
    task = TextClassification().prepare(Model(path=str(world / family), **model), files)
    assert isinstance(task, PreparedText)
    return task


def gradients(task: PreparedText) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a training step, and how often the first product of the first block was computed."""
    model = task.load_model(0, "fp32", CPU)[0].train()
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    calls = []
    leaf = next(module for module in blocks[0].modules() if not list(module.children()))
    leaf.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # one length, so that the batch is one group
        rows = np.flatnonzero(task._tokens["train"].lengths(np.arange(72)) == 8)[:4]
        task.loss(model, task.batch(rows, CPU)).backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}, len(calls)


# ---- gradient checkpointing


@pytest.mark.parametrize("family", ["bert", "still", "gpt2", "llama"])
def test_checkpointing_computes_activations_twice_and_gradients_alike(world: Path, family: str) -> None:
    plain, once = gradients(prepare(world, family))
    saved, twice = gradients(prepare(world, family, gradient_checkpointing=True))
    assert (once, twice) == (1, 2)
    assert plain.keys() == saved.keys()
    # dropout too: the second time it draws what it drew the first time
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["still", "gpt2"])
def test_a_federation_with_checkpointing_learns_the_same(
    world: Path, tmp_path: Path, family: str, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    base = f"model.path={world / family}"
    plain = fedlora.run(experiment(world, method, base, rounds=2), tmp_path / "plain")
    saved = fedlora.run(
        experiment(world, method, base, "model.gradient_checkpointing=true", rounds=2), tmp_path / "saved"
    )
    assert saved.after["loss"] != saved.before["loss"]
    assert saved.after == pytest.approx(plain.after, abs=1e-5)
    for one, other in zip(ledger(saved.folder), ledger(plain.folder), strict=True):
        assert one["update_norm"] == pytest.approx(other["update_norm"], rel=1e-4)
        assert one["cohort"] == other["cohort"]
    assert capfd.readouterr() == ("", "")


def test_a_model_that_cannot_compute_twice_is_refused(tmp_path: Path) -> None:
    tiny_model("mobilenet_v2").save_pretrained(str(tmp_path / "mobilenet"))
    model = Model(path=str(tmp_path / "mobilenet"), gradient_checkpointing=True)
    with pytest.raises(ConfigError, match=r"cannot compute its activations twice .*set model.gradient_checkpointing ="):
        load_pretrained("AutoModelForImageClassification", model, 0, CPU)


# ---- attention


@pytest.mark.parametrize(
    ("setting", "kernel"), [("auto", ATTENTION), ("eager", "eager"), ("sdpa", "sdpa")], ids=["auto", "eager", "sdpa"]
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_kernel_is_the_one_asked_for_and_none_changes_the_answer(
    world: Path, family: str, setting: Any, kernel: str
) -> None:
    task, reference = prepare(world, family, attention=setting), prepare(world, family, attention="eager")
    model: Any = task.load_model(0, "fp32", CPU)[0].eval()
    assert model.config._attn_implementation == kernel
    with torch.no_grad():
        found = task.logits(model, np.arange(24), "test", CPU)
        expected = reference.logits(reference.load_model(0, "fp32", CPU)[0].eval(), np.arange(24), "test", CPU)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_a_kernel_that_is_not_installed(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"FlashAttention2 .* be installed\): install what is missing, or"):
        prepare(world, attention="flash_attention_2").load_model(0, "fp32", CPU)


# ---- precision


@pytest.mark.parametrize("load", ["8bit", "4bit"])
def test_matrices_in_few_bits_need_a_package(world: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError) as error:
        prepare(world, load=load).load_model(0, "fp32", CPU)
    assert str(error.value) == (
        f"model.load = '{load}' needs the package bitsandbytes, which is not installed: pip install bitsandbytes, or "
        "set model.load = 'full'"
    )


def test_what_a_model_is_told_of_its_problem(world: Path) -> None:
    names = {"single": list(COLOURS), "multi": list(COLOURS), "regression": []}
    found = {}
    for problem, classes in names.items():
        task = TextClassification(problem=problem).restore(Model(path=str(world / "bert")), classes)  # type: ignore[arg-type]
        config: Any = task.load_model(0, "fp32", CPU)[0].config
        found[problem] = (config.problem_type, config.num_labels)
        if classes:
            assert config.id2label == dict(enumerate(COLOURS))
    assert found == {
        "single": ("single_label_classification", 3),
        "multi": ("multi_label_classification", 3),
        "regression": ("regression", 1),
    }


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 32), ("roberta", 63)])
def test_texts_longer_than_the_model_reads_are_refused(world: Path, family: str, limit: int) -> None:
    folder = save_model(world / f"short-{family}", family)
    rows = [{"text": " ".join(["w1"] * 80), "label": "red"}, {"text": "w2", "label": "blue"}]
    write_rows(world / "long.jsonl", rows)
    source = Files(train=str(world / "long.jsonl"), test=str(world / "long.jsonl"))
    task = TextClassification(max_length=128).prepare(Model(path=str(folder)), source)
    with pytest.raises(ConfigError, match=rf"sequences of 82 tokens.* reads {limit} at most"):
        task.load_model(0, "fp32", CPU)
    fitting = TextClassification(max_length=limit).prepare(Model(path=str(folder)), source)
    model, _ = fitting.load_model(0, "fp32", CPU)
    assert torch.isfinite(fitting.loss(model, fitting.batch(np.arange(2), CPU)))

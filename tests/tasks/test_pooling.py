"""A linear classifier over pooled token states: what it computes, what is trained, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import experiment, ledger, save_model, tiny_world
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, XLNetConfig

import fedlora
from fedlora.core.errors import ConfigError
from fedlora.tasks import Files, Model, TextClassification
from fedlora.tasks.models.pooled import PooledClassifier
from fedlora.tasks.text import PreparedText

CPU = torch.device("cpu")
ENCODERS = ("bert", "roberta", "distilbert", "albert", "deberta-v2", "modernbert")
POOLED = "task={kind='text_classification', pooling='mean'}"
HEAD = {"classifier.weight", "classifier.bias"}
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module", autouse=True)
def _models(world: Path) -> None:
    for family in {*ENCODERS, "gpt2", "llama", "t5"}:
        save_model(world / family, family)
    for family in ("bert", "roberta"):  # without a classifier
        save_model(world / f"bare-{family}", family)
        AutoModel.from_pretrained(world / family).save_pretrained(world / f"bare-{family}")


def prepare(world: Path, family: str = "bert", pooling: Any = "mean", **model: Any) -> PreparedText:
    files = Files(train=str(world / "train.jsonl"), test=str(world / "test.jsonl"))
    task = TextClassification(pooling=pooling).prepare(Model(path=str(world / family), **model), files)
    assert isinstance(task, PreparedText)
    return task


def load(task: PreparedText, seed: int = 0) -> tuple[PooledClassifier, frozenset[str]]:
    model, head = task.load_model(seed, "fp32", CPU)
    assert isinstance(model, PooledClassifier)
    return model, head


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ENCODERS)
def test_logits_are_linear_in_the_pooled_states(world: Path, family: str, pooling: str) -> None:
    task = prepare(world, family, pooling)
    model, head = load(task)
    backbone = AutoModel.from_pretrained(world / family)
    assert head == HEAD
    with torch.no_grad():
        for row in range(6):  # one text alone has no padding
            batch = task.batch(np.array([row]), CPU)
            length = int(batch["attention_mask"].sum())
            states = backbone.eval()(batch["input_ids"][:, :length]).last_hidden_state[0]
            expected = model.classifier(states.mean(0) if pooling == "mean" else states[0])
            found = task.logits(model.eval(), np.arange(24), "train", CPU)[row]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_parameter_that_is_there_gets_a_gradient(world: Path, family: str) -> None:
    task = prepare(world, family)
    model, _ = load(task)
    task.loss(model.train(), task.batch(np.arange(8), CPU)).backward()  # type: ignore[no-untyped-call]
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    stock = {name for name, _ in AutoModelForSequenceClassification.from_pretrained(world / family).named_parameters()}
    kept = {name for name, _ in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    assert {name for name in stock if name.startswith(prefix) and "pooler" not in name} == kept - HEAD


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_classifier_follows_from_the_seed(world: Path, family: str) -> None:
    task = prepare(world, f"bare-{family}")
    first, again, other = (load(task, seed)[0].classifier.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.01 < float(first.detach().std()) < 0.04


def test_the_classifier_of_bert_is_that_of_the_stock_class(world: Path) -> None:
    stock: Any = prepare(world, "bare-bert", "model").load_model(3, "fp32", CPU)[0]
    assert torch.equal(load(prepare(world, "bare-bert"), 3)[0].classifier.weight, stock.classifier.weight)


@pytest.mark.parametrize(
    ("family", "why"),
    [("gpt2", "reads from left to right"), ("llama", "reads from left to right"), ("t5", "no encoder")],
)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_what_is_no_encoder_is_refused(world: Path, family: str, why: str, pooling: str) -> None:
    task = prepare(world, family, pooling)
    with pytest.raises(ConfigError, match=rf"task.pooling = '{pooling}' .* {why}.*; set task.pooling = 'model'"):
        task.load_model(0, "fp32", CPU)


def test_a_class_that_would_read_padding_is_left_for_the_mean(world: Path) -> None:
    save_model(world / "xlnet", "gpt2")
    settings = {"vocab_size": 64, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    AutoModelForSequenceClassification.from_config(XLNetConfig(**settings)).save_pretrained(world / "xlnet")
    task = prepare(world, "xlnet", "auto")
    model = load(task)[0].eval()
    texts = ["red w1 w2", "blue " * 20]
    with torch.no_grad():
        (alone,), (beside, _) = task.predict(model, texts[:1], CPU), task.predict(model, texts, CPU)
    assert alone == pytest.approx(beside, abs=1e-5)
    with pytest.raises(ConfigError, match=r"which is padding in a batch.*set task.pooling = 'mean'"):
        prepare(world, "xlnet", "model")


def test_dropout_is_that_of_the_family(world: Path) -> None:
    for family in ENCODERS:
        rate = load(prepare(world, family))[0].dropout.p
        stock = AutoModelForSequenceClassification.from_pretrained(world / family)
        rates = {
            module.p for name, module in stock.named_modules() if isinstance(module, nn.Dropout) and "." not in name
        }
        assert not rates or rates == {rate}, family


@pytest.mark.parametrize("method", ["lora", "flasc", "full", "bitfit", "slora", "bottleneck", "peft", "head_only"])
def test_a_federation_learns_and_its_run_predicts(world: Path, tmp_path: Path, method: str) -> None:
    chosen = experiment(world, method, POOLED)
    result = fedlora.run(chosen, tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert len(fedlora.load_run(tmp_path / "run").predict(["red w1", "w2 blue"])) == 2


def test_checkpointing_learns_the_same(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = fedlora.run(experiment(world, "lora", POOLED, rounds=2), tmp_path / "plain")
    chosen = experiment(world, "lora", POOLED, "model.gradient_checkpointing=true", rounds=2)
    saved = fedlora.run(chosen, tmp_path / "saved")
    assert saved.after == pytest.approx(plain.after, abs=1e-5)
    assert ledger(saved.folder)[-1]["update_norm"] == pytest.approx(ledger(plain.folder)[-1]["update_norm"], rel=1e-4)
    assert capfd.readouterr() == ("", "")

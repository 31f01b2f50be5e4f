"""Exports of a pooled classifier: ``AutoModel`` loads the backbone, ``sentence-transformers`` computes the logits."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.more import some_of
from fixtures.tiny import COLOURS, contents, experiment, save_model, tiny_world, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import fedlora
from fedlora.tasks.models.pooled import PooledClassifier, pool

TEXTS = ["red w1 w2", "w3 blue", "w4 w5 w6 green w7 green"]
LORA = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "target_modules": ".*query"}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(autouse=True)
def _beside_the_bases(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters name a base in a local folder by the folder's name, which is found from its parent."""
    monkeypatch.chdir(world)


@pytest.fixture(scope="module", autouse=True)
def _models(world: Path) -> None:
    """Checkpoints without a classifier, so that one that is not carried along shows."""
    for family in ("bert", "roberta", "modernbert"):
        AutoModel.from_pretrained(save_model(world / family, family)).save_pretrained(world / family)


def run_of(world: Path, pooling: str, method: str = "lora", *overrides: str, family: str = "bert") -> Path:
    folder = world / "runs" / "-".join([family, pooling, method, *overrides]).replace("/", "")
    if not folder.exists():
        task = f"task={{kind='text_classification', pooling='{pooling}', max_length=16}}"
        fedlora.run(experiment(world, method, f"model.path={world / family}", task, *overrides), folder)
    return folder


def ours(run: Path, texts: list[Any] | None = None) -> Tensor:
    """The logits of the run itself."""
    trained = fedlora.load_run(run)
    batch = trained.task.tokenizer(texts or TEXTS, padding=True, return_tensors="pt")  # type: ignore[attr-defined]
    with torch.no_grad():
        logits: Tensor = trained.workspace.model.eval()(**batch).logits
    return logits


def sentences(folder: Path, texts: list[Any] | None = None) -> Tensor:
    model = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    return torch.from_numpy(model.encode(texts or TEXTS))


def through_backbone(backbone: Any, folder: Path, pooling: Any) -> Tensor:
    """The logits, by hand, from ``transformers`` and the dense module's weights."""
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    with torch.no_grad():
        states = backbone.eval()(**batch).last_hidden_state
    pooled = pool(states, batch["attention_mask"], pooling)
    return pooled @ dense["linear.weight"].T + dense["linear.bias"]


POOLED, FORMS = ("bert", "roberta", "modernbert"), ("adapter", "merged")
# every two of a family, a pooling and a form
SOME = {(f, p, FORMS[(i + j) % 2]) for i, f in enumerate(POOLED) for j, p in enumerate(("mean", "cls"))}


@pytest.mark.parametrize(("family", "pooling", "form"), some_of(product(POOLED, ("mean", "cls"), FORMS), SOME))
def test_others_compute_the_logits_of_the_run(
    world: Path, tmp_path: Path, family: str, pooling: str, form: str
) -> None:
    run = run_of(world, pooling, family=family)
    folder = run / "adapter"
    if form == "merged":
        folder = tmp_path / "merged"
        fedlora.load_run(run).export(folder, merge=True)
        backbones = [AutoModel.from_pretrained(folder)]
    else:
        base = AutoModel.from_pretrained(world / family)
        backbones = [PeftModel.from_pretrained(base, str(folder)), AutoModel.from_pretrained(folder)]
    expected = ours(run)
    torch.testing.assert_close(sentences(folder), expected, atol=1e-4, rtol=0)
    for backbone in backbones:
        torch.testing.assert_close(through_backbone(backbone, folder, pooling), expected, atol=1e-4, rtol=0)
    untrained = through_backbone(AutoModel.from_pretrained(world / family), folder, pooling)
    assert float((untrained - expected).abs().max()) > 1e-3


HEADS = ("model.train_head=false", "model.head=['embeddings.LayerNorm']")
WITH_HEADS = {("lora", HEADS[0]), ("federa", HEADS[1]), ("slora", HEADS[0]), ("slora", HEADS[1]), ("peft", HEADS[1])}


@pytest.mark.parametrize(
    ("method", "override"), some_of(product(["lora", "federa", "slora", "peft"], HEADS), WITH_HEADS)
)
def test_whatever_the_head_is_the_logits_are_the_same(world: Path, method: str, override: str) -> None:
    run = run_of(world, "mean", method, override)
    torch.testing.assert_close(sentences(run / "adapter"), ours(run), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["full", "bitfit", "head_only", "fedex"])
def test_what_is_no_adapter_is_a_whole_model(world: Path, method: str) -> None:
    run = run_of(world, "mean", method)
    torch.testing.assert_close(sentences(run / "model"), ours(run), atol=1e-4, rtol=0)


def test_targets_of_peft_by_an_expression(world: Path) -> None:
    values = ", ".join(f"{key}={json.dumps(value)}" for key, value in {**LORA, "target_modules": "bert.*query"}.items())
    run = run_of(world, "mean", "peft", f"method.tuning={{kind='peft', config={{{values}}}}}")
    torch.testing.assert_close(sentences(run / "adapter"), ours(run), atol=1e-4, rtol=0)


def test_pairs_go_through_as_pairs(world: Path) -> None:
    rows = [{"text": f"w{n % 50}", "text_pair": COLOURS[n % 3], "label": COLOURS[n % 3]} for n in range(36)]
    file = write_rows(world / "pairs.jsonl", rows)
    run = run_of(world, "mean", "lora", f"data.train={file}", f"data.test={file}")
    pairs = [["w1", "red w2"], ["w3 w4 w5", "blue"]]
    torch.testing.assert_close(sentences(run / "adapter", pairs), ours(run, pairs), atol=1e-4, rtol=0)


def test_the_pooler_of_a_merged_model_is_the_pre_trained_one(world: Path, tmp_path: Path) -> None:
    fedlora.load_run(run_of(world, "mean")).export(tmp_path / "merged", merge=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged, base = (AutoModel.from_pretrained(path) for path in (tmp_path / "merged", world / "bert"))
    assert torch.equal(merged.pooler.dense.weight, base.pooler.dense.weight)
    assert merged.config.id2label == dict(enumerate(COLOURS))


def test_saving_the_backbone_leaves_the_model_as_it_was(world: Path, tmp_path: Path) -> None:
    model = fedlora.load_run(run_of(world, "mean", "full")).workspace.model
    assert isinstance(model, PooledClassifier)
    before = {name for name, _ in model.named_parameters()}
    model.save_backbone(tmp_path)
    assert {name for name, _ in model.named_parameters()} == before


def test_an_export_is_the_same_each_time(world: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        fedlora.load_run(run_of(world, "mean")).export(tmp_path / name, merge=True)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("merge", [False, True])
def test_the_model_card_says_how_to_load_it(world: Path, tmp_path: Path, merge: bool) -> None:
    fedlora.load_run(run_of(world, "mean")).export(tmp_path / "out", merge=merge)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'task.pooling = "mean"' in card
    assert "One column for each class: blue, green, red." in card
    assert "AutoModel.from_pretrained" in card
    assert 'SentenceTransformer("THIS FOLDER")' in card


def test_bottleneck_adapters_are_for_fedlora_alone(world: Path) -> None:
    run = run_of(world, "mean", "bottleneck")
    assert not (run / "adapter" / "modules.json").exists()
    assert "SentenceTransformer" not in (run / "adapter" / "README.md").read_text()


def test_predict_and_evaluate_work_as_before(world: Path) -> None:
    trained = fedlora.load_run(run_of(world, "mean"))
    found = [[one[name] for name in COLOURS] for one in trained.predict(TEXTS)]
    np.testing.assert_allclose(found, ours(run_of(world, "mean")).softmax(1), atol=1e-5)
    assert set(trained.evaluate(world / "test.jsonl").metrics) >= {"accuracy", "loss"}

"""Embeddings against a slow reference: one example at a time, without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.tiny import experiment, make_rows, save_model, tiny_world, write_rows
from torch import nn
from transformers import AutoModel, AutoTokenizer

from fedlora.config.federated_data import prepare as prepare_setting
from fedlora.core.errors import ConfigError
from fedlora.tasks import Files, Model, Prepared, TextClassification

CPU = torch.device("cpu")
world = pytest.fixture(scope="module")(tiny_world)


def prepare(folder: Path, rows: Path, **columns: str) -> Prepared:
    files = Files(train=str(rows), test=str(rows), columns=columns)
    return TextClassification(max_length=10).prepare(Model(path=str(folder)), files)


def slow(folder: Path, texts: list[tuple[str, ...]]) -> torch.Tensor:
    """The mean over each text's tokens of what ``AutoModel`` makes of it alone."""
    tokenizer, backbone = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        batch = tokenizer(*text, truncation=True, max_length=10, return_tensors="pt")
        with torch.no_grad():
            rows.append(backbone(**batch).last_hidden_state[0].mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_an_embedding_is_the_mean_over_a_texts_tokens(world: Path, family: str) -> None:
    folder = save_model(world / family, family)
    found = prepare(folder, world / "train.jsonl").embeddings("train", CPU)
    # more rows than go through the model at once, some of them cut
    assert (found.shape, found.dtype) == ((72, 32), np.float32)
    expected = slow(folder, [(row["text"],) for row in make_rows(72, 0)])
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)


def test_pairs_are_read_as_pairs(world: Path) -> None:
    rows = [{**row, "second": f"w{number} red"} for number, row in enumerate(make_rows(9, 3))]
    task = prepare(world / "bert", write_rows(world / "pairs.jsonl", rows), text_pair="second")
    expected = slow(world / "bert", [(row["text"], row["second"]) for row in rows])
    torch.testing.assert_close(torch.from_numpy(task.embeddings("test", CPU)), expected, atol=1e-5, rtol=1e-4)


def test_the_head_and_its_seed_do_not_matter(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = prepare(world / "bert", world / "test.jsonl")
    expected = task.embeddings("train", CPU)
    original = type(task).load_model

    def other(self: Prepared, seed: int, compute: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        return original(self, seed + 1, compute, device)

    monkeypatch.setattr(type(task), "load_model", other)
    assert np.array_equal(task.embeddings("train", CPU), expected)


def test_a_model_without_a_backbone_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CLIP's classifier of images, whose class names a module that it lacks."""
    task = prepare(world / "bert", world / "test.jsonl")
    model, head = task.load_model(0, "fp32", CPU)
    model.base_model_prefix = "clip"  # type: ignore[assignment]
    monkeypatch.setattr(type(task), "load_model", lambda *_: (model, head))
    with pytest.raises(ConfigError, match="has none of the name 'clip'"):
        task.embeddings("train", CPU)


@pytest.mark.parametrize("features", ["tfidf", "embeddings"])
def test_clients_may_be_skewed_by_clusters_of_like_texts(world: Path, features: str) -> None:
    skew = f"clients.skew={{kind='clusters', features='{features}', num=3}}"
    partition = "clients.partition={kind='dirichlet', alpha=0.1}"
    federated = prepare_setting(experiment(world, "lora", skew, partition, "clients.num=4"))
    assert len(set(federated.classes.numbers.tolist())) == 3
    assert len(federated.population) == 4

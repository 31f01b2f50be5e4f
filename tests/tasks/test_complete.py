"""Weights that are not those of ``config.json``, which ``transformers`` would fill up with random values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import experiment, ledger, save_model, tiny_world
from safetensors.torch import load_file, save_file
from torch import Tensor

import fedlora
from fedlora.core.errors import ConfigError
from fedlora.tasks import Model
from fedlora.tasks.models.complete import NOTES
from fedlora.tasks.models.loading import load_pretrained

world = pytest.fixture(scope="module")(tiny_world)
Weights = Mapping[str, Tensor]


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def variant(
    folder: Path, family: str = "bert", change: Callable[[Weights], Weights] = lambda same: same, **settings: Any
) -> Path:
    save_model(folder, family)
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    save_file({name: value.clone() for name, value in change(load_file(weights)).items()}, weights, {"format": "pt"})
    return folder


def loaded(folder: Path, head: str = "SequenceClassification") -> tuple[torch.nn.Module, frozenset[str]]:
    auto = f"AutoModelFor{head}"
    return load_pretrained(auto, Model(path=str(folder)), 0, torch.device("cpu"), fresh_head=head != "CausalLM")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"vocab_size": 80}, r"word_embeddings.weight has the shape \(64, 32\) in the weights, but \(80, 32\) by"),
        ({"hidden_size": 64, "intermediate_size": 64}, "by the configuration: use both files of one model"),
        ({"change": lambda weights: {f"x.{name}": value for name, value in weights.items()}}, "lacks 39 of 39"),
        ({"change": without("layer.")}, "it lacks 32 of 39 parameters of the backbone"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        loaded(variant(tmp_path, **settings))


def test_an_embedding_of_another_size_is_refused_for_a_language_model_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shape \(64, 32\) in the weights, but \(96, 32\)"):
        loaded(variant(tmp_path, "llama", vocab_size=96), "CausalLM")


def test_another_number_of_classes_is_a_fresh_head_and_no_fault(tmp_path: Path) -> None:
    model, head = load_pretrained(
        "AutoModelForSequenceClassification", Model(path=str(variant(tmp_path))), 0, torch.device("cpu"),
        {"num_labels": 5},
    )  # fmt: skip
    assert head == {"classifier.weight", "classifier.bias"}
    assert getattr(model, NOTES) == ()


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"change": without("pooler")}, "lack bert.pooler.dense.weight and 1 more, which are not of a new head"),
        ({"num_hidden_layers": 1}, "and 15 more, layers for which config.json describes no place: they are not used"),
    ],
)
def test_what_weights_lack_or_hold_in_vain_is_told(tmp_path: Path, settings: dict[str, Any], note: str) -> None:
    model, _ = loaded(variant(tmp_path, **settings))
    assert note in " ".join(getattr(model, NOTES))


def test_a_part_that_a_class_leaves_out_is_no_fault(tmp_path: Path) -> None:
    model, _ = loaded(variant(tmp_path), "TokenClassification")
    assert getattr(model, NOTES) == ()


def test_a_language_model_without_its_last_matrix_says_so(tmp_path: Path) -> None:
    model, head = loaded(variant(tmp_path, "llama", without("score"), tie_word_embeddings=False), "CausalLM")
    assert head == {"lm_head.weight"}
    assert "lack lm_head.weight, which" in " ".join(getattr(model, NOTES))


def test_the_first_row_of_the_ledger_has_the_note(world: Path, tmp_path: Path) -> None:
    folder = variant(tmp_path / "model", change=without("layer.1.output.dense.weight"))
    fedlora.run(experiment(world, "lora", f"model.path={folder}", rounds=1), tmp_path / "run", until=0)
    assert "lack bert.encoder.layer.1.output.dense.weight, which" in " ".join(ledger(tmp_path / "run")[0]["warnings"])

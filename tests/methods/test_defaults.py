"""Every method learns as `fedlora new` prints it, no key of it changed but the rounds, on a cut of the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from fedlora.config import parse
from fedlora.config.federated_data import FederatedData, prepare
from fedlora.methods import METHODS
from fedlora.runs.experiment import run
from fedlora.tasks import Model

ROUNDS = 8
pytestmark = pytest.mark.slow


def document(model: Path, method: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "task": {"kind": "text_classification", "max_length": 32},
        "data": {"kind": "docstrings", "num_classes": 4, "test_fraction": 0.1},
        "clients": {"num": 60, "per_round": 5, "partition": {"kind": "dirichlet", "alpha": 1.0}},
        "evaluate": {"every": ROUNDS, "dense": False},
        "method": {"rounds": ROUNDS, **method},
    }


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of the embedded model."""
    path, folder = Model().resolve(), tmp_path_factory.mktemp("cut")
    transformers.AutoModel.from_pretrained(path, num_hidden_layers=2).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def federated(cut: Path) -> FederatedData:
    return prepare(parse(document(cut, {"kind": "lora"})))


def accuracy(cut: Path, federated: FederatedData, method: dict[str, Any], folder: Path) -> float:
    return run(parse(document(cut, method)), folder, data=federated).after["accuracy"]


@pytest.fixture(scope="module")
def head_alone(cut: Path, federated: FederatedData, tmp_path_factory: pytest.TempPathFactory) -> float:
    method = {"kind": "fedavg", "tuning": {"kind": "head_only"}}
    return accuracy(cut, federated, method, tmp_path_factory.mktemp("head"))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_not_behind_the_head_alone(
    method: str, cut: Path, federated: FederatedData, head_alone: float, tmp_path: Path
) -> None:
    assert accuracy(cut, federated, {"kind": method}, tmp_path) > head_alone - 0.02

"""Loss and metrics of each problem, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.tasks import scores

NAMES = ["a", "b", "c"]


def logits_of(*rows: list[float]) -> Tensor:
    """Logits whose softmax is ``rows``."""
    return torch.tensor(rows).log()


# ---- one class


def test_one_class() -> None:
    logits = logits_of([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5])
    found = scores.score(logits, torch.tensor([0, 1, 1, 1]), "single", NAMES)
    # a: precision 1/2, recall 1; b: precision 1, recall 1/3; c: never right
    expected = {"accuracy": 0.5, "macro_f1": (2 / 3 + 1 / 2 + 0) / 3, "loss": (2 * math.log(2) + 2 * math.log(4)) / 4}
    assert found.metrics == pytest.approx(expected)
    assert next(iter(found.metrics)) == "accuracy"
    assert found.warnings == ()


def test_one_class_for_everything() -> None:
    logits = logits_of([0.2, 0.6, 0.2], [0.2, 0.6, 0.2])
    found = scores.score(logits, torch.tensor([1, 2]), "single", NAMES)
    assert found.warnings == ("the model predicts one class only, 'b': it has learnt nothing useful",)
    # it may be right about rows of one class
    assert scores.score(logits, torch.tensor([1, 1]), "single", NAMES).warnings == ()


# ---- several classes

LOG3 = math.log(3)
SETS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def test_several_classes() -> None:
    # the sigmoid of log 3 is 3/4; two of the twelve entries are wrong: c in the first row and b in the third
    logits = torch.tensor([[LOG3, -LOG3, -LOG3], [-LOG3, LOG3, -LOG3], [LOG3, -LOG3, -LOG3], [-LOG3, -LOG3, -LOG3]])
    found = scores.score(logits, SETS, "multi", NAMES)
    expected = {
        "micro_f1": 2 * 3 / (2 * 3 + 0 + 2),
        "macro_f1": (1 + 2 / 3 + 0) / 3,
        "accuracy": 2 / 4,
        "loss": -(10 * math.log(0.75) + 2 * math.log(0.25)) / 12,
    }
    assert found.metrics == pytest.approx(expected)
    assert next(iter(found.metrics)) == "micro_f1"
    assert found.warnings == ()


def test_a_class_that_is_neither_there_nor_predicted_counts_nothing() -> None:
    logits = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])
    found = scores.score(logits, torch.eye(3)[:2], "multi", NAMES).metrics
    assert (found["micro_f1"], found["accuracy"]) == (1.0, 1.0)
    assert found["macro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("row", "said"), [([1.0, -1.0, 1.0], "a, c"), ([-1.0, -1.0, -1.0], "none")], ids=["some", "none"]
)
def test_the_same_classes_for_everything(row: list[float], said: str) -> None:
    logits = torch.tensor([row] * 4)
    found = scores.score(logits, SETS, "multi", NAMES)
    assert found.warnings == (f"the model predicts the same classes for everything ({said})",)
    assert scores.score(logits[:2], SETS[[0, 0]], "multi", NAMES).warnings == ()
    if said == "none":
        assert (found.metrics["micro_f1"], found.metrics["macro_f1"]) == (0.0, 0.0)


def test_one_row_of_several_classes() -> None:
    found = scores.score(torch.tensor([[1.0, -1.0, 1.0]]), SETS[:1], "multi", NAMES)
    assert (found.metrics["micro_f1"], found.metrics["accuracy"], found.warnings) == (1.0, 1.0, ())


# ---- a number


def test_a_number() -> None:
    found = scores.score(
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([2.0, 2.0, 4.0, 0.0]), "regression", []
    )
    # errors -1, 0, -1, 4; products of deviations 0, 0, 1, -3; their squares sum to 5 and 8
    expected = {"rmse": math.sqrt(18 / 4), "pearson": -2 / math.sqrt(5 * 8), "loss": 18 / 4}
    assert found.metrics == pytest.approx(expected)
    assert next(iter(found.metrics)) == "rmse"
    assert found.warnings == ()


@pytest.mark.parametrize("wanted", [[1.0, 1.0], [2.0, -2.0]])
def test_constants_are_correlated_with_nothing(wanted: list[float]) -> None:
    found = scores.score(torch.ones(2, 1), torch.tensor(wanted), "regression", [])
    assert found.metrics["pearson"] == 0.0
    # the same number for everything is right where everything has the same number
    assert bool(found.warnings) == (wanted[0] != wanted[1])


def test_one_number_alone() -> None:
    found = scores.score(torch.tensor([[3.0]]), torch.tensor([1.0]), "regression", [])
    assert (found.metrics, found.warnings) == ({"rmse": 2.0, "pearson": 0.0, "loss": 4.0}, ())


# ---- all of them


@pytest.mark.parametrize("problem", scores.MAIN_METRIC)
def test_the_main_metric_is_among_the_metrics_and_knows_its_direction(problem: Any) -> None:
    good, bad, labels = {
        "single": (10 * torch.eye(3), 10 * torch.eye(3)[[1, 2, 0]], torch.arange(3)),
        "multi": (10 * SETS - 5, 5 - 10 * SETS, SETS),
        "regression": (torch.arange(3.0)[:, None], -torch.arange(3.0)[:, None], torch.arange(3.0)),
    }[problem]
    name, higher_is_better = scores.MAIN_METRIC[problem]
    best, worst = (scores.score(logits, labels, problem, NAMES).metrics for logits in (good, bad))
    assert next(iter(best)) == name
    assert (best[name] > worst[name]) == higher_is_better
    assert best["loss"] < worst["loss"]


@pytest.mark.parametrize("problem", scores.MAIN_METRIC)
def test_the_loss_is_taken_in_float32(problem: Any) -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7], [2.0, -1.0, 0.5]])[:, : 1 if problem == "regression" else 3]
    labels = {"single": torch.tensor([0, 2]), "multi": SETS[:2], "regression": torch.tensor([1.5, -2.0])}[problem]
    rounded = logits.bfloat16()
    found = scores.loss(rounded, labels, problem)
    assert found.dtype == torch.float32
    assert torch.equal(found, scores.loss(rounded.float(), labels, problem))

"""Loss and metrics for predicting one class, several classes, or a number."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedlora.core.later import sklearn
from fedlora.tasks.base import Evaluation

Problem = Literal["single", "multi", "regression"]
"""One class of several, any number of classes, or a number."""

MAIN_METRIC: dict[Problem, tuple[str, bool]] = {
    "single": ("accuracy", True),
    "multi": ("micro_f1", True),
    "regression": ("rmse", False),
}
"""The main metric of each problem, and whether more of it is better."""
ONE_CLASS = "the model predicts one class only"
"""The beginning of a warning, which is to be expected of a model that is not trained yet."""


def loss(logits: Tensor, labels: Tensor, problem: Problem) -> Tensor:
    """Cross entropy, the mean binary cross entropy over all classes, or the mean squared error; in float32.

    Args:
        logits: ``(examples, outputs)``.
        labels: ``(examples,)`` int64; or ``(examples, outputs)`` zeros and ones; or ``(examples,)`` float32.
        problem: which of the three.
    """
    logits = logits.float()
    if problem == "single":
        return functional.cross_entropy(logits, labels)
    if problem == "multi":
        return functional.binary_cross_entropy_with_logits(logits, labels.float())
    return functional.mse_loss(logits.squeeze(-1), labels.float())


def said(logits: Tensor, problem: Problem, names: list[str]) -> list[dict[str, float]]:
    """Human-readable outputs: each class's probability, the most likely first; or ``{"value": number}``."""
    logits = logits.float()
    if problem == "regression":
        return [{"value": value} for value in logits.squeeze(-1).tolist()]
    shares = logits.softmax(1) if problem == "single" else logits.sigmoid()
    pairs = (zip(names, row, strict=True) for row in shares.tolist())
    return [dict(sorted(row, key=lambda pair: -pair[1])) for row in pairs]


def score(logits: Tensor, labels: Tensor, problem: Problem, names: list[str]) -> Evaluation:
    """Metrics of outputs, with a warning if the model gives the same output for every example.

    One class: accuracy and macro F1. Several: micro and macro F1 over classes at a threshold of 1/2, and accuracy over
    whole sets. A number: root mean squared error and Pearson's correlation, 0 for constant outputs. All: the loss.

    Args:
        logits: see ``loss``.
        labels: see ``loss``.
        problem: which of the three.
        names: the classes' names.
    """
    last = {"loss": float(loss(logits, labels, problem))}
    if problem == "regression":
        found, wanted = logits.float().squeeze(-1).numpy(), labels.float().numpy()
        error = float(np.sqrt(np.mean((found - wanted) ** 2)))
        constant = len(found) > 1 and float(np.std(found)) < 1e-6 < float(np.std(wanted))
        warnings = ("the model predicts the same number for everything: it has learnt nothing",) if constant else ()
        return Evaluation({"rmse": error, "pearson": _pearson(found, wanted), **last}, warnings)
    if problem == "multi":
        chosen = logits > 0
        metrics = {
            f"{average}_f1": float(
                sklearn.metrics.f1_score(labels.numpy(), chosen.numpy(), average=average, zero_division=0.0)
            )
            for average in ("micro", "macro")
        }
        metrics |= {"accuracy": float((chosen == labels.bool()).all(1).float().mean()), **last}
        if len(torch.unique(chosen, dim=0)) == 1 and len(torch.unique(labels, dim=0)) > 1:
            same = ", ".join(names[number] for number in chosen[0].nonzero().flatten()) or "none"
            return Evaluation(metrics, (f"the model predicts the same classes for everything ({same})",))
        return Evaluation(metrics, ())
    predicted = logits.argmax(1)
    metrics = {
        "accuracy": float((predicted == labels).float().mean()),
        "macro_f1": float(
            sklearn.metrics.f1_score(labels.numpy(), predicted.numpy(), average="macro", zero_division=0.0)
        ),
        **last,
    }
    if len(torch.unique(predicted)) == 1 and len(torch.unique(labels)) > 1:
        name = names[int(predicted[0])]
        return Evaluation(metrics, (f"{ONE_CLASS}, {name!r}: it has learnt nothing useful",))
    return Evaluation(metrics, ())


def _pearson(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    if min(float(np.std(found)), float(np.std(wanted))) < 1e-12:
        return 0.0
    return float(np.corrcoef(found, wanted)[0, 1])

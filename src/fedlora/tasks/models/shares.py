"""How the mean loss of a batch divides among its examples: what per-example gradients of a whole batch need."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Shares(NamedTuple):
    """The part of each example in the mean loss of a batch.

    Args:
        owners: ``(rows,)`` int64, the number of the example of each row of the batch, in the order in which the loss
            passes them through the model.
        shares: ``(examples,)`` float64; the mean loss of the batch is the sum of ``share`` times the example's own mean
            loss. Zero for an example of which nothing is learnt.
    """

    owners: NDArray[np.int64]
    shares: NDArray[np.float64]


def equal_shares(examples: int) -> Shares:
    """Those of a batch with one row for each example, whose losses count alike."""
    return Shares(np.arange(examples), np.full(examples, 1.0 / max(1, examples)))


def shares_of(
    rows: NDArray[np.int64], learnt: NDArray[np.int64], lengths: NDArray[np.int64], device: torch.device
) -> Shares:
    """Those of a batch whose rows pass through the model in the order of ``by_length``.

    Args:
        rows: of each example, how many rows of the batch are its own; they follow one another.
        learnt: of each row, how many terms it has in the mean.
        lengths: of each row, the tokens; empty if the batch keeps its order.
        device: the model's device.
    """
    owners = np.repeat(np.arange(len(rows)), rows)
    counts = np.bincount(owners, learnt, len(rows))
    if device.type == "cpu" and len(lengths):
        owners = owners[np.argsort(lengths, kind="stable")]
    return Shares(owners, counts / max(1.0, counts.sum()))

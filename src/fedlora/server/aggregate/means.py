"""Means of updates, and robust aggregators that limit the influence of faulty clients."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from fedlora.core import tree
from fedlora.core.component import MODEL_CONFIG, Count, Field, Positive, Whole, dataclass
from fedlora.core.errors import TrainingError
from fedlora.core.schema import Schema
from fedlora.core.state import Update
from fedlora.core.store import Store
from fedlora.core.tree import Tree
from fedlora.server.aggregate.base import (
    Accumulator,
    Aggregator,
    Collected,
    Comparing,
    Needs,
    Weighted,
    WeightedMean,
    weight_by,
)
from fedlora.server.aggregate.measure import CollectedProducts, Selecting, bounded


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Mean(Weighted):
    """Weighted mean of the deltas, ``sum_k p_k delta_k`` with ``sum_k p_k = 1`` (FedAvg, arXiv 1602.05629, Alg. 1).

    Args:
        weighting: ``uniform`` weights every client of the cohort equally (FLASC's code; privacy noise is calibrated for
            it); ``examples`` weights each client by the number of examples it trained on in this round.
    """

    kind: Literal["mean"] = "mean"
    weighting: Literal["uniform", "examples"] = "uniform"
    unbiased: ClassVar[bool] = True
    needs: ClassVar[Needs] = "sum"

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return WeightedMean(weight_by(self.weighting))


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class CoordinateMedian(Comparing):
    """The median of each coordinate (arXiv 1803.01498, Def. 1); for an even number, the mean of the middle two.

    It tolerates faulty clients as long as they are fewer than half, but loses what only a few clients learnt.
    """

    kind: Literal["median"] = "median"
    coordinatewise: ClassVar[bool] = True

    def of(self, rows: Tensor) -> Tensor:
        ordered = rows.sort(dim=0).values
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class TrimmedMean(Comparing):
    """The mean of each coordinate without a share of its smallest and largest values (arXiv 1803.01498, Def. 2).

    Args:
        trim: share of values left out at each end, rounded up; unless it is 0, at least one of three or more updates.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    coordinatewise: ClassVar[bool] = True

    def of(self, rows: Tensor) -> Tensor:
        left_out = min(math.ceil(round(self.trim * len(rows), 9)), (len(rows) - 1) // 2)
        return rows.sort(dim=0).values[left_out : len(rows) - left_out].mean(dim=0)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Krum(Selecting):
    """The mean of the updates with the closest neighbours (arXiv 1703.02757).

    An update's score is the sum of the squared distances to its ``n - faulty - 2`` nearest others.

    Args:
        faulty: number of faulty clients to tolerate.
        select: number of best-scored updates to average; above 1 this is multi-Krum. A cohort must have at least
            ``2 * faulty + 2 + select`` clients. An update that is refused for its length counts as one of the faulty.
        measure: ``product`` measures distances on the products ``B A`` of low-rank adapters; by default, they are those
            of all entries.
    """

    kind: Literal["krum"] = "krum"
    faulty: Whole = 1
    select: Count = 1
    measure: Literal["product"] | None = None

    @property
    def min_updates(self) -> int:
        return 2 * self.faulty + 2 + self.select

    def without(self, refused: int) -> Self:
        return replace(self, faulty=max(0, self.faulty - refused))

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return CollectedProducts(self, schema.pairs) if self.measure else Collected(self)

    def of(self, rows: Tensor) -> Tensor:
        return self.closest(rows, torch.cdist(rows.double(), rows.double()).square())

    def closest(self, rows: Tensor, squared: Tensor) -> Tensor:
        """See ``Selecting.closest``.

        Raises:
            TrainingError: there are too few updates.
        """
        num = len(rows)
        if num < self.min_updates:
            raise TrainingError(
                f"krum with faulty = {self.faulty} and select = {self.select} needs {self.min_updates} clients in a "
                f"round, and {num} answered; raise clients.per_round"
            )
        nearest = squared.sort(dim=1).values[:, 1 : num - self.faulty - 1]
        best = nearest.sum(dim=1).sort(stable=True).indices[: self.select].sort().values
        return rows[best].mean(dim=0)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class NormBound(Aggregator):
    """The mean of updates clipped to a norm (arXiv 1911.07963).

    Args:
        norm: the Euclidean norm to which longer updates are clipped.
        measure: as for ``krum``.
    """

    kind: Literal["norm_bound"] = "norm_bound"
    norm: Positive
    measure: Literal["product"] | None = None
    needs: ClassVar[Needs] = "update"

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        bound = partial(bounded, pairs=schema.pairs, most=self.norm) if self.measure else self._bounded
        return WeightedMean(weight_by("uniform"), bound)

    def _bounded(self, update: Update) -> Update:
        return update._replace(delta=tree.scale(update.delta, 1.0 / max(1.0, tree.norm(update.delta) / self.norm)))

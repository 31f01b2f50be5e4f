"""How a cohort's updates become one change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from fedlora import tree
from fedlora.component import STRICT
from fedlora.errors import TrainingError
from fedlora.state import Change, Fold, Update
from fedlora.tree import Tree


class Aggregator(ABC):
    """Turns the updates of a cohort, in job order, into one change."""

    exact_for_products: ClassVar[bool]
    """Whether the mean of the products ``B @ A`` is what the result's product is."""

    @abstractmethod
    def combine(self, updates: Iterable[Update]) -> Change:
        """Reads ``updates`` once, in order, and returns the change they ask for."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mean(Aggregator):
    """Weighted mean of the deltas, ``sum_k p_k delta_k`` with ``sum_k p_k = 1`` (FedAvg, arXiv 1602.05629, Alg. 1).

    Args:
        weighting: ``uniform`` gives every client of the cohort the same say (FLASC's code, and what noise for privacy
            is calibrated for); ``examples`` gives a say by the examples the client trained on in this round.
    """

    kind: Literal["mean"] = "mean"
    weighting: Literal["uniform", "examples"] = "uniform"
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update]) -> Change:
        """The mean, with no more than one update in memory at a time.

        Raises:
            TrainingError: there is no update, or no weight.
        """
        total: Tree | None = None
        weights = 0.0
        for update in updates:
            weight = 1.0 if self.weighting == "uniform" else update.weight
            total = tree.zeros_like(update.delta) if total is None else total
            tree.add_(total, update.delta, weight)
            weights += weight
        if total is None or weights <= 0:
            raise TrainingError("no client answered with an update; a round needs at least one client with examples")
        return Change(delta=tree.scale(total, 1.0 / weights), fold=Fold())


AGGREGATORS: dict[str, type[Aggregator]] = {"mean": Mean}
AnyAggregator = Mean

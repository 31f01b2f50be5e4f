"""The ``Aggregator`` slot: how a cohort's updates become one change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from fedlora.core import tree
from fedlora.core.errors import TrainingError
from fedlora.core.schema import Schema
from fedlora.core.state import Change, Fold, Update
from fedlora.core.store import Store
from fedlora.core.tree import Tree

NO_UPDATES = (
    "no client returned an update; a round needs at least one client that has examples and is done before "
    "local.timeout_seconds"
)
"""The error message of an aggregator that received no updates."""
Needs = Literal["sum", "update", "factors", "cohort"]


class Accumulator(ABC):
    """Takes the updates of a cohort one by one, in job order."""

    refused: int = 0
    """Number of updates of the round that were refused for their length, which is set before ``finish``."""

    @abstractmethod
    def add(self, update: Update) -> None:
        """Adds one update; ``Aggregator.needs`` defines which part of it is kept."""

    @abstractmethod
    def finish(self) -> Change:
        """The cohort's aggregated change.

        Raises:
            TrainingError: there are too few updates.
        """


class Aggregator(ABC):
    """Aggregates the updates of a cohort into one change."""

    exact_for_products: ClassVar[bool] = False
    """Whether the product of the result, including its fold, equals the mean of the products ``B @ A``."""
    unbiased: ClassVar[bool] = False
    """Whether the change is a weighted mean of the updates, so that unbiased updates stay unbiased."""
    coordinatewise: ClassVar[bool] = False
    """Whether each coordinate depends on its order among the clients' values."""
    needs_factors: ClassVar[bool] = False
    """Whether it interprets the factors ``A`` and ``B`` of low-rank adapters."""
    edits_base: ClassVar[bool] = False
    """Whether it edits frozen weights; the edit is sent to clients."""
    reinitialises: ClassVar[bool] = False
    """Whether the adapters are redrawn after each round."""
    needs: ClassVar[Needs]
    """What it needs and holds until the round ends: only a weighted ``sum``; each single ``update``, in streaming
    fashion; the low-rank ``factors`` of all clients; or the updates of the whole ``cohort``."""

    @property
    def weighs_by_examples(self) -> bool:
        """Whether clients report their numbers of examples, which determine their weights."""
        return False

    @property
    def pads_with_zeros(self) -> bool:
        """Whether ranks that a client did not receive are padded with zeros."""
        return False

    @property
    def min_updates(self) -> int:
        """The minimum number of updates it needs."""
        return 1

    def without(self, refused: int) -> Self:
        """The same rule where so many updates of a round were refused for their length, and are not among those added.

        Args:
            refused: their number.
        """
        return self

    def fold_rank(self, ranks: Sequence[int], moving: str) -> int:
        """The rank of a round's fold.

        Args:
            ranks: ranks of the cohort's adapters.
            moving: the factors that are trained: ``both``, ``B``, or ``alternate``.
        """
        return 0

    @abstractmethod
    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        """The accumulator for a round's updates.

        Args:
            params: the server's parameters, to which the change will be added.
            schema: the leaf of each of them.
            store: what the previous round's change stored.
        """


class Weighted(Aggregator):
    """An aggregator with the setting ``weighting``: ``uniform`` or ``examples``."""

    weighting: Literal["uniform", "examples"]

    @property
    def weighs_by_examples(self) -> bool:
        return self.weighting == "examples"


class WeightedMean(Accumulator):
    """``sum_k w_k delta_k / sum_k w_k``; holds only the sum.

    Args:
        weight_of: the weight of an update.
        changed: a transformation of an update before it is added.
    """

    def __init__(
        self, weight_of: Callable[[Update], float], changed: Callable[[Update], Update] = lambda update: update
    ) -> None:
        self._weight_of, self._changed = weight_of, changed
        self._total: Tree | None = None
        self._weights = 0.0

    def add(self, update: Update) -> None:
        update = self._changed(update)
        weight = self._weight_of(update)
        if self._total is None:
            self._total = tree.zeros_like(update.delta)
        tree.add_(self._total, update.delta, weight)
        self._weights += weight

    def finish(self) -> Change:
        """See ``Accumulator.finish``.

        Raises:
            TrainingError: there is no update, or the total weight is zero.
        """
        if self._total is None:
            raise TrainingError(NO_UPDATES)
        if self._weights <= 0:
            raise TrainingError(
                "the total aggregation weight is zero: no client reported examples, or all adapters are zero"
            )
        total, self._total = self._total, None
        tree.scale_(total, 1.0 / self._weights)
        return Change(total, Fold())


class Comparing(Aggregator):
    """An aggregator that compares the updates of the whole cohort, each flattened to a row."""

    needs: ClassVar[Needs] = "cohort"

    @abstractmethod
    def of(self, rows: Tensor) -> Tensor:
        """The change, ``(numbers,)``, from updates ``(clients, numbers)``."""

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return Collected(self)


class Collected(Accumulator):
    """Holds the deltas of the whole cohort.

    Args:
        rule: the aggregator applied to them.
    """

    def __init__(self, rule: Comparing) -> None:
        self._rule = rule
        self._deltas: list[Tree] = []

    def add(self, update: Update) -> None:
        self._deltas.append(update.delta)

    def finish(self) -> Change:
        if not self._deltas:
            raise TrainingError(NO_UPDATES)
        rows = torch.stack([tree.flatten(delta) for delta in self._deltas])
        return Change(tree.unflatten(self._rule.without(self.refused).of(rows), self._deltas[0]), Fold())


def weight_by(weighting: str) -> Callable[[Update], float]:
    """The weight of an update under an aggregator's ``weighting``: ``uniform`` or ``examples``."""
    return (lambda update: 1.0) if weighting == "uniform" else (lambda update: update.weight)

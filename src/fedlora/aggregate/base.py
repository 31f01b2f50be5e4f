"""The slot ``Aggregator``: how a cohort's updates become one change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

from fedlora import tree
from fedlora.errors import TrainingError
from fedlora.state import Change, Update
from fedlora.tree import Tree

NOBODY = (
    "no client answered with an update; a round needs at least one client that has examples and is done before "
    "local.timeout_seconds"
)
"""What a rule says when nothing came."""


class Aggregator(ABC):
    """Turns the updates of a cohort, in job order, into one change."""

    exact_for_products: ClassVar[bool] = False
    """Whether the mean of the products ``B @ A`` is what the result's product is, its fold included."""
    unbiased: ClassVar[bool] = False
    """Whether the change is a weighted mean of the updates, so that what is right on average stays right."""
    coordinatewise: ClassVar[bool] = False
    """Whether each coordinate is decided by its order among the clients'."""
    needs_factors: ClassVar[bool] = False
    """Whether the factors ``A`` and ``B`` of low-rank adapters are read as such."""
    rebuilds_factors: ClassVar[bool] = False
    """Whether new factors are made from the clients' whole factors, not from their changes."""
    edits_base: ClassVar[bool] = False
    """Whether frozen weights are edited, and the edit is sent to clients."""
    reinitialises: ClassVar[bool] = False
    """Whether the adapters are drawn anew after each round."""

    @property
    def weighs_by_examples(self) -> bool:
        """Whether clients report their numbers of examples, which decide their weights."""
        return False

    @property
    def pads_with_zeros(self) -> bool:
        """Whether ranks that a client did not receive count as zeros."""
        return False

    @property
    def least(self) -> int:
        """How many answers it needs."""
        return 1

    def fold_rank(self, ranks: Sequence[int], moving: str) -> int:
        """The rank of a round's fold.

        Args:
            ranks: of the cohort's adapters.
            moving: the factors that are trained: ``both``, ``B``, or ``alternate``.
        """
        return 0

    @abstractmethod
    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """Reads ``updates`` once, in order, and returns the change they ask for.

        Args:
            updates: the cohort's.
            params: the server's parameters, to which the change will be added.

        Raises:
            TrainingError: there are too few updates.
        """


class Weighted(Aggregator):
    """A rule whose setting ``weighting`` is ``uniform`` or ``examples``."""

    weighting: Literal["uniform", "examples"]

    @property
    def weighs_by_examples(self) -> bool:
        """See ``Aggregator.weighs_by_examples``."""
        return self.weighting == "examples"


def weighted_mean(updates: Iterable[Update], weight_of: Callable[[Update], float]) -> Tree:
    """``sum_k w_k delta_k / sum_k w_k``.

    Args:
        updates: read once, one at a time.
        weight_of: the say of an update.

    Raises:
        TrainingError: there is no update, or none has a say.
    """
    total: Tree | None = None
    weights = 0.0
    for update in updates:
        weight = weight_of(update)
        total = tree.zeros_like(update.delta) if total is None else total
        tree.add_(total, update.delta, weight)
        weights += weight
    if total is None:
        raise TrainingError(NOBODY)
    if weights <= 0:
        raise TrainingError("no answer has a say in the mean: none tells of examples, or all adapters are zero")
    return tree.scale(total, 1.0 / weights)


def shared_out(updates: Iterable[Update], weighting: str) -> tuple[list[Update], list[float], Tree]:
    """A cohort, the share that each client has in the mean, and the mean of their deltas.

    Args:
        updates: of the cohort.
        weighting: ``uniform`` or ``examples``.

    Raises:
        TrainingError: see ``weighted_mean``.
    """
    cohort = list(updates)
    weights = [1.0 if weighting == "uniform" else update.weight for update in cohort]
    mean = weighted_mean(cohort, lambda update: 1.0 if weighting == "uniform" else update.weight)
    return cohort, [weight / sum(weights) for weight in weights], mean


def factors(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of ``A`` and ``B`` of every adapter."""
    found = list(names)
    return [(name, f"{name[:-1]}B") for name in found if name.endswith("lora_A") and f"{name[:-1]}B" in found]

"""Lengths and distances of updates on the products ``B A``: two factors can hide a rotation or a change of scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.core import tree
from fedlora.core.errors import TrainingError
from fedlora.core.schema import Pair
from fedlora.core.state import Change, Fold, Update
from fedlora.server.aggregate.base import NO_UPDATES, Accumulator, Comparing


def inner_products(updates: Sequence[Update], pairs: Sequence[Pair]) -> Tensor:
    """``<d_i, d_j>`` over what updates change: ``B A`` of each pair of factors, and all other entries; float64.

    ``B_i A_i - B A = [B_i, -B] [A_i; A]``, so no product is formed: the inner product of two of them is that of small
    matrices of twice the rank.

    Args:
        updates: the updates.
        pairs: the pairs of factors.
    """
    factors = {name for a, b, _ in pairs for name in (a, b)}
    rest = [
        tree.flatten({name: value for name, value in one.delta.items() if name not in factors}).double()
        for one in updates
    ]
    rows = torch.stack(rest)
    total = rows @ rows.T
    for a, b, _ in pairs:
        tall, wide = [], []
        for start, delta, _ in updates:
            start_a, start_b = start[a].double(), start[b].double()
            tall.append(torch.cat([start_b + delta[b], -start_b], dim=1))
            wide.append(torch.cat([start_a + delta[a], start_a]))
        for i in range(len(updates)):
            for j in range(i + 1):
                value = ((tall[i].T @ tall[j]) * (wide[i] @ wide[j].T)).sum()
                total[i, j] += value
                if i != j:
                    total[j, i] += value
    return total


def norm(update: Update, pairs: Sequence[Pair]) -> float:
    """The length of what an update changes, see ``inner_products``."""
    return float(inner_products([update], pairs).clamp(min=0).sqrt())


def bounded(update: Update, pairs: Sequence[Pair], most: float) -> Update:
    """The update scaled down until its length on products is at most ``most``."""
    while (found := norm(update, pairs)) > most * (1 + 1e-6):
        # a product is of second order, so that one division may not be enough
        update = update._replace(delta=tree.scale(update.delta, most / found))
    return update


class Selecting(Comparing):
    """An aggregator that selects updates by the distances between them."""

    @abstractmethod
    def closest(self, rows: Tensor, squared: Tensor) -> Tensor:
        """The change from updates ``(clients, numbers)`` and their squared distances ``(clients, clients)``."""


class CollectedProducts(Accumulator):
    """Holds the updates of the whole cohort, and measures their distances on products.

    Args:
        rule: the aggregator, which selects by distances.
        pairs: the pairs of factors.
    """

    def __init__(self, rule: Selecting, pairs: Sequence[Pair]) -> None:
        self._rule, self._pairs = rule, pairs
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def finish(self) -> Change:
        if not self._updates:
            raise TrainingError(NO_UPDATES)
        inner = inner_products(self._updates, self._pairs)
        own = inner.diagonal()
        squared = (own[:, None] + own[None] - 2 * inner).clamp(min=0)
        rows = torch.stack([tree.flatten(update.delta) for update in self._updates])
        return Change(
            tree.unflatten(self._rule.without(self.refused).closest(rows, squared), self._updates[0].delta), Fold()
        )

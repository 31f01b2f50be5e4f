"""Refusal of updates that are far longer than all others, before they are added to the cohort's sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median_low
from typing import NamedTuple

import torch

from fedlora.core import tree
from fedlora.core.state import Update
from fedlora.core.store import EMPTY, Store
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe import Recipe

FACTOR = 100.0
"""Default ratio of an update's norm to the median norm above which it is refused."""
FLOOR = 1.0
"""Root mean square of an update's entries up to which it is never refused for its norm."""
REMEMBERED = 8
"""Number of earlier rounds whose median norms are compared with."""
ENOUGH = 3
"""Number of norms required for a comparison; until then, updates from the first one above ``FLOOR`` are held back."""
LARGEST = float(torch.finfo(torch.float32).max)


class Verdict(NamedTuple):
    """An update with its place in the cohort, and why it is refused; empty if it is not."""

    place: int
    update: Update
    why: str


class Outliers:
    """Compares the norm of each update of a round with the median of the norms known so far.

    Known are the median norms of the last ``REMEMBERED`` rounds of the phase and the norms of the cohort received so
    far, zeros left out. An update is refused if its norm exceeds ``factor`` times the (lower) median and the root mean
    square of its entries exceeds ``FLOOR``, or if the sum of the round could overflow float32. Updates are not stored:
    only without earlier rounds are those from the first one above ``FLOOR`` held back until ``ENOUGH`` norms are known.

    Where client-level noise is calibrated for a clip, the clip limits every update, and nothing is refused, because a
    refusal would depend on the data.

    Args:
        recipe: the recipe of the round.
        store: what ``store`` returned after the previous round.
    """

    def __init__(self, recipe: Recipe, store: Store = EMPTY) -> None:
        self._active = disclosure_of(recipe).absence
        self._factor = FACTOR if recipe.outlier_factor is None else recipe.outlier_factor
        self._weighs = recipe.aggregator.weighs_by_examples
        self._recent: list[float] = list(store.values.get("recent", ()))
        self._norms: list[float] = []
        self._admitted: dict[int, float] = {}
        self._reach = 0.0
        self.refused = 0
        self._held: list[tuple[int, Update, float]] = []

    def offer(self, place: int, update: Update) -> Iterator[Verdict]:
        """Takes an update, and yields those, in order, about which it can be decided.

        Args:
            place: its client's place in the cohort.
            update: the update.
        """
        if not self._active:
            yield Verdict(place, update, "")
            return
        norm = tree.norm(update.delta)
        if norm > 0:
            self._norms.append(norm)
        self._held.append((place, update, norm))
        alone = len(self._held) == 1
        if len(self._recent) + len(self._norms) >= ENOUGH or (alone and not self._is_large(update, norm)):
            yield from self.rest()

    def rest(self) -> Iterator[Verdict]:
        """Yields the updates held back so far."""
        held, self._held = self._held, []
        while held:
            place, update, norm = held.pop(0)
            if not (why := self._why(update, norm)):
                self._admitted[place] = norm
            self.refused += bool(why)
            yield Verdict(place, update, why)

    def _why(self, update: Update, norm: float) -> str:
        known = self._recent + self._norms
        usual = median_low(known) if known else norm
        if norm > self._factor * usual and self._is_large(update, norm):
            return (
                f"its update has the norm {norm:.3g}, and {usual:.3g} is usual in this run; more than "
                f"{self._factor:g} times that is refused (outlier_factor)"
            )
        reach = self._reach + norm * (max(1.0, update.weight) if self._weighs else 1.0)
        if not reach <= LARGEST:
            return f"its update has the norm {norm:.3g}, with which the sum of the round would not be finite"
        self._reach = reach
        return ""

    def _is_large(self, update: Update, norm: float) -> bool:
        """Whether an update could be refused for its norm."""
        return self._factor > 0 and norm / math.sqrt(max(1, tree.num_entries(update.delta))) > FLOOR

    @property
    def longest(self) -> tuple[int, float] | None:
        """The place and norm of the longest update that counts."""
        return max(self._admitted.items(), key=lambda item: item[1]) if self._admitted else None

    def store(self, clients: list[int]) -> Store:
        """What the next round needs: the median norms of recent rounds, and the longest update of this one.

        Args:
            clients: the cohort.
        """
        norms = [norm for norm in self._admitted.values() if norm > 0]
        if not norms or self.longest is None:
            return Store(values={"recent": self._recent or None})
        place, norm = self.longest
        recent = [*self._recent, median_low(norms)][-REMEMBERED:]
        return Store(values={"recent": recent, "longest": [clients[place], norm, median_low(norms)]})

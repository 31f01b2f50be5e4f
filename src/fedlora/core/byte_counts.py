"""Byte counts by kind, such as ``adapter`` and ``head``, and arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

ByteCounts = dict[str, int]
"""The number of bytes of each kind."""
Number = TypeVar("Number", int, float)


def add_up(counts: Iterable[Mapping[str, Number]]) -> dict[str, Number]:
    """The sum by kind, with kinds in order of first occurrence.

    >>> add_up([{"head": 1}, {"adapter": 2, "head": 3}])
    {'head': 4, 'adapter': 2}
    """
    total: dict[str, Number] = {}
    for each in counts:
        for kind, count in each.items():
            total[kind] = total.get(kind, 0) + count
    return total


def scaled(counts: Mapping[str, float], factor: float) -> dict[str, float]:
    """Every count times ``factor``."""
    return {kind: factor * count for kind, count in counts.items()}


def mean(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean by kind; a kind that is missing counts as zero."""
    return add_up(scaled(each, 1 / len(counts)) for each in counts)


def rounded(counts: Mapping[str, float]) -> ByteCounts:
    """The counts rounded to whole bytes."""
    return {kind: round(count) for kind, count in counts.items()}

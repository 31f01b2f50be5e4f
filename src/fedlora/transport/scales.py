"""Scales of blocks of values for uniform quantisation, by least squares."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.transport.precision import Floats

_TOGETHER = 1 << 14  # values that are quantised at a time, so that they stay in the cache
_STEP = {1: 1.22, 7: 0.35}  # by largest q: the best scale for normally distributed values, in units of their RMS
_REFINEMENTS = 3
_FIRST = np.zeros(1, np.intp)
_LEAST = 2.0**-100  # a scale so small is not halved in one instruction
_PIECE = 1 << 13  # OpenBLAS takes more than one thread from 10,000 values on, which is slower by far


class Group(NamedTuple):
    """Consecutive blocks of values: their slices, the first value of each block, and the number of its values."""

    blocks: slice
    values: slice
    starts: NDArray[np.intp]
    lengths: NDArray[np.intp]

    def spread(self, scales: Floats) -> Floats:
        """Each block's scale for all of its values; a lone one fits them all as it is."""
        return scales if len(scales) == 1 else np.repeat(scales, self.lengths)


def groups_of(blocks: NDArray[np.intp]) -> Iterator[Group]:
    """All blocks in order, as many at a time as hold ``_TOGETHER`` values, and one at least."""
    ends = np.cumsum(blocks)
    starts, stops = ends - blocks, ends.tolist()
    at = start = 0
    while at < len(stops):
        end = max(at + 1, bisect_right(stops, start + _TOGETHER, at))
        first = starts[at:end] - start if end - at > 1 else _FIRST
        yield Group(slice(at, end), slice(start, stops[end - 1]), first, blocks[at:end])
        at, start = end, stops[end - 1]


def mean_magnitudes(magnitude: Floats, groups: Sequence[Group], top: Floats) -> Floats:
    """The mean of each block's magnitudes other than 0.

    Args:
        magnitude: of all values.
        groups: of all blocks.
        top: the largest magnitude of each block.
    """
    scales = np.empty_like(top)
    for group in groups:
        part = magnitude[group.values]
        above = np.add.reduceat(part, group.starts, dtype=np.float64)
        below = np.add.reduceat((part > 0).astype(np.float64), group.starts)
        scales[group.blocks] = above / np.maximum(below, 1)
    return np.minimum(scales, top)


def least_squares(magnitude: Floats, groups: Sequence[Group], top: Floats, largest: int) -> Floats:
    """The scales that (nearly) minimise the squared error; never larger than ``top``.

    Each is refined from the best one for normally distributed values. Where clipping the largest value is most of the
    error, ``top`` is tried as the start too, and the better kept.

    Args:
        magnitude: of all values.
        groups: of all blocks.
        top: the scale of each block with which its largest magnitude is ``largest``.
        largest: the largest ``q``.
    """
    scales = np.empty_like(top)
    lone = _LoneBlock(0, largest)
    for group in groups:
        part, most, scale = magnitude[group.values], top[group.blocks], None
        if len(most) == 1:
            lone = lone if lone.size == len(part) else _LoneBlock(len(part), largest)
            scale = lone.scale(part, float(most[0]))
        scales[group.blocks] = _scales(part, group, most, largest) if scale is None else scale
    return scales


def _scales(magnitude: Floats, group: Group, top: Floats, largest: int) -> Floats:
    """``least_squares`` of one group."""
    power = np.add.reduceat(np.square(magnitude, dtype=np.float64), group.starts)
    start = np.minimum(top, (_STEP[largest] * np.sqrt(power / group.lengths)).astype(np.float32))
    scales, explained = _refined(magnitude, group, start, largest)
    outlier = np.square(largest * (top - scales), dtype=np.float64) > (power - explained) / 2
    if outlier.any():
        others, more = _refined(magnitude, group, top, largest)
        scales = np.where(outlier & (more > explained), others, scales)
    return np.minimum(scales, top)


def _refined(magnitude: Floats, group: Group, scales: Floats, largest: int) -> tuple[Floats, NDArray[np.float64]]:
    """The scales after alternating steps from a start, and the part of the sum of squares that they explain."""
    wide = magnitude.astype(np.float64)
    # sums of squares of small integers are exact in float32 up to 2 ** 24
    exact = np.float32 if len(magnitude) * largest**2 < 2**24 else np.float64
    for _ in range(_REFINEMENTS):
        q = magnitude / group.spread(np.where(scales > 0, scales, np.float32(1)))
        np.minimum(np.rint(q, out=q), np.float32(largest), out=q)
        above = np.add.reduceat(np.multiply(wide, q), group.starts)
        below = np.add.reduceat(np.multiply(q, q, out=q), group.starts, dtype=exact)
        scales = np.where(below > 0, above / np.maximum(below, 1), scales).astype(np.float32)
    return scales, np.square(above) / np.maximum(below, 1)


class _LoneBlock:
    """``_scales`` of a group of one block in less time: the same bits, by sums in any order.

    ``sum |v| |q|`` is exact in float64 while it is below ``2 ** 53`` units of the last place of ``scale / 2``: all its
    terms are multiples of that unit, as smaller values have ``q = 0``.

    Args:
        size: the number of values.
        largest: the largest ``q``.
    """

    def __init__(self, size: int, largest: int) -> None:
        self.size, self._largest = size, largest
        self._wide, self._wide_q = np.empty((2, size))
        self._q, self._most = np.empty(size, np.float32), np.full(size, largest, np.float32)
        self._one = np.empty(size, np.bool_)
        pieces = [slice(at, at + _PIECE) for at in range(0, size, _PIECE)]
        self._wide_pieces = [(self._wide[piece], self._wide_q[piece]) for piece in pieces]
        self._pieces = [self._q[piece] for piece in pieces]

    def scale(self, magnitude: Floats, top: float) -> float | None:
        """The scale; None where sums may not be exact, or their last places matter."""
        np.copyto(self._wide, magnitude)
        power = sum(float(wide.dot(wide)) for wide, _ in self._wide_pieces)
        slack = 2.0**-51 * self.size * power  # more than two ways to sum may differ
        step, size = _STEP[self._largest], self.size
        start = _float32(step * math.sqrt((power + slack) / size))
        if start != _float32(step * math.sqrt((power - slack) / size)):
            return None
        start = min(top, start)
        # `m / q` is at least half a scale, so the last of three scales is at least a quarter of the first
        if start < _LEAST or self._largest**2 * size * top > 2.0**25 * start:
            return None
        scale, explained = self._refined(magnitude, start)
        clipped = _float32(self._largest * _float32(top - scale)) ** 2 - (power - explained) / 2
        if abs(clipped) <= slack:
            return None
        if clipped > 0:
            other, more = self._refined(magnitude, top)
            scale = other if more > explained else scale
        return min(scale, top)

    def _refined(self, magnitude: Floats, scale: float) -> tuple[float, float]:
        """``_refined`` of one block."""
        above = below = 0.0
        for _ in range(_REFINEMENTS):
            below = self._multiples(magnitude, scale)
            above = 0.0
            for wide, wide_q in self._wide_pieces:
                above += float(wide.dot(wide_q))
            if below:
                scale = _float32(above / below)
        return scale, above * above / max(below, 1.0)

    def _multiples(self, magnitude: Floats, scale: float) -> float:
        """Computes the ``q``, and returns the sum of their squares."""
        if self._largest == 1:
            np.greater(magnitude, scale / 2, out=self._one)  # half a scale is rounded down
            np.copyto(self._wide_q, self._one)
            return float(np.count_nonzero(self._one))
        q = self._q
        np.divide(magnitude, scale, out=q)
        np.rint(q, out=q)
        np.minimum(q, self._most, out=q)  # `clip` takes longer, as does a number
        np.copyto(self._wide_q, q)
        below = 0.0
        for piece in self._pieces:
            below += float(piece.dot(piece))
        return below


def _float32(value: float) -> float:
    """``value`` rounded to float32."""
    return float(np.float32(value))

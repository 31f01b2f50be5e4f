"""The entries of largest magnitude: exact, in linear time whatever the values, on the device where they are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 18  # entries whose magnitudes are looked at together, so that a large vector is not copied as a whole
_HALF = 1 << 16


class _Bin(NamedTuple):
    """A bin of a histogram: its place, the number of entries in it, and in those above it."""

    place: int
    inside: int
    above: int


def largest(vector: Tensor, k: int) -> Tensor:
    """A bool vector that is true for the ``k`` largest magnitudes; ties go to the first.

    The bits of a float without its sign are ordered by magnitude, with NaN at the top. A histogram of their upper half
    finds the bin of the smallest that is kept, and a histogram of the lower half of that bin's entries finds it.

    Args:
        vector: float32, of one dimension.
        k: the number to keep, at most as many as there are.
    """
    bits = vector.detach().view(torch.int32)
    kept = torch.zeros(bits.shape, dtype=torch.bool, device=bits.device)
    if k == 0:
        return kept
    pieces = range(0, len(bits), _PIECE)
    counts = torch.zeros(_HALF // 2, dtype=torch.int64, device=bits.device)
    for start in pieces:
        counts += torch.bincount(_magnitude(bits, start) >> 16, minlength=len(counts))
    upper = _bin_of(counts, k)
    inside = [magnitude[_where(magnitude >> 16, upper.place)] for magnitude in (_magnitude(bits, at) for at in pieces)]
    lower = _bin_of(torch.bincount(torch.cat(inside) & _HALF - 1, minlength=_HALF), k - upper.above)
    threshold = upper.place << 16 | lower.place
    missing = k - upper.above - lower.above
    least = threshold - 1 if missing == lower.inside else threshold  # all that equal it are kept, or some
    for start in pieces:
        magnitude = _magnitude(bits, start)
        # the sign of the difference: PyTorch compares integers more slowly
        kept[start : start + _PIECE] = (least - magnitude) >> 31
        if least == threshold and missing:
            equal = _where(magnitude, threshold)[:missing]
            kept[start + equal] = True
            missing -= len(equal)
    return kept


def _magnitude(bits: Tensor, start: int) -> Tensor:
    return bits[start : start + _PIECE] & 0x7FFFFFFF


def _bin_of(counts: Tensor, k: int) -> _Bin:
    """The bin that holds the ``k``-th entry from the top."""
    at_least = counts.flip(0).cumsum(0)
    found = int(torch.searchsorted(at_least, k))
    inside = int(counts[len(counts) - 1 - found])
    return _Bin(len(counts) - 1 - found, inside, int(at_least[found]) - inside)


def _where(values: Tensor, equal: int) -> Tensor:
    """The positions of the values that equal a number."""
    if values.device.type == "cpu":  # NumPy is several times faster here
        return torch.from_numpy(np.flatnonzero(values.numpy() == equal))
    return torch.nonzero(values == equal).reshape(-1)

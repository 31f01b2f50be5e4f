"""The entries of largest magnitude: exact, in linear time whatever the values, on the device where they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.transport.coder import where_true

_PIECE = 1 << 18  # entries whose magnitudes are looked at together, so that a large vector is not copied as a whole
_CACHED = 1 << 17  # the same on the CPU with a sample, so that they stay in the cache
_HALF = 1 << 16
_NO_SIGN = 0x7FFFFFFF
FEW = 1 / 20
"""The density below which it is quicker to find places than a mask."""

_SAMPLE = 1 << 14  # entries of which the quantiles bound those of all


class _Bin(NamedTuple):
    """A bin of a histogram: its place, the number of entries in it, and in those above it."""

    place: int
    inside: int
    above: int


def largest(vector: Tensor, k: int) -> Tensor:
    """A bool vector that is true for the ``k`` largest magnitudes; ties go to the first.

    The bits of a float without its sign are ordered by magnitude, with NaN at the top. On the CPU, a sample gives two
    bounds of the smallest that is kept, and only what lies between them is looked at again. On other devices, and where
    a sample misleads, histograms find it.

    Args:
        vector: float32, of one dimension.
        k: the number to keep, at most as many as there are.
    """
    bits = vector.detach().view(torch.int32)
    if k and bits.device.type == "cpu" and (kept := _by_sample(bits.numpy(), k)) is not None:
        return torch.from_numpy(kept)
    return _by_histogram(bits, k)


def few_largest(vector: Tensor, k: int) -> NDArray[np.intp] | None:
    """The places where ``largest`` is true, in ascending order, in less time and memory where they are ``FEW``.

    None where a sample misleads, and for a vector on another device than the CPU.
    """
    if not k or vector.device.type != "cpu":
        return None
    bits = vector.detach().view(torch.int32).numpy()
    low, high = _bounds(bits, k)
    found, magnitudes, count = [], [], 0
    for start in range(0, len(bits), _CACHED):
        magnitude = bits[start : start + _CACHED] & _NO_SIGN
        large = where_true(magnitude >= low)
        count += len(large)
        if count > len(bits) // 4:
            return None
        found.append(large + start)
        magnitudes.append(magnitude[large])
    magnitude = np.concatenate(magnitudes)
    kept = magnitude > high
    between, missing = np.flatnonzero(~kept), k - int(np.count_nonzero(kept))
    if not 0 <= missing <= len(between):
        return None
    kept[between[_largest_of(magnitude[between], missing)]] = True
    places: NDArray[np.intp] = np.concatenate(found)[kept]
    return places


def _bounds(bits: NDArray[np.int32], k: int) -> NDArray[np.int32]:
    """Two bounds of the ``k``-th magnitude from the top, by a sample."""
    sample = bits[:: len(bits) // _SAMPLE | 1] & _NO_SIGN
    share = k / len(bits)
    at, margin = len(sample) * (1 - share), 1 + 4 * math.sqrt(len(sample) * share * (1 - share))
    bounds = max(0, int(at - margin)), min(len(sample) - 1, int(at + margin))
    return np.partition(sample, bounds)[list(bounds)]


def _by_sample(bits: NDArray[np.int32], k: int) -> NDArray[np.bool_] | None:
    """``largest``; None where many unequal ones lie between the bounds, or the smallest that is kept does not."""
    low, high = _bounds(bits, k)
    kept, between = np.empty(len(bits), np.bool_), []
    for start in range(0, len(bits), _CACHED):
        magnitude = bits[start : start + _CACHED] & _NO_SIGN
        above = np.greater(magnitude, high, out=kept[start : start + _CACHED])
        between.append(np.flatnonzero((magnitude >= low) ^ above) + start)
    where = np.concatenate(between)
    missing = k - int(np.count_nonzero(kept))
    if not 0 <= missing <= len(where) or (low < high and len(where) > len(bits) // 8):
        return None
    # where the bounds are equal, so are all between them
    chosen = where[:missing] if low == high else where[_largest_of(bits[where] & _NO_SIGN, missing)]
    kept[chosen] = True
    return kept


def _largest_of(magnitude: NDArray[np.int32], k: int) -> NDArray[np.bool_]:
    """Which are the ``k`` largest of a few."""
    if not k:
        return np.zeros(len(magnitude), np.bool_)
    threshold = np.partition(magnitude, -k)[-k]
    kept: NDArray[np.bool_] = magnitude > threshold
    kept[np.flatnonzero(magnitude == threshold)[: k - np.count_nonzero(kept)]] = True
    return kept


def _by_histogram(bits: Tensor, k: int) -> Tensor:
    """``largest``: a histogram of the upper half of the magnitudes' bits finds the bin of the smallest that is kept,
    and a histogram of the lower half of that bin's entries finds it."""
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
    return bits[start : start + _PIECE] & _NO_SIGN


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

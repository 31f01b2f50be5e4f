"""Positions of a tensor's stored entries: range-coded gaps, or positions drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from fedlora.core.errors import WireError
from fedlora.transport.coder import Decoder, Encoder, pack_bits, splitmix, take_bits
from fedlora.transport.framing import Reader, varint

_ESCAPE = 128  # this symbol makes a gap longer by that many units
_UNIT = 2.0**40  # weights are whole numbers below this, so that their sums are exact in any order


class Segment(NamedTuple):
    """A run of entries whose positions share one density: the number of entries, and the number kept."""

    size: int
    kept: int

    @property
    def rare(self) -> int:
        """The number of entries of the rarer kind, whose positions are coded; 0 if there is nothing to encode."""
        return min(self.kept, self.size - self.kept)

    @property
    def low_bits(self) -> int:
        """The largest ``b`` with ``rare * 2 ** (b + 3) <= size``, or 0: storing ``b`` bits of a gap raw costs
        little."""
        return max(0, (self.size // self.rare).bit_length() - 4)


def encode_positions(kept: NDArray[np.bool_], segments: Sequence[Segment]) -> bytes:
    """Encodes the gaps between positions: high parts range coded under a geometric distribution, low bits raw.

    Args:
        kept: one bool per entry of each segment, in order.
        segments: the sizes and counts of the segments.
    """
    encoder = Encoder()
    low: list[NDArray[np.uint8]] = []
    start = 0
    for segment in segments:
        if segment.rare:
            run = kept[start : start + segment.size]
            places = np.flatnonzero(run if segment.rare == segment.kept else ~run)
            gaps = np.diff(places, prepend=-1) - 1
            width = segment.low_bits
            encoder.encode(_with_escapes(gaps >> width), _gaps(segment))
            if width:
                words = gaps.astype("<u4").view(np.uint8).reshape(-1, 4)
                low.append(np.unpackbits(words, axis=1, count=width, bitorder="little").reshape(-1))
        start += segment.size
    coded = encoder.to_bytes()
    return varint(len(coded) // 4) + coded + (pack_bits(np.concatenate(low)) if low else b"")


def decode_positions(reader: Reader, segments: Sequence[Segment]) -> NDArray[np.bool_]:
    """The inverse of ``encode_positions``.

    Raises:
        WireError: the bytes are not such an encoding.
    """
    decoder = Decoder(reader.words(sum(segment.size for segment in segments)))
    mixed = [segment for segment in segments if segment.rare]
    high = [_without_escapes(decoder, segment) for segment in mixed]
    decoder.close()
    bits = take_bits(reader, sum(segment.rare * segment.low_bits for segment in mixed))
    kept = np.empty(sum(segment.size for segment in segments), dtype=np.bool_)
    start = at = 0
    for segment in segments:
        run = kept[start : start + segment.size]
        run[:] = segment.kept > segment.size - segment.kept if segment.rare else segment.kept > 0
        if segment.rare:
            width = segment.low_bits
            gaps = high.pop(0) << width
            if width:
                words = np.zeros((segment.rare, 32), np.uint8)
                words[:, :width] = bits[at : at + width * segment.rare].reshape(-1, width)
                gaps += np.packbits(words, axis=1, bitorder="little").view("<u4").reshape(-1).astype(np.int64)
                at += width * segment.rare
            places = np.cumsum(gaps + 1) - 1
            if places[-1] >= segment.size:
                raise WireError("a position behind the last entry")
            run[places] = not run[0]
        start += segment.size
    return kept


def random_positions(seed: int, name: str, size: int, count: int) -> NDArray[np.intp]:
    """``count`` of ``size`` positions, ascending: those with the smallest numbers in a SplitMix64 stream.

    The stream starts at the XXH3-64 hash of the tensor's name, seeded with ``seed``; no two of its numbers are equal.

    Args:
        seed: 64 bits, shared by both ends.
        name: the tensor's name, so that each tensor gets its own positions.
        size: number of entries of the tensor.
        count: number of positions drawn, at most ``size``.
    """
    if count in (0, size):
        return np.arange(count)
    draws = splitmix(xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed=seed), size)
    return np.sort(np.argpartition(draws, count - 1)[:count])


def _gaps(segment: Segment) -> NDArray[np.float64]:
    """Weights of the high parts 0 to ``_ESCAPE - 1`` and of the escape: ``q ** j (1 - q)`` and ``q ** _ESCAPE``.

    Whole numbers computed by products of doubles alone, so that they are the same on every machine.
    """
    q = 1.0 - segment.rare / segment.size
    for _ in range(segment.low_bits):
        q *= q
    powers = np.multiply.accumulate(np.concatenate([[1.0], np.full(_ESCAPE, q)]))
    weights: NDArray[np.float64] = np.floor(powers * (np.append(np.full(_ESCAPE, 1.0 - q), 1.0) * _UNIT))
    return weights


def _with_escapes(high: NDArray[np.intp]) -> NDArray[np.int32]:
    if not high.size or int(high.max()) < _ESCAPE:
        return high.astype(np.int32)
    symbols = np.full(int((high // _ESCAPE + 1).sum()), _ESCAPE, np.int32)
    symbols[np.cumsum(high // _ESCAPE + 1) - 1] = high % _ESCAPE
    return symbols


def _without_escapes(decoder: Decoder, segment: Segment) -> NDArray[np.int64]:
    model: Any = _gaps(segment)
    missing, pieces, escapes = segment.rare, [], 0
    while missing:
        pieces.append(decoder.decode(model, missing))
        missing = int(np.count_nonzero(pieces[-1] == _ESCAPE))
        escapes += missing
        if escapes * (_ESCAPE << segment.low_bits) > segment.size:
            raise WireError("a position behind the last entry")
    symbols = np.concatenate(pieces)
    ends = np.flatnonzero(symbols != _ESCAPE)
    high: NDArray[np.int64] = symbols[ends].astype(np.int64) + _ESCAPE * (np.diff(ends, prepend=-1) - 1)
    return high

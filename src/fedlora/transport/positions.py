"""Positions of stored entries: range-coded gaps, Huffman-coded gaps or bitmaps, or positions drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from fedlora.core.errors import WireError
from fedlora.transport.coder import Decoder, Encoder, pack_bits, splitmix, take_bits, unpack_bits, where_true
from fedlora.transport.deflate import deflate, inflate
from fedlora.transport.framing import Reader, varint

RANGE, BITS, GAPS = range(3)
"""Codings of a pool: gaps by the range coder; one bit per entry, or gaps in bytes, both Huffman coded."""

_FEWEST = {GAPS: 8 << 10, BITS: 24 << 10}  # bytes of positions from which a Huffman code's table costs little
_LONG = 255  # this byte makes a gap longer by that many units
_ESCAPE = 128  # this symbol makes a gap longer by that many units
_TOGETHER = 64  # segments whose weights are computed at a time
_UNIT = 2.0**40  # weights are whole numbers below this, so that their sums are exact in any order


Chosen = NDArray[np.intp] | NDArray[np.bool_]
"""The kept ones of some entries: their positions, or one bool for each entry, which takes less where many are kept."""


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
        return max(0, (self.size // self.rare).bit_length() - 4) if self.rare else 0

    @property
    def entropy(self) -> float:
        """Bits of the positions, by Shannon's formula."""
        if not self.rare:
            return 0.0
        share = self.rare / self.size
        return -(self.rare * math.log2(share) + (self.size - self.rare) * math.log2(1 - share))

    @property
    def coding(self) -> int:
        """How a pool of this size is written: Huffman codes are as good as the range coder where there is much to
        code, on bits while these are mixed well, on gaps below."""
        coding = GAPS if 9 * self.rare < 2 * self.size else BITS
        return coding if self.entropy >= 8 * _FEWEST[coding] else RANGE

    def places(self, gaps: NDArray[np.int64]) -> Chosen:
        """The kept entries, from the gaps between those of the rarer kind.

        Raises:
            WireError: a position is behind the last entry.
        """
        places: NDArray[np.intp] = np.cumsum(gaps + 1)
        places -= 1
        if len(places) and places[-1] >= self.size:
            raise WireError("a position behind the last entry")
        if self.kept == self.rare:
            return places
        kept = np.ones(self.size, np.bool_)
        kept[places] = False
        return kept


class Run(NamedTuple):
    """The entries of a segment: one bool for each, the number of the kept ones, and the positions of the rarer kind,
    counted from ``start``."""

    kept: NDArray[np.bool_]
    num: int
    rare: NDArray[np.intp]
    start: int = 0

    @property
    def is_sparse(self) -> bool:
        """Whether the kept ones are the rarer kind."""
        return 2 * self.num <= len(self.kept)

    @property
    def chosen(self) -> Chosen:
        """The kept ones, if ``start`` is 0."""
        return self.rare if self.is_sparse else self.kept

    @property
    def segment(self) -> Segment:
        """Its size and count."""
        return Segment(len(self.kept), self.num)

    @property
    def gaps(self) -> NDArray[np.int64]:
        """The numbers of entries between those of the rarer kind."""
        gaps = np.empty(len(self.rare), np.int64)
        gaps[:1] = self.rare[:1] - (self.start - 1)
        np.subtract(self.rare[1:], self.rare[:-1], out=gaps[1:])
        gaps -= 1
        return gaps


def run_of(kept: NDArray[np.bool_]) -> Run:
    """The run of these entries."""
    num = int(np.count_nonzero(kept))
    return Run(kept, num, where_true(kept if 2 * num <= len(kept) else ~kept))


def chosen_of(kept: NDArray[np.bool_]) -> Chosen:
    """The kept ones of these entries: their positions, unless they are more than half."""
    return where_true(kept) if 2 * np.count_nonzero(kept) <= len(kept) else kept


def positions_of(kept: Chosen) -> NDArray[np.intp]:
    """The positions of the kept ones."""
    return where_true(kept.view(np.bool_)) if kept.dtype == np.bool_ else kept.view(np.intp)


def encode_pool(run: Run) -> bytes:
    """Encodes a pool by Huffman codes, as bits or as gaps, whichever ``segment.coding`` says."""
    segment = run.segment
    if segment.coding == BITS:
        return deflate(np.packbits(run.kept, bitorder="little"))
    width, gaps = segment.low_bits, run.gaps
    return deflate(_in_bytes(gaps >> width)) + pack_bits(_low(gaps, width))


def decode_pool(reader: Reader, segment: Segment, coding: int) -> Chosen:
    """The inverse of ``encode_pool``, for either coding: the kept entries.

    Raises:
        WireError: the bytes are not such an encoding.
    """
    if coding == BITS:
        kept = unpack_bits(inflate(reader, -(-segment.size // 8)), segment.size)
        if np.count_nonzero(kept) != segment.kept:
            raise WireError("a bitmap of other than the stated number of entries")
        return kept.view(np.bool_)
    if coding != GAPS:
        raise WireError(f"the unknown coding {coding} of positions")
    width = segment.low_bits
    raw = inflate(reader, segment.rare + (segment.size >> width) // _LONG)
    ends = np.flatnonzero(raw != _LONG)
    if len(ends) != segment.rare or (len(raw) and raw[-1] == _LONG):
        raise WireError("other gaps than are counted")
    gaps = raw[ends].astype(np.int64)
    if len(ends) != len(raw):
        gaps += _LONG * (np.diff(ends, prepend=-1) - 1)
    return segment.places(_with_low(gaps, take_bits(reader, segment.rare * width), width))


def encode_positions(runs: Sequence[Run]) -> bytes:
    """Encodes the gaps between positions: high parts range coded under a geometric distribution, low bits raw."""
    encoder = Encoder()
    low: list[NDArray[np.uint8]] = []
    runs = [run for run in runs if run.segment.rare]
    for run, model in zip(runs, _models([run.segment for run in runs]), strict=True):
        gaps, width = run.gaps, model.width
        encoder.encode(_with_escapes(gaps >> width), model.weights)
        if width:
            low.append(_low(gaps, width))
    coded = encoder.to_bytes()
    return varint(len(coded) // 4) + coded + (pack_bits(np.concatenate(low)) if low else b"")


def decode_positions(reader: Reader, segments: Sequence[Segment]) -> list[Chosen]:
    """The inverse of ``encode_positions``: the kept entries of each segment.

    Raises:
        WireError: the bytes are not such an encoding.
    """
    decoder = Decoder(reader.words(sum(segment.size for segment in segments)))
    high, widths = [], []
    for segment, model in zip(segments, _models(segments), strict=True):
        high.append(_without_escapes(decoder, segment, model))
        widths.append(model.width)
    decoder.close()
    counts = [len(gaps) * width for gaps, width in zip(high, widths, strict=True)]
    bits, places, at = take_bits(reader, sum(counts)), [], 0
    for segment, gaps, width, count in zip(segments, high, widths, counts, strict=True):
        places.append(segment.places(_with_low(gaps, bits[at : at + count], width)))
        at += count
    return places


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


class _Model(NamedTuple):
    """The bits of a gap that are stored raw, and the weights of its high part."""

    width: int
    weights: NDArray[np.float64]


def _models(segments: Sequence[Segment]) -> Iterator[_Model]:
    """Weights of the high parts 0 to ``_ESCAPE - 1`` and of the escape: ``q ** j (1 - q)`` and ``q ** _ESCAPE``.

    Whole numbers computed by products of doubles alone, so that they are the same on every machine; of many segments
    at a time, as NumPy's calls would take most of the time.
    """
    for start in range(0, len(segments), _TOGETHER):
        some = segments[start : start + _TOGETHER]
        widths = [segment.low_bits for segment in some]
        q = [1.0 - segment.rare / segment.size if segment.rare else 1.0 for segment in some]
        for i, width in enumerate(widths):
            for _ in range(width):
                q[i] *= q[i]
        weights = np.empty((len(some), _ESCAPE + 1))
        weights[:] = np.reshape(q, (-1, 1))
        weights[:, 0] = 1.0
        np.multiply.accumulate(weights, axis=1, out=weights)
        weights[:, :_ESCAPE] *= np.reshape([(1.0 - one) * _UNIT for one in q], (-1, 1))
        weights[:, _ESCAPE] *= _UNIT
        np.floor(weights, out=weights)
        yield from map(_Model, widths, weights)


def _low(gaps: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """The lowest ``width`` bits of every gap, one bit per byte."""
    bits = np.empty((len(gaps), width), np.uint8)
    for bit in range(width):
        bits[:, bit] = gaps >> bit & 1
    return bits.reshape(-1)


def _with_low(high: NDArray[np.int64], bits: NDArray[np.uint8], width: int) -> NDArray[np.int64]:
    """Gaps from their high parts and the bits of ``_low``."""
    if not width:
        return high
    gaps, rows = high << width, bits.reshape(-1, width)
    for bit in range(width):
        gaps += rows[:, bit].astype(np.int64) << bit
    return gaps


def _in_bytes(high: NDArray[np.int64]) -> NDArray[np.uint8]:
    if int(high.max()) < _LONG:
        return high.astype(np.uint8)
    raw = np.full(len(high) + int((high // _LONG).sum()), _LONG, np.uint8)
    raw[np.cumsum(high // _LONG + 1) - 1] = high % _LONG
    return raw


def _with_escapes(high: NDArray[np.intp]) -> NDArray[np.int32]:
    if not high.size or int(high.max()) < _ESCAPE:
        return high.astype(np.int32)
    symbols = np.full(int((high // _ESCAPE + 1).sum()), _ESCAPE, np.int32)
    symbols[np.cumsum(high // _ESCAPE + 1) - 1] = high % _ESCAPE
    return symbols


def _without_escapes(decoder: Decoder, segment: Segment, model: _Model) -> NDArray[np.int64]:
    missing, pieces, escapes = segment.rare, [], 0
    if not missing:
        return np.zeros(0, np.int64)
    while missing:
        pieces.append(decoder.decode(model.weights, missing))
        missing = int(np.count_nonzero(pieces[-1] == _ESCAPE))
        escapes += missing
        if escapes * (_ESCAPE << model.width) > segment.size:
            raise WireError("a position behind the last entry")
    if not escapes:
        return pieces[0].astype(np.int64)
    symbols = np.concatenate(pieces)
    ends = np.flatnonzero(symbols != _ESCAPE)
    high: NDArray[np.int64] = symbols[ends].astype(np.int64) + _ESCAPE * (np.diff(ends, prepend=-1) - 1)
    return high

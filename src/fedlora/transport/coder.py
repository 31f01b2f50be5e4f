"""Range coding of positions and symbols, and positions drawn from a seed; ``docs/wire-format.md`` has every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from fedlora.errors import WireError


class Segment(NamedTuple):
    """A run of entries whose positions share one probability: how many there are, and how many are kept."""

    size: int
    kept: int

    @property
    def mixed(self) -> bool:
        """Whether some are kept and some are not; otherwise positions cost nothing."""
        return 0 < self.kept < self.size


def encode_positions(kept: NDArray[np.bool_], segments: Sequence[Segment]) -> bytes:
    """Range-coded positions as 32-bit words.

    Args:
        kept: one bool for each entry of each segment, in order.
        segments: their sizes and counts.
    """
    encoder = constriction.stream.queue.RangeEncoder()
    start = 0
    for segment in segments:
        if segment.mixed:
            encoder.encode(kept[start : start + segment.size].astype(np.int32), _bernoulli(segment))
        start += segment.size
    return _to_bytes(encoder)


def decode_positions(raw: bytes | memoryview, segments: Sequence[Segment]) -> NDArray[np.bool_]:
    """The inverse of ``encode_positions``, held to the stated counts.

    Raises:
        WireError: the words hold something else.
    """
    decoder = _decoder(raw)
    kept = np.empty(sum(segment.size for segment in segments), dtype=np.bool_)
    start = 0
    for segment in segments:
        run = kept[start : start + segment.size]
        if segment.mixed:
            run[:] = _decode(decoder, _bernoulli(segment), segment.size)
            if np.count_nonzero(run) != segment.kept:
                raise WireError("another number of positions than is stated")
        else:
            run[:] = segment.kept > 0
        start += segment.size
    if not decoder.maybe_exhausted():
        raise WireError("more position bytes than positions")
    return kept


def encode_symbols(symbols: NDArray[np.int32], counts: NDArray[np.int64]) -> bytes:
    """Range-coded symbols as 32-bit words.

    Args:
        symbols: from ``0`` to ``len(counts) - 1``.
        counts: how often each occurs.
    """
    used = np.flatnonzero(counts)
    if len(used) < 2:
        return b""
    rank = np.zeros(len(counts), np.int32)
    rank[used] = np.arange(len(used))
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(rank[symbols], _categorical(counts[used]))
    return _to_bytes(encoder)


def decode_symbols(raw: bytes | memoryview, counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The inverse of ``encode_symbols``, held to the stated counts.

    Raises:
        WireError: the words hold something else.
    """
    used = np.flatnonzero(counts).astype(np.int32)
    decoder = _decoder(raw)
    total = int(counts.sum())
    if len(used) < 2:
        symbols = np.repeat(used, total)
    else:
        symbols = used[_decode(decoder, _categorical(counts[used]), total)]
        if not np.array_equal(np.bincount(symbols, minlength=len(counts)), counts):
            raise WireError("other symbols than are counted")
    if not decoder.maybe_exhausted():
        raise WireError("more symbol bytes than symbols")
    return symbols


def random_positions(seed: int, name: str, size: int, count: int) -> NDArray[np.intp]:
    """``count`` of ``size`` positions, ascending: those whose numbers in a SplitMix64 stream are smallest.

    The stream starts at the XXH3-64 of the tensor's name, seeded with ``seed``; no two numbers of it are equal.

    Args:
        seed: 64 bits, shared by both ends.
        name: of the tensor, so that each has places of its own.
        size: entries of the tensor.
        count: how many are drawn, at most ``size``.
    """
    if count in (0, size):
        return np.arange(count)
    draws = splitmix(xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed=seed), size)
    return np.sort(np.argpartition(draws, count - 1)[:count])


def splitmix(seed: int, size: int) -> NDArray[np.uint64]:
    """The first ``size`` numbers of SplitMix64 from ``seed``: the same on every machine and in every version.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (variant 13).
    """
    draws = np.arange(1, size + 1, dtype=np.uint64)
    draws *= np.uint64(0x9E3779B97F4A7C15)  # unsigned arithmetic wraps around, as it must here
    draws += np.uint64(seed % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        draws ^= draws >> np.uint64(shift)
        draws *= np.uint64(factor)
    draws ^= draws >> np.uint64(31)
    return draws


def _bernoulli(segment: Segment) -> Any:
    """The model of one position; a quotient of integers is the same double everywhere."""
    smallest = 2.0**-24  # the resolution of the coder
    share = min(max(segment.kept / segment.size, smallest), 1 - smallest)
    return constriction.stream.model.Bernoulli(share, perfect=False)


def _categorical(counts: NDArray[np.int64]) -> Any:
    return constriction.stream.model.Categorical(counts.astype(np.float64), perfect=False, lazy=False)


def _to_bytes(encoder: Any) -> bytes:
    return bytes(encoder.get_compressed().astype("<u4", copy=False).tobytes())


def _decoder(raw: bytes | memoryview) -> Any:
    return constriction.stream.queue.RangeDecoder(np.frombuffer(raw, dtype="<u4").astype(np.uint32))


def _decode(decoder: Any, model: Any, size: int) -> NDArray[np.int32]:
    try:
        decoded: NDArray[np.int32] = decoder.decode(model, size)
    except AssertionError as error:  # the coder's word for a stream that no encoder writes
        raise WireError("positions or symbols that cannot be decoded") from error
    return decoded

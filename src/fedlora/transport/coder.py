"""Range coding, bit packing, and a random generator that is the same on every machine; see ``docs/wire-format.md``."""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import WireError
from fedlora.transport.framing import Reader

_MANY = 1 << 15  # entries from which it pays to look at eight at a time
_PIECE = 1 << 18  # entries that are looked at together, so that what is computed of them takes little memory


class Encoder:
    """A range encoder: symbols to 32-bit words."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def encode(self, symbols: NDArray[np.int32], weights: NDArray[np.float64]) -> None:
        """Appends symbols.

        Args:
            symbols: from ``0`` to ``len(weights) - 1``.
            weights: the relative probability of each symbol, in any unit.
        """
        self._coder.encode(symbols, _model(weights))

    def to_bytes(self) -> bytes:
        """The words, little-endian, without trailing zeros: a decoder reads zeros past the end."""
        words = self._coder.get_compressed()
        used = np.flatnonzero(words)
        return bytes(words[: used[-1] + 1 if used.size else 0].astype("<u4", copy=False).tobytes())


class Decoder:
    """The inverse of ``Encoder``.

    Args:
        raw: whole words.
    """

    def __init__(self, raw: memoryview) -> None:
        words = np.frombuffer(raw, dtype="<u4").astype(np.uint32)
        if words.size and not words[-1]:
            raise WireError("more words than symbols need")
        self._num_words, self._num_symbols = words.size, 0
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def decode(self, weights: NDArray[np.float64], size: int) -> NDArray[np.int32]:
        """The next ``size`` symbols.

        Raises:
            WireError: no encoder writes such words.
        """
        self._num_symbols += size
        try:
            symbols: NDArray[np.int32] = self._coder.decode(_model(weights), size)
        except AssertionError as error:  # how the coder reports it
            raise WireError("symbols that cannot be decoded") from error
        return symbols

    def close(self) -> None:
        """Checks that nothing is left.

        Raises:
            WireError: words are left that no symbol needs.
        """
        if not self._coder.maybe_exhausted() or (self._num_words and not self._num_symbols):
            raise WireError("more words than symbols need")


def encode_symbols(symbols: NDArray[np.int32], counts: NDArray[np.int64]) -> bytes:
    """Encodes symbols; the result is empty if all are equal.

    Args:
        symbols: from ``0`` to ``len(counts) - 1``.
        counts: how often each occurs.
    """
    used = np.flatnonzero(counts)
    encoder = Encoder()
    if len(used) > 1:
        encoder.encode(_ranks(symbols, used, len(counts)), counts[used].astype(np.float64))
    return encoder.to_bytes()


def _ranks(symbols: NDArray[np.int32], used: NDArray[np.intp], size: int) -> NDArray[np.int32]:
    """The places of the symbols among those in use."""
    if used[-1] - used[0] == len(used) - 1:
        return symbols - np.int32(used[0]) if used[0] else symbols
    ranks = np.zeros(size, np.int32)
    ranks[used] = np.arange(len(used))
    return ranks[symbols]


def decode_symbols(raw: memoryview, counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The inverse of ``encode_symbols``; the result must match the stated counts.

    Raises:
        WireError: the words do not decode to symbols with these counts.
    """
    used = np.flatnonzero(counts).astype(np.int32)
    decoder = Decoder(raw)
    if len(used) < 2:
        symbols = np.repeat(used, counts[used])
    else:
        symbols = decoder.decode(counts[used].astype(np.float64), int(counts.sum()))
        if not np.array_equal(np.bincount(symbols, minlength=len(used)), counts[used]):
            raise WireError("other symbols than are counted")
        if used[-1] - used[0] == len(used) - 1:
            symbols += used[0]
        else:
            symbols = used[symbols]
    decoder.close()
    return symbols


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


def where_true(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """``np.flatnonzero``, in half the time where few are true: it stalls at each of these, so eight are looked at
    together."""
    if len(mask) < _MANY or 10 * np.count_nonzero(mask) > len(mask):
        return np.flatnonzero(mask)
    found = [_where_few(mask[start : start + _PIECE], start) for start in range(0, len(mask), _PIECE)]
    return found[0] if len(found) == 1 else np.concatenate(found)


def _where_few(mask: NDArray[np.bool_], start: int) -> NDArray[np.intp]:
    """``where_true`` of a piece that begins at ``start``."""
    whole = len(mask) & -8
    words = mask[:whole].view(np.uint64)
    used = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[used].view(np.bool_))
    used -= np.arange(len(used))
    used *= 8
    used += start
    found += used[found >> 3]
    return found if whole == len(mask) else np.concatenate([found, np.flatnonzero(mask[whole:]) + (start + whole)])


def pack_bits(bits: NDArray[np.uint8] | NDArray[np.bool_]) -> bytes:
    """Bits packed into bytes, lowest bit first."""
    return np.packbits(bits, bitorder="little").tobytes()


def take_bits(reader: Reader, count: int) -> NDArray[np.uint8]:
    """The inverse of ``pack_bits``.

    Raises:
        WireError: a padding bit is not zero.
    """
    return unpack_bits(np.frombuffer(reader.take(-(-count // 8)), dtype=np.uint8), count)


def unpack_bits(raw: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """The first ``count`` bits of bytes, lowest first.

    Raises:
        WireError: there are other than as many bytes as these take, or a padding bit is not zero.
    """
    if len(raw) != -(-count // 8):
        raise WireError(f"{len(raw)} bytes instead of {-(-count // 8)} for {count} bits")
    if count % 8 and raw[-1] >> count % 8:
        raise WireError("bits after the last that are not zero")
    return np.unpackbits(raw, count=count, bitorder="little")


def _model(weights: NDArray[np.float64]) -> Any:
    return constriction.stream.model.Categorical(weights, perfect=False, lazy=False)

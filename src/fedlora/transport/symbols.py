"""Coding of quantised values: small integers, raw, Huffman coded, or range coded with their counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import WireError
from fedlora.transport.coder import decode_symbols, encode_symbols, pack_bits, take_bits, unpack_bits
from fedlora.transport.deflate import deflate, inflate
from fedlora.transport.framing import Reader, varint

Symbols = NDArray[np.int8]

_RAW, _CLASSES, _COUNTED, _HUFFMAN, _HALVES, _SIGNS = range(6)  # ways to write symbols
_PER_SYMBOL = 64  # values per possible symbol above which counting symbols beats counting classes
_FEWEST = 16 << 10  # bytes of raw symbols from which a Huffman code's table costs little
_SAMPLE, _LOSS = 1 << 15, 1.008  # of all symbols, how many are looked at; the bits that half the time may cost


def encode(symbols: Symbols, bits: int) -> list[bytes | memoryview]:
    """Encodes symbols: many of them by Huffman codes, few by a range coder, or raw if that is no longer.

    Args:
        symbols: integers of magnitude ``largest_of(bits)`` at most.
        bits: of a raw symbol; 1, 2, 4 or 8.
    """
    largest = largest_of(bits)
    mode = _RAW
    chunks: list[bytes | memoryview] = []
    if largest == 1 and symbols.all():
        negative = symbols < 0
        mode, chunks = _SIGNS, [pack_bits(negative)]
        if abs(len(symbols) - 2 * np.count_nonzero(negative)) <= len(symbols) // 8:  # they cost a bit in any coding
            return [bytes([mode]), *chunks]
    width = max(bits, 2)  # a sign or zero takes two
    raw = _to_raw(symbols, width)
    if mode == _RAW and bits > 1:
        chunks = [raw.data]
    other, coded = _encode_entropy(symbols, raw, width)
    if not chunks or sum(map(len, coded)) < sum(map(len, chunks)):
        mode, chunks = other, coded
    return [bytes([mode]), *chunks]


def _encode_entropy(symbols: Symbols, raw: NDArray[np.uint8], width: int) -> tuple[int, list[bytes | memoryview]]:
    """A coding that takes fewer bits for more frequent symbols, and its bytes; ``raw`` are ``width`` bits of each."""
    if width * len(symbols) >= 8 * _FEWEST:
        if width == 8 and _low_is_random(symbols):  # half of the bytes take half of the time
            return _HALVES, [deflate(_to_raw(symbols >> 4, 4)), _to_raw(symbols, 4).data]
        return _HUFFMAN, [deflate(raw)]
    largest = largest_of(width)
    if len(symbols) >= _PER_SYMBOL * (2 * largest + 1):
        return _COUNTED, [_encode_counted(symbols.astype(np.int32), largest)]
    return _CLASSES, [_encode_classes(symbols, largest)]


def decode(reader: Reader, bits: int, total: int) -> Symbols:
    """The inverse of ``encode``.

    Raises:
        WireError: the bytes are not ``total`` symbols of so many bits.
    """
    largest, mode, width = largest_of(bits), reader.byte(), max(bits, 2)
    if mode == _RAW and bits > 1:
        symbols = _from_raw(np.frombuffer(reader.take(-(-bits * total // 8)), np.uint8), bits, total)
    elif mode == _HUFFMAN:
        symbols = _from_raw(inflate(reader, -(-width * total // 8)), width, total)
    elif mode == _HALVES and bits == 8:
        symbols = _decode_halves(reader, total)
    elif mode == _SIGNS and largest == 1:
        symbols = 1 - 2 * take_bits(reader, total).view(np.int8)
    elif mode == _COUNTED:
        symbols = decode_symbols(*_counted(reader, 2 * largest + 1, total)).astype(np.int8) - np.int8(largest)
    elif mode == _CLASSES:
        symbols = _decode_classes(reader, largest, total)
    else:
        raise WireError(f"the unknown coding {mode} of symbols")
    if total and int(symbols.min()) < -largest:
        raise WireError("a symbol beyond the largest")
    return symbols


def largest_of(bits: int) -> int:
    """The largest magnitude of a symbol of ``bits`` bits; a lone bit is a sign."""
    return max(1, (1 << bits - 1) - 1)


def _low_is_random(symbols: Symbols) -> bool:
    """Whether the lower four of eight bits cost four bits, nearly; by a sample, as this is about time alone."""
    sample = symbols[:: -(-len(symbols) // _SAMPLE)].view(np.uint8)
    counts = np.bincount(sample, minlength=256).astype(np.float64)
    return _entropy(counts.reshape(16, 16).sum(axis=1)) + 4.0 <= _LOSS * _entropy(counts)


def _entropy(counts: NDArray[np.float64]) -> float:
    """Bits per symbol, by Shannon's formula."""
    share = counts[counts > 0] / counts.sum()
    return -float((share * np.log2(share)).sum())


def _decode_halves(reader: Reader, total: int) -> Symbols:
    size = -(-total // 2)
    upper = _apart(inflate(reader, size), 4, total)
    upper *= np.int8(16)
    upper |= _apart(np.frombuffer(reader.take(size), np.uint8), 4, total) & np.int8(15)
    return upper


def _to_raw(symbols: Symbols, width: int) -> NDArray[np.uint8]:
    """The lowest ``width`` bits of each symbol, packed into bytes from the lowest bit on."""
    raw = symbols.view(np.uint8)
    if width == 8:
        return raw
    raw = np.append(raw, np.zeros(-len(raw) % (8 // width), np.uint8)) if len(raw) * width % 8 else raw
    raw = raw & np.uint8((1 << width) - 1)
    while width < 8:  # two neighbours in one
        pairs = raw.view("<u2")
        raw = (pairs | pairs >> (8 - width)).astype(np.uint8)
        width *= 2
    return raw


def _from_raw(raw: NDArray[np.uint8], width: int, total: int) -> Symbols:
    """Symbols from two's complement bits.

    Raises:
        WireError: there are other than as many bytes as they take, or bits are left that are not zero.
    """
    if width == 8:
        return _apart(raw, width, total)
    symbols = _apart(raw, width, total)
    symbols *= np.int8(1 << 8 - width)  # NumPy is slow to shift bytes to the left
    symbols >>= np.int8(8 - width)
    return symbols


def _apart(raw: NDArray[np.uint8], width: int, total: int) -> Symbols:
    """``_from_raw`` with other bits above the lowest ``width`` of each symbol."""
    used = width * total % 8
    if len(raw) != -(-width * total // 8):
        raise WireError(f"{len(raw)} bytes instead of {-(-width * total // 8)} for {total} symbols")
    if used and raw[-1] >> used:
        raise WireError("bits after the last that are not zero")
    half = 4
    while half >= width:  # a byte and its upper half, side by side
        pairs = raw.astype("<u2")
        pairs |= pairs << np.uint16(8 - half)
        raw, half = pairs.view(np.uint8), half // 2
    return raw.view(np.int8)[:total]


def _classes() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The class of every magnitude, and the smallest magnitude of every class.

    Magnitudes up to 127 are in 28 classes: 0 to 15 one each, then four per octave, with the lowest bits kept apart: two
    of magnitudes from 16 on, three from 32 on, four from 64 on.
    """
    magnitudes = np.arange(128)
    octave = np.maximum(np.int32(np.floor(np.log2(np.maximum(magnitudes, 1)))), 4)
    of = np.where(magnitudes < 16, magnitudes, 16 + 4 * (octave - 4) + (magnitudes >> (octave - 2) & 3))
    return of.astype(np.uint8), np.searchsorted(of, np.arange(28)).astype(np.uint8)


_CLASS, _BASE = _classes()
_BITS = {
    width: unpack_bits(np.arange(1 << width, dtype=np.uint8), 8 << width).reshape(-1, 8)[:, :width].copy()
    for width in (2, 3, 4)
}


def _encode_counted(symbols: NDArray[np.int32], largest: int) -> bytes:
    """The counts of symbols, from the smallest on, then the coded symbols."""
    shifted = symbols + np.int32(largest)
    counts = np.bincount(shifted, minlength=2 * largest + 1)
    words = encode_symbols(shifted, counts)
    return b"".join([*map(varint, counts.tolist()), varint(len(words) // 4), words])


def _counted(reader: Reader, size: int, total: int) -> tuple[memoryview, NDArray[np.int64]]:
    """The coded symbols, and the count of each of the ``size`` possible symbols."""
    counts = np.array([reader.varint(total) for _ in range(size)], np.int64)
    if counts.sum() != total:
        raise WireError("another number of symbols than values")
    return reader.words(total), counts


def _encode_classes(symbols: Symbols, largest: int) -> bytes:
    """The counts of classes, the coded classes, the signs of nonzero values, and the lowest bits by octave."""
    magnitudes = np.abs(symbols).view(np.uint8)
    classes = _CLASS[magnitudes] if largest > 15 else magnitudes
    counts = np.bincount(classes, minlength=int(_CLASS[largest]) + 1)
    words = encode_symbols(classes.astype(np.int32), counts)
    bits = [(symbols < 0)[np.flatnonzero(magnitudes != 0)].view(np.uint8)]
    if largest > 15:
        bits += [_to_bits(magnitudes[_of_width(magnitudes, width)], width) for width in _BITS]
    return b"".join([*map(varint, counts.tolist()), varint(len(words) // 4), words, pack_bits(np.concatenate(bits))])


def _decode_classes(reader: Reader, largest: int, total: int) -> Symbols:
    words, counts = _counted(reader, int(_CLASS[largest]) + 1, total)
    magnitudes = _BASE[decode_symbols(words, counts)]
    nonzero = np.flatnonzero(magnitudes != 0)
    octaves = [_of_width(magnitudes, width) for width in _BITS]
    bits = take_bits(reader, len(nonzero) + sum(width * len(of) for width, of in zip(_BITS, octaves, strict=True)))
    at = len(nonzero)
    for width, of in zip(_BITS, octaves, strict=True):
        magnitudes[of] += _unsigned(bits[at : at + width * len(of)], width)
        at += width * len(of)
    signs = np.ones(total, np.int8)
    signs[nonzero] -= 2 * bits[: len(nonzero)].view(np.int8)
    signs *= magnitudes.view(np.int8)
    return signs


def _of_width(magnitudes: NDArray[np.uint8], width: int) -> NDArray[np.intp]:
    """Where so many lowest bits are kept apart."""
    return np.flatnonzero(magnitudes >> np.uint8(width + 2) == 1)


def _to_bits(magnitudes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The lowest ``width`` bits of each magnitude, lowest first."""
    return _BITS[width].take(magnitudes & np.uint8((1 << width) - 1), axis=0).reshape(-1)


def _unsigned(bits: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The inverse of ``_to_bits``."""
    columns = bits.reshape(-1, width)
    numbers = columns[:, 0].copy()
    for bit in range(1, width):
        numbers += columns[:, bit] * np.uint8(1 << bit)
    return numbers

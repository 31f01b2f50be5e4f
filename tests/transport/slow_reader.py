"""The byte format again, one number at a time in plain Python, from its description and not from its code."""

from __future__ import annotations

import math
import struct
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import xxhash
from fuzz.wire_harness import ENVELOPE

EMPTY, DENSE, BITMAP, CODED, POOLED, SEEDED, BOX = range(7)
CLASSES = [(m, 0) for m in range(16)] + [(16 << o | q << (2 + o), 2 + o) for o in range(3) for q in range(4)]
"""Smallest magnitude and number of lowest bits of each class."""


def slow_unpack(raw: bytes, shapes: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, list[float]]]:
    """Flat lists of what a message says of tensors of these shapes."""
    data = list(raw[ENVELOPE:])
    out = {part: _section(data, tensors) for part, tensors in shapes.items()}
    assert not data
    return out


def _section(data: list[int], shapes: dict[str, list[int]]) -> dict[str, list[float]]:
    code = data.pop(0)
    bits, log_block = _take(data, 2) if code == 4 else (0, 0)
    masks = _layout(data, shapes)
    runs = [sum(mask) for mask in masks]
    values = iter(_uniform(data, bits, log_block, runs) if code == 4 else _floats(data, code, sum(runs)))
    return {name: [next(values) if kept else 0.0 for kept in mask] for name, mask in zip(shapes, masks, strict=True)}


def _layout(data: list[int], shapes: dict[str, list[int]]) -> list[list[bool]]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    first = data.pop(0)
    if first == 255:
        halves = [half for byte in _take(data, (len(sizes) + 1) // 2) for half in (byte % 16, byte // 16)]
        layouts = halves[: len(sizes)]
    else:
        layouts = [first] * len(sizes)
    seed = int.from_bytes(bytes(_take(data, 8)), "little") if SEEDED in layouts else 0
    masks = [[layout == DENSE] * size for layout, size in zip(layouts, sizes, strict=True)]
    jobs = []  # places to fill, entries, how many are kept
    for mask, layout, (name, shape) in zip(masks, layouts, shapes.items(), strict=True):
        if layout == CODED:
            jobs.append(([(mask, i) for i in range(len(mask))], _varint(data)))
        elif layout == SEEDED:
            for i in slow_places(seed, name, len(mask), _varint(data)):
                mask[i] = True
        elif layout == BITMAP:
            mask[:] = [bool(bit) for bit in _bits(data, len(mask))]
        elif layout == BOX:
            rows, columns = _varint(data), _varint(data)
            width = len(mask) // (shape[0] if len(shape) else 1)
            for i in range(len(mask)):
                mask[i] = i // width < rows and i % width < columns
    pooled = [
        (mask, i) for mask, layout in zip(masks, layouts, strict=True) if layout == POOLED for i in range(len(mask))
    ]
    if POOLED in layouts:
        kept, coding = _varint(data), data.pop(0)
        if coding == 0:
            jobs.append((pooled, kept))
        elif coding == 1:
            for (mask, i), bit in zip(pooled, _bits(_inflated(data), len(pooled)), strict=True):
                mask[i] = bool(bit)
            assert sum(mask[i] for mask, i in pooled) == kept
        else:
            assert coding == 2
            _gaps_in_bytes(data, pooled, kept)
    if jobs:
        _positions(data, jobs)
    return masks


def _gaps_in_bytes(data: list[int], places: list, kept: int) -> None:
    rare, highs, high = min(kept, len(places) - kept), [], 0
    for byte in _inflated(data):
        high += byte
        if byte < 255:
            highs, high = [*highs, high], 0
    assert (len(highs), high) == (rare, 0)
    width = low_bits(len(places), rare)
    _fill(places, kept, highs, width, _bits(data, width * rare))


def _fill(places: list, kept: int, highs: list[int], width: int, raw: list[int]) -> None:
    """Marks what is kept of a run, from the gaps between those of the rarer kind; takes their bits from ``raw``."""
    rarer = bool(highs) and len(highs) == kept
    for mask, i in places:
        mask[i] = kept > 0 and not rarer
    at = -1
    for high in highs:
        at += 1 + (high << width) + _number([raw.pop(0) for _ in range(width)])
        mask, i = places[at]
        mask[i] = rarer


def _inflated(data: list[int]) -> list[int]:
    decoder = zlib.decompressobj(-15)
    raw = decoder.decompress(bytes(_take(data, _varint(data))))
    assert decoder.eof
    assert not decoder.unused_data
    return list(raw)


def _positions(data: list[int], jobs: list) -> None:
    """Gaps between the positions of the rarer kind: high parts, then all low bits."""
    decoder = RangeDecoder(data)
    gaps = []
    for places, kept in jobs:
        rare = min(kept, len(places) - kept)
        gaps.append([])
        weights = gap_weights(len(places), rare) if rare else []
        while len(gaps[-1]) < rare:
            high = 0
            while (symbol := decoder.category(weights)) == 128:
                high += 128
            gaps[-1].append(high + symbol)
    widths = [low_bits(len(places), len(each)) if each else 0 for (places, _), each in zip(jobs, gaps, strict=True)]
    raw = _bits(data, sum(width * len(each) for width, each in zip(widths, gaps, strict=True)))
    for (places, kept), each, width in zip(jobs, gaps, widths, strict=True):
        _fill(places, kept, each, width, raw)


def low_bits(size: int, rare: int) -> int:
    return max([0, *(b for b in range(64) if rare and rare * 2 ** (b + 3) <= size)])


def gap_weights(size: int, rare: int) -> list[float]:
    q = 1 - rare / size
    for _ in range(low_bits(size, rare)):
        q *= q
    powers = list(accumulate([1.0] + [q] * 128, lambda x, y: x * y))
    return [float(math.floor(power * (1 - q) * 2**40)) for power in powers[:-1]] + [
        float(math.floor(powers[-1] * 2**40))
    ]


def _floats(data: list[int], code: int, count: int) -> list[float]:
    raw = bytes(_take(data, count * (4 if code == 1 else 2)))
    if code == 2:
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    return list(struct.unpack(f"<{count}{'e' if code == 3 else 'f'}", raw))


def _uniform(data: list[int], bits: int, log_block: int, runs: list[int]) -> list[float]:
    blocks = []
    for run in runs:
        block = 2**log_block if log_block else max(run, 1)
        blocks += [min(block, run - at) for at in range(0, run, block)]
    scales = _floats(data, 2, len(blocks))
    largest = max(1, 2 ** (bits - 1) - 1)
    total, mode = sum(runs), data.pop(0)
    if mode == 0:
        symbols = _signed(_bits(data, bits * total), bits)
    elif mode == 1:
        symbols = _classes(data, largest, total)
    elif mode == 3:
        symbols = _signed(_bits(_inflated(data), max(2, bits) * total), max(2, bits))
    elif mode == 4:
        upper = _signed(_bits(_inflated(data), 4 * total), 4)
        symbols = [16 * q + low % 16 for q, low in zip(upper, _signed(_bits(data, 4 * total), 4), strict=True)]
    elif mode == 5:
        symbols = [1 - 2 * bit for bit in _bits(data, total)]
    else:
        assert mode == 2
        symbols = [q - largest for q in _coded(data, 2 * largest + 1, total)]
    assert all(abs(q) <= largest for q in symbols)
    each = [scale for scale, length in zip(scales, blocks, strict=True) for _ in range(length)]
    return [q * scale for q, scale in zip(symbols, each, strict=True)]


def _signed(raw: list[int], bits: int) -> list[int]:
    """Two's complement."""
    numbers = [_number(raw[i : i + bits]) for i in range(0, len(raw), bits)]
    return [q - 2**bits if q >= 2 ** (bits - 1) else q for q in numbers]


def _coded(data: list[int], num_symbols: int, total: int) -> list[int]:
    counts = [_varint(data) for _ in range(num_symbols)]
    assert sum(counts) == total
    used = [symbol for symbol, count in enumerate(counts) if count]
    decoder = RangeDecoder(data)
    if len(used) < 2:
        return used * total
    found = [decoder.category([counts[symbol] for symbol in used]) for _ in range(total)]
    return [used[each] for each in found]


def _classes(data: list[int], largest: int, total: int) -> list[int]:
    num_classes = next(i for i, (base, low) in enumerate(CLASSES) if base <= largest < base + 2**low) + 1
    classes = _coded(data, num_classes, total)
    nonzero = sum(each > 0 for each in classes)
    widths = [CLASSES[each][1] for each in classes]
    raw = _bits(data, nonzero + sum(widths))
    signs, low = iter(raw[:nonzero]), raw[nonzero:]
    magnitudes = [CLASSES[each][0] for each in classes]
    for width in (2, 3, 4):
        for i in range(total):
            if widths[i] == width:
                magnitudes[i] += _number([low.pop(0) for _ in range(width)])
    return [-m if m and next(signs) else m for m in magnitudes]


class RangeDecoder:
    """64 bits of state, 32-bit words, 24-bit probabilities. The words leave ``data`` at once."""

    def __init__(self, data: list[int]) -> None:
        raw = bytes(_take(data, 4 * _varint(data)))
        self._words = iter(struct.unpack(f"<{len(raw) // 4}I", raw))
        self._lower, self._span = 0, 2**64 - 1
        self._point = next(self._words, 0) << 32 | next(self._words, 0)

    def category(self, counts: Sequence[float]) -> int:
        factor = (2**24 - len(counts)) / sum(counts)
        before = [0, *accumulate(counts[:-1])]
        return self._next([int(c * factor) + i for i, c in enumerate(before)] + [2**24])

    def _next(self, edges: list[int]) -> int:
        step = self._span >> 24
        found = bisect_right(edges, (self._point - self._lower) % 2**64 // step) - 1
        self._lower = (self._lower + step * edges[found]) % 2**64
        self._span = step * (edges[found + 1] - edges[found])
        if self._span < 2**32:
            self._lower, self._span = (self._lower << 32) % 2**64, self._span << 32
            self._point = (self._point << 32 | next(self._words, 0)) % 2**64
        return found


def slow_places(seed: int, name: str, size: int, count: int) -> list[int]:
    """The places whose numbers in the stream of the tensor's name are smallest."""
    start = xxhash.xxh3_64_intdigest(name.encode(), seed=seed)
    numbers = [slow_splitmix(start, i) for i in range(size)]
    return sorted(sorted(range(size), key=numbers.__getitem__)[:count])


def slow_splitmix(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _take(data: list[int], count: int) -> list[int]:
    assert len(data) >= count
    head, data[:count] = data[:count], []
    return head


def _varint(data: list[int]) -> int:
    byte = data.pop(0)
    return byte if byte < 128 else byte - 128 + 128 * _varint(data)


def _bits(data: list[int], count: int) -> list[int]:
    unpacked = [byte >> i & 1 for byte in _take(data, (count + 7) // 8) for i in range(8)]
    assert not any(unpacked[count:])
    return unpacked[:count]


def _number(bits: list[int]) -> int:
    return sum(bit << i for i, bit in enumerate(bits))

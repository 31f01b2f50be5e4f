"""An encoder of messages made from ``docs/wire-format.md`` alone, with choices of its own at random."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib

import constriction
import numpy as np
import xxhash

Tensors = dict[str, np.ndarray]
SCALE = 0.5


class Writer:
    """Writes the same values in many ways.

    Args:
        seed: of its choices.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def message(self, parts: dict[str, Tensors], formats: dict[str, tuple[int, int, int]], reference: int) -> bytes:
        """All parts.

        Args:
            parts: float32 arrays that the format of their part represents exactly.
            formats: of each part, the code of its number format, and for ``uniform`` bits and base-2 logarithm of
                blocks; its values are multiples of ``SCALE``.
            reference: its code.
        """
        body = b"".join(self._section(tensors, *formats[part]) for part, tensors in parts.items())
        named = [[part, [[name, list(v.shape)] for name, v in tensors.items()]] for part, tensors in parts.items()]
        template = xxhash.xxh3_64_intdigest(json.dumps(named, separators=(",", ":")).encode()) % 2**32
        checksum = xxhash.xxh3_64_intdigest(body, seed=template + (reference << 32))
        return struct.pack("<3sBBIQ", b"FLW", 3, reference, template, checksum) + body

    def _section(self, tensors: Tensors, code: int, bits: int, log_block: int) -> bytes:
        flat = [value.reshape(-1) for value in tensors.values()]
        layouts, fields, masks = self._layouts(tensors)
        chunks = [bytes([code, bits, log_block] if code == 4 else [code]), table(layouts)]
        seed = self._rng.randrange(2**64)
        for i, (name, layout) in enumerate(zip(tensors, layouts, strict=True)):
            if layout == 5:
                order = drawn(name, seed, len(flat[i]))
                count = max((order.index(place) + 1 for place in np.flatnonzero(masks[i])), default=0)
                masks[i] = np.isin(np.arange(len(flat[i])), order[:count])
                fields[i] = varint(count)
        chunks += [seed.to_bytes(8, "little")] if 5 in layouts else []
        chunks += [*fields, self._positions(layouts, masks)]
        stored = [value[mask] for value, mask in zip(flat, masks, strict=True)]
        values = np.concatenate(stored) if stored else np.zeros(0, np.float32)
        if code == 4:
            chunks.append(self._uniform(stored, bits, log_block))
        elif code == 2:
            chunks.append((values.view(np.uint32) >> 16).astype("<u2").tobytes())
        else:
            chunks.append(values.astype("<f4" if code == 1 else "<f2").tobytes())
        return b"".join(chunks)

    def _layouts(self, tensors: Tensors) -> tuple[list[int], list[bytes], list[np.ndarray]]:
        same = self._rng.choice([None, None, 1, 2, 3, 4, 5, 6])
        layouts, fields, masks = [], [], []
        for value in tensors.values():
            mask = value.reshape(-1) != 0
            possible = [1, 2, 3, 4, 5, 6] + [0] * (not mask.any())
            layout = same or self._rng.choice(possible)
            field = b""
            if layout == 1:
                mask = np.ones(mask.size, np.bool_)
            elif layout == 2:
                field = packed(mask)
            elif layout == 3:
                field = varint(int(mask.sum()))
            elif layout == 6:
                grid = mask.reshape(value.shape[0], -1) if value.ndim and mask.size else mask.reshape(1, -1)
                rows, columns = (1 + max(np.flatnonzero(grid.any(axis=axis)), default=-1) for axis in (1, 0))
                grid = np.zeros(grid.shape, np.bool_)
                grid[:rows, :columns] = True
                mask, field = grid.reshape(-1), varint(int(rows)) + varint(int(columns))
            layouts.append(layout)
            fields.append(field)
            masks.append(mask)
        return layouts, fields, masks

    def _positions(self, layouts: list[int], masks: list[np.ndarray]) -> bytes:
        runs = [mask for mask, layout in zip(masks, layouts, strict=True) if layout == 3]
        pool = [mask for mask, layout in zip(masks, layouts, strict=True) if layout == 4]
        chunks = []
        if pool:
            run, coding = np.concatenate(pool), self._rng.randrange(3)
            chunks += [varint(int(run.sum())), bytes([coding])]
            if coding == 0:
                runs.append(run)
            elif coding == 1:
                chunks.append(self._deflated(packed(run)))
            else:
                highs, low, _ = gaps(run)
                chunks += [
                    self._deflated(b"".join(b"\xff" * (h // 255) + bytes([h % 255]) for h in highs)),
                    packed(low),
                ]
        if runs:
            coder, lows = RangeEncoder(), []
            for run in runs:
                highs, low, weights = gaps(run)
                symbols = [s for high in highs for s in [128] * (high // 128) + [high % 128]]
                coder.encode(symbols, weights)
                lows.append(low)
            chunks += [coder.stream(), packed(np.concatenate(lows))]
        return b"".join(chunks)

    def _uniform(self, stored: list[np.ndarray], bits: int, log_block: int) -> bytes:
        largest = max(1, 2 ** (bits - 1) - 1)
        blocks = sum(-(-len(value) // (2**log_block if log_block else max(len(value), 1))) for value in stored)
        scales = [int(np.float32(SCALE).view(np.uint32)) >> 16] * blocks
        q = np.rint(np.concatenate([np.zeros(0), *stored]) / SCALE).astype(np.int64)
        possible = [1, 2, 3] + [0] * (bits > 1) + [4] * (bits == 8) + [5] * (bits < 4 and bool(q.all()))
        coding = self._rng.choice(possible)
        return np.array(scales, "<u2").tobytes() + bytes([coding]) + self._symbols(q, bits, largest, coding)

    def _symbols(self, q: np.ndarray, bits: int, largest: int, coding: int) -> bytes:
        if coding == 0:
            return packed(low_bits(q, bits))
        if coding == 1:
            return classes(q, largest)
        if coding == 2:
            return counted(q + largest, 2 * largest + 1)
        if coding == 3:
            return self._deflated(packed(low_bits(q, max(2, bits))))
        if coding == 4:
            return self._deflated(packed(low_bits(q >> 4, 4))) + packed(low_bits(q, 4))
        return packed(q < 0)

    def _deflated(self, raw: bytes) -> bytes:
        level = self._rng.choice([0, 1, 9])
        coder = zlib.compressobj(level, zlib.DEFLATED, -15, 9, self._rng.choice([0, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED]))
        stream = coder.compress(raw) + coder.flush()
        return varint(len(stream)) + stream


class RangeEncoder:
    """The page's coder on one large number; ``constriction``'s is as good for long streams."""

    def __init__(self) -> None:
        self._lower, self._span, self._shifts, self._long = 0, 2**64 - 1, 0, None

    def encode(self, symbols: list[int], weights: list[float]) -> None:
        if not symbols:
            return
        if self._long is None and len(symbols) > 2000:
            assert self._span == 2**64 - 1  # it takes streams from their start only
            self._long = constriction.stream.queue.RangeEncoder()
        if self._long is not None:
            model = constriction.stream.model.Categorical(np.array(weights, np.float64), perfect=False, lazy=False)
            self._long.encode(np.array(symbols, np.int32), model)
            return
        k, total, before = len(weights), sum(weights), [0.0]
        for weight in weights[:-1]:
            before.append(before[-1] + weight)
        edges = [math.floor(b * ((2**24 - k) / total)) + i for i, b in enumerate(before)] + [2**24]
        for symbol in symbols:
            step = self._span >> 24
            self._lower += step * edges[symbol]
            self._span = step * (edges[symbol + 1] - edges[symbol])
            if self._span < 2**32:
                self._lower, self._span, self._shifts = self._lower << 32, self._span << 32, self._shifts + 1

    def stream(self) -> bytes:
        """The number of words, and the words."""
        if self._long is not None:
            words = self._long.get_compressed().tolist()
        else:
            end = (self._lower + 2**32 - 1) >> 32
            words = [end >> 32 * i & 0xFFFFFFFF for i in range(self._shifts, -1, -1)]
        while words and not words[-1]:
            words.pop()
        return varint(len(words)) + np.array(words, "<u4").tobytes()


def gaps(run: np.ndarray) -> tuple[list[int], np.ndarray, list[float]]:
    """The high parts of a run's gaps, all low bits, and the weights of the high parts."""
    size, count = len(run), int(run.sum())
    rare = min(count, size - count)
    if not rare:
        return [], np.zeros(0, np.bool_), []
    places = np.flatnonzero(run == (count <= size - count))
    found = np.diff(places, prepend=-1) - 1
    b = max([0, *(b for b in range(40) if rare * 2 ** (b + 3) <= size)])
    q = 1 - rare / size
    for _ in range(b):
        q = q * q
    power, weights = 1.0, []
    for _ in range(128):
        weights.append(float(math.floor(power * ((1 - q) * 2**40))))
        power = power * q
    return (found >> b).tolist(), low_bits(found, b), [*weights, float(math.floor(power * 2**40))]


def classes(q: np.ndarray, largest: int) -> bytes:
    def class_of(m: int) -> int:
        e = m.bit_length() - 1
        return m if m < 16 else 16 + 4 * (e - 4) + ((m >> (e - 2)) & 3)

    magnitudes = np.abs(q)
    coded = counted(np.array([class_of(m) for m in magnitudes.tolist()], np.int64), class_of(largest) + 1)
    groups = [magnitudes[(magnitudes >= 2**e) & (magnitudes < 2 ** (e + 1))] for e in (4, 5, 6)]
    low = [low_bits(group, e - 2) for e, group in zip((4, 5, 6), groups, strict=True)]
    return coded + packed(np.concatenate([q[q != 0] < 0, *low]))


def counted(symbols: np.ndarray, number: int) -> bytes:
    counts = np.bincount(symbols, minlength=number).tolist()
    used = [symbol for symbol, count in enumerate(counts) if count]
    coder = RangeEncoder()
    if len(used) > 1:
        coder.encode([used.index(s) for s in symbols.tolist()], [float(counts[s]) for s in used])
    return b"".join(map(varint, counts)) + coder.stream()


def drawn(name: str, seed: int, size: int) -> list[int]:
    """All entries, those with the smallest numbers first."""
    state, numbers = xxhash.xxh3_64_intdigest(name.encode(), seed=seed), []
    for _ in range(size):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return sorted(range(size), key=numbers.__getitem__)


def table(layouts: list[int]) -> bytes:
    if len(set(layouts)) < 2:
        return bytes(layouts[:1] or [0])
    padded = [*layouts, 0]
    return bytes([255, *(padded[i] + 16 * padded[i + 1] for i in range(0, len(layouts), 2))])


def low_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    return (numbers[:, None] >> np.arange(width) & 1).astype(np.bool_).reshape(-1)


def packed(flags: np.ndarray) -> bytes:
    return np.packbits(flags, bitorder="little").tobytes()


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)

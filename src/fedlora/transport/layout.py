"""Layouts: which entries of each tensor in a part are stored, encoded in the fewest bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import WireError
from fedlora.core.tree import Tree
from fedlora.transport.coder import pack_bits, take_bits
from fedlora.transport.framing import Reader, varint
from fedlora.transport.positions import Segment, decode_positions, encode_positions, random_positions

EMPTY, DENSE, BITMAP, CODED, POOLED, SEEDED, BOX = range(7)
"""Nothing is stored; everything; one bit per entry; range-coded positions at the tensor's own density; the same at the
common density of all such tensors; positions drawn from a seed; the first rows and columns."""

_MIXED = 255
_PLAIN_BITS = 16  # below this, values are entropy coded, and zeros among them cost as much as their positions would
_WORD_BITS = 64.0  # the overhead of a range coder beyond the entropy
Bools = NDArray[np.bool_]


class Draw(NamedTuple):
    """Positions drawn from a seed: the seed, and the number of positions in each tensor, by name."""

    seed: int
    counts: Mapping[str, int]


class Stored(NamedTuple):
    """A layout: its bytes, the positions of the stored entries, and the number stored of each tensor."""

    raw: bytes
    where: NDArray[np.intp] | None  # None: all of them
    runs: list[int]


class _Choice(NamedTuple):
    layout: int
    bits: float
    box: tuple[int, int] = (0, 0)
    places: NDArray[np.intp] = np.zeros(0, np.intp)


def write_layout(nonzero: Bools, like: Tree, value_bits: float, draw: Draw | None) -> Stored:
    """Chooses the layouts that need the fewest bytes in total, values included.

    Args:
        nonzero: which entries must be stored, all tensors in order.
        like: the tensors, for names and shapes.
        value_bits: the bits needed to store one entry.
        draw: the positions that a seed drew, if the entries were sparsified that way.
    """
    sizes = [value.numel() for value in like.values()]
    total = len(nonzero)
    kept = int(np.count_nonzero(nonzero))
    if kept == total:
        return Stored(_table([DENSE] * len(sizes)), None, sizes)
    if kept == 0:
        return Stored(_table([EMPTY] * len(sizes)), np.zeros(0, np.intp), [0] * len(sizes))
    runs = np.split(nonzero, np.cumsum(sizes)[:-1])
    counts = [int(np.count_nonzero(run)) for run in runs]
    choices = [
        _choices(name, value.shape, run, count, value_bits, draw)
        for (name, value), run, count in zip(like.items(), runs, counts, strict=True)
    ]
    # the cost shared by all coded or all seeded tensors (words and a seed) may be too much for a small part
    without: list[tuple[int, ...]] = [(), (CODED,), *([(SEEDED,), (CODED, SEEDED)] if draw else [])]
    plans = [[min((c for c in each if c.layout not in left), key=_bits) for each in choices] for left in without]
    plans += [[_Choice(POOLED, 0.0) if c.layout == CODED else c for c in plan] for plan in plans]
    plans.append([_Choice(POOLED, 0.0)] * len(sizes))
    costs = [_cost(plan, sizes, counts, value_bits) for plan in plans]
    plan = plans[int(np.argmin(costs))]
    if value_bits >= _PLAIN_BITS and min(costs) >= 8.0 + value_bits * total:
        return Stored(_table([DENSE] * len(sizes)), None, sizes)
    return _write(plan, runs, counts, like, draw)


def read_layout(reader: Reader, like: Tree) -> Stored:
    """The inverse of ``write_layout``.

    Raises:
        WireError: the layout does not exist, or does not fit ``like``.
    """
    sizes = [value.numel() for value in like.values()]
    layouts = _read_table(reader, len(sizes))
    if all(layout == DENSE for layout in layouts):
        return Stored(b"", None, sizes)
    mask = np.zeros(sum(sizes), np.bool_)
    runs = np.split(mask, np.cumsum(sizes)[:-1])
    seed = int.from_bytes(reader.take(8), "little") if SEEDED in layouts else 0
    coded: list[tuple[list[Bools], Segment]] = []
    pooled = [run for run, layout in zip(runs, layouts, strict=True) if layout == POOLED]
    for (name, value), run, layout in zip(like.items(), runs, layouts, strict=True):
        if layout == DENSE:
            run[:] = True
        elif layout == CODED:
            coded.append(([run], Segment(len(run), reader.varint(len(run)))))
        elif layout == SEEDED:
            run[random_positions(seed, name, len(run), reader.varint(len(run)))] = True
        elif layout == BITMAP:
            run[:] = take_bits(reader, len(run)).view(np.bool_)
        elif layout == BOX:
            grid = _grid(run, value.shape)
            rows = reader.varint(grid.shape[0])
            grid[:rows, : reader.varint(grid.shape[1])] = True
    if pooled:
        total = sum(map(len, pooled))
        coded.append((pooled, Segment(total, reader.varint(total))))
    if coded:
        segments = [segment for _, segment in coded]
        found = decode_positions(reader, segments)
        at = 0
        for run in (run for group, _ in coded for run in group):
            run[:] = found[at : at + len(run)]
            at += len(run)
    return Stored(b"", np.flatnonzero(mask), [int(np.count_nonzero(run)) for run in runs])


def _bits(choice: _Choice) -> float:
    return choice.bits


def _choices(
    name: str, shape: Sequence[int], run: Bools, count: int, value_bits: float, draw: Draw | None
) -> list[_Choice]:
    """The layouts that one tensor can have on its own."""
    if count == 0:
        return [_Choice(EMPTY, 0.0)]
    size = len(run)
    choices = [_Choice(DENSE, float(value_bits * size))] if count == size or value_bits >= _PLAIN_BITS else []
    if count < size:
        values = value_bits * count
        choices.append(_Choice(BITMAP, 8.0 * -(-size // 8) + values))
        choices.append(_Choice(CODED, 8.0 * len(varint(count)) + _entropy(size, count) + values))
        if draw and name in draw.counts:
            places = random_positions(draw.seed, name, size, draw.counts[name])
            if np.count_nonzero(run[places]) == count:
                number = 8.0 * len(varint(len(places)))
                choices.append(_Choice(SEEDED, number + value_bits * len(places), places=places))
        grid = _grid(run, shape)
        # if the last row and the last column hold entries, the box is the whole tensor
        if len(shape) > 1 and not (grid[-1].any() and grid[:, -1].any()):
            rows = int(np.flatnonzero(grid.any(axis=1))[-1]) + 1
            columns = int(np.flatnonzero(grid.any(axis=0))[-1]) + 1
            sides = 8.0 * (len(varint(rows)) + len(varint(columns)))
            area = rows * columns
            zeros = _entropy(area, count) + 2 * _WORD_BITS if area > count else 0.0  # as symbols, with their table
            inside = value_bits * area if value_bits >= _PLAIN_BITS else values + zeros
            choices.append(_Choice(BOX, sides + inside, (rows, columns)))
    return choices


def _cost(plan: list[_Choice], sizes: list[int], counts: list[int], value_bits: float) -> float:
    layouts = {choice.layout for choice in plan}
    bits = 8.0 * len(_table([choice.layout for choice in plan])) + sum(choice.bits for choice in plan)
    bits += 64.0 * (SEEDED in layouts) + _WORD_BITS * bool(layouts & {CODED, POOLED})
    if POOLED in layouts:
        size = sum(size for size, choice in zip(sizes, plan, strict=True) if choice.layout == POOLED)
        count = sum(count for count, choice in zip(counts, plan, strict=True) if choice.layout == POOLED)
        bits += 8.0 * len(varint(count)) + _entropy(size, count) + value_bits * count
    return bits


def _entropy(size: int, count: int) -> float:
    """Bits of ``count`` positions out of ``size``, by Shannon's formula."""
    if not 0 < count < size:
        return 0.0
    return -(count * math.log2(count / size) + (size - count) * math.log2(1 - count / size))


def _write(plan: list[_Choice], runs: list[Bools], counts: list[int], like: Tree, draw: Draw | None) -> Stored:
    layouts = [choice.layout for choice in plan]
    chunks = [_table(layouts)]
    if draw and SEEDED in layouts:
        chunks.append(draw.seed.to_bytes(8, "little"))
    stored = [
        np.zeros(len(run), np.bool_) if layout in (EMPTY, SEEDED, BOX) else run
        for layout, run in zip(layouts, runs, strict=True)
    ]
    coded: list[tuple[Bools, Segment]] = []
    for i, (choice, value) in enumerate(zip(plan, like.values(), strict=True)):
        if choice.layout == DENSE:
            stored[i] = np.ones(len(runs[i]), np.bool_)
        elif choice.layout == CODED:
            chunks.append(varint(counts[i]))
            coded.append((runs[i], Segment(len(runs[i]), counts[i])))
        elif choice.layout == SEEDED:
            chunks.append(varint(len(choice.places)))
            stored[i][choice.places] = True
        elif choice.layout == BITMAP:
            chunks.append(pack_bits(runs[i]))
        elif choice.layout == BOX:
            rows, columns = choice.box
            chunks += [varint(rows), varint(columns)]
            _grid(stored[i], value.shape)[:rows, :columns] = True
    pooled = [i for i, layout in enumerate(layouts) if layout == POOLED]
    if pooled:
        count = sum(counts[i] for i in pooled)
        chunks.append(varint(count))
        coded.append((np.concatenate([runs[i] for i in pooled]), Segment(sum(len(runs[i]) for i in pooled), count)))
    if coded:
        chunks.append(encode_positions(np.concatenate([run for run, _ in coded]), [segment for _, segment in coded]))
    return Stored(
        b"".join(chunks), np.flatnonzero(np.concatenate(stored)), [int(np.count_nonzero(run)) for run in stored]
    )


def _grid(run: Bools, shape: Sequence[int]) -> Bools:
    """A view of a tensor as rows and columns: its first axis, and all the others flattened."""
    return run.reshape(shape[0], -1) if len(shape) and len(run) else run.reshape(1, -1)


def _table(layouts: Sequence[int]) -> bytes:
    """One byte if all tensors have the same layout; otherwise 255, then four bits per tensor, lower half first."""
    if len(set(layouts)) < 2:
        return bytes([layouts[0] if layouts else EMPTY])
    padded = [*layouts, 0]
    return bytes([_MIXED, *(padded[i] | padded[i + 1] << 4 for i in range(0, len(layouts), 2))])


def _read_table(reader: Reader, count: int) -> list[int]:
    first = reader.byte()
    if first == _MIXED and count > 1:
        raw = reader.take(-(-count // 2))
        halves = [half for byte in raw for half in (byte & 15, byte >> 4)]
        layouts = halves[:count]
        if any(halves[count:]) or len(set(layouts)) < 2:
            raise WireError("a table of layouts in more bytes than needed")
    else:
        layouts = [first] * count
    if (not count and first != EMPTY) or any(layout > BOX for layout in layouts):
        raise WireError(f"an unknown layout; expected 0 to {BOX}")
    return layouts

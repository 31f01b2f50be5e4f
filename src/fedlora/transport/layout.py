"""Layouts: which entries of each tensor in a part are stored, encoded in the fewest bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import WireError
from fedlora.core.tree import Tree
from fedlora.transport.coder import pack_bits, take_bits
from fedlora.transport.framing import Reader, varint
from fedlora.transport.positions import (
    RANGE,
    Segment,
    decode_pool,
    decode_positions,
    encode_pool,
    encode_positions,
    random_positions,
)

EMPTY, DENSE, BITMAP, CODED, POOLED, SEEDED, BOX = range(7)
"""Nothing is stored; everything; one bit per entry; range-coded positions at the tensor's own density; positions in all
such tensors together, at their common density; positions drawn from a seed; the first rows and columns."""

_MIXED = 255
_PLAIN_BITS = 16  # below this, values are entropy coded, and zeros among them cost as much as their positions would
_WORD_BITS = 64.0  # the overhead of a range coder beyond the entropy
Bools = NDArray[np.bool_]
Costs = NDArray[np.float64]


class Draw(NamedTuple):
    """Positions drawn from a seed: the seed, and the number of positions in each tensor, by name."""

    seed: int
    counts: Mapping[str, int]


class Stored(NamedTuple):
    """A layout: its bytes, the positions of the stored entries, and the number stored of each tensor."""

    raw: bytes
    where: NDArray[np.intp] | None  # None: all of them
    runs: list[int]


class _Part(NamedTuple):
    """The entries of a part that must be stored, and where its tensors lie."""

    nonzero: Bools
    where: NDArray[np.intp]
    sizes: list[int]
    ends: NDArray[np.intp]
    counts: list[int]

    def run(self, i: int) -> Bools:
        """The entries of one tensor."""
        return self.nonzero[self.ends[i] - self.sizes[i] : self.ends[i]]

    def pool(self, layouts: Sequence[int]) -> Segment:
        """The sizes and counts of the pooled tensors together."""
        chosen = [i for i, layout in enumerate(layouts) if layout == POOLED]
        return Segment(sum(self.sizes[i] for i in chosen), sum(self.counts[i] for i in chosen))


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
    where, ends = np.flatnonzero(nonzero), np.cumsum(sizes)
    part = _Part(nonzero, where, sizes, ends, _counts(where, ends))
    shapes = [value.shape for value in like.values()]
    drawn = _drawn(part, list(like), draw) if draw else {}
    boxes = {i: box for i, shape in enumerate(shapes) if (box := _box(part, i, shape))}
    table = _costs(part, value_bits, drawn, boxes)
    # the cost shared by all coded or all seeded tensors (words and a seed) may be too much for a small part
    without: list[tuple[int, ...]] = [(), (CODED,), *([(SEEDED,), (CODED, SEEDED)] if drawn else [])]
    plans = [_cheapest(table, left) for left in without]
    plans += [[POOLED if layout == CODED else layout for layout in plan] for plan in plans]
    plans.append([POOLED] * len(sizes))
    costs = [_cost(plan, table, part, value_bits) for plan in plans]
    plan = plans[int(np.argmin(costs))]
    if value_bits >= _PLAIN_BITS and min(costs) >= 8.0 + value_bits * total:
        return Stored(_table([DENSE] * len(sizes)), None, sizes)
    return _write(plan, part, shapes, drawn, boxes, draw)


def read_layout(reader: Reader, like: Tree) -> Stored:
    """The inverse of ``write_layout``.

    Raises:
        WireError: the layout does not exist, or does not fit ``like``.
    """
    sizes = [value.numel() for value in like.values()]
    layouts = _read_table(reader, len(sizes))
    if all(layout == DENSE for layout in layouts):
        return Stored(b"", None, sizes)
    seed = int.from_bytes(reader.take(8), "little") if SEEDED in layouts else 0
    mask, ends = np.zeros(sum(sizes), np.bool_), np.cumsum(sizes)
    coded: list[tuple[Bools, Segment]] = []
    for (name, value), layout, end in zip(like.items(), layouts, ends.tolist(), strict=True):
        run = mask[end - value.numel() : end]
        if layout == DENSE:
            run[:] = True
        elif layout == CODED:
            coded.append((run, Segment(len(run), reader.varint(len(run)))))
        elif layout == SEEDED:
            run[random_positions(seed, name, len(run), reader.varint(len(run)))] = True
        elif layout == BITMAP:
            run[:] = take_bits(reader, len(run)).view(np.bool_)
        elif layout == BOX:
            grid = _grid(run, value.shape)
            rows, columns = (reader.varint(side) for side in grid.shape)
            grid[:rows, :columns] = True
    if POOLED in layouts:
        _read_pool(reader, mask, layouts, sizes, coded)
    elif coded:
        _fill([run for run, _ in coded], decode_positions(reader, [segment for _, segment in coded]))
    where = np.flatnonzero(mask)
    return Stored(b"", where, _counts(where, ends))


def _read_pool(
    reader: Reader, mask: Bools, layouts: Sequence[int], sizes: Sequence[int], coded: list[tuple[Bools, Segment]]
) -> None:
    """Reads the positions of pooled tensors, and of those that are coded on their own, into ``mask``."""
    runs = [
        run for run, layout in zip(np.split(mask, np.cumsum(sizes)[:-1]), layouts, strict=True) if layout == POOLED
    ]
    size = sum(map(len, runs))
    segment, coding = Segment(size, reader.varint(size)), reader.byte()
    pool = [] if coding != RANGE else [segment]
    if coding != RANGE:
        _fill(runs, decode_pool(reader, segment, coding))
    if coded or pool:
        found = decode_positions(reader, [*(each for _, each in coded), *pool])
        _fill([*(run for run, _ in coded), *(runs if pool else ())], found)


def _fill(runs: Sequence[Bools], found: Bools) -> None:
    """Copies ``found`` into one run after the other."""
    at = 0
    for run in runs:
        run[:] = found[at : at + len(run)]
        at += len(run)


def _counts(where: NDArray[np.intp], ends: NDArray[np.intp]) -> list[int]:
    """The number of positions in each tensor."""
    counts: list[int] = np.diff(np.searchsorted(where, ends), prepend=0).tolist()
    return counts


def _drawn(part: _Part, names: Sequence[str], draw: Draw) -> dict[int, NDArray[np.intp]]:
    """The positions that the seed draws in each tensor, where they include every entry that must be stored."""
    drawn = {}
    for i, name in enumerate(names):
        if name in draw.counts and 0 < part.counts[i] < part.sizes[i]:
            places = random_positions(draw.seed, name, part.sizes[i], draw.counts[name])
            if np.count_nonzero(part.run(i)[places]) == part.counts[i]:
                drawn[i] = places
    return drawn


def _box(part: _Part, i: int, shape: Sequence[int]) -> tuple[int, int] | None:
    """The rows and columns of a tensor that hold entries, if these are not all."""
    if len(shape) < 2 or not 0 < part.counts[i] < part.sizes[i]:
        return None
    grid = _grid(part.run(i), shape)
    if grid[-1].any() and grid[:, -1].any():
        return None
    return int(np.flatnonzero(grid.any(axis=1))[-1]) + 1, int(np.flatnonzero(grid.any(axis=0))[-1]) + 1


def _costs(
    part: _Part, value_bits: float, drawn: Mapping[int, NDArray[np.intp]], boxes: Mapping[int, tuple[int, int]]
) -> Costs:
    """Bits of each layout, in rows, for each tensor on its own; infinite if it cannot have that layout."""
    table = np.full((BOX + 1, len(part.sizes)), np.inf)
    for i, (size, count) in enumerate(zip(part.sizes, part.counts, strict=True)):
        if count == 0:
            table[EMPTY, i] = 0.0
            continue
        values = value_bits * count
        if count == size or value_bits >= _PLAIN_BITS:
            table[DENSE, i] = value_bits * size
        if count < size:
            table[BITMAP, i] = 8 * -(-size // 8) + values
            table[CODED, i] = 8 * len(varint(count)) + Segment(size, count).entropy + values
    for i, places in drawn.items():
        table[SEEDED, i] = 8 * len(varint(len(places))) + value_bits * len(places)
    for i, (rows, columns) in boxes.items():
        area, count = rows * columns, part.counts[i]
        # as symbols, zeros cost bits and a table
        zeros = Segment(area, count).entropy + 2 * _WORD_BITS if area > count else 0.0
        inside = value_bits * area if value_bits >= _PLAIN_BITS else value_bits * count + zeros
        table[BOX, i] = 8 * (len(varint(rows)) + len(varint(columns))) + inside
    return table


def _cheapest(table: Costs, left: Sequence[int]) -> list[int]:
    """The layout of each tensor that needs the fewest bits, the layouts ``left`` aside."""
    rest = table.copy()
    rest[list(left)] = np.inf
    layouts: list[int] = rest.argmin(axis=0).tolist()
    return layouts


def _cost(plan: Sequence[int], table: Costs, part: _Part, value_bits: float) -> float:
    bits = 8.0 * len(_table(plan)) + sum(table[layout, i] for i, layout in enumerate(plan) if layout != POOLED)
    bits += 64.0 * (SEEDED in plan) + _WORD_BITS * (CODED in plan or POOLED in plan)
    if POOLED in plan:
        pool = part.pool(plan)
        bits += 8.0 * (len(varint(pool.kept)) + 1) + pool.entropy + value_bits * pool.kept
    return float(bits)


def _write(
    plan: Sequence[int],
    part: _Part,
    shapes: Sequence[Sequence[int]],
    drawn: Mapping[int, NDArray[np.intp]],
    boxes: Mapping[int, tuple[int, int]],
    draw: Draw | None,
) -> Stored:
    chunks = [_table(plan)]
    if draw and SEEDED in plan:
        chunks.append(draw.seed.to_bytes(8, "little"))
    whole = set(plan) <= {EMPTY, BITMAP, CODED, POOLED}  # these store what is not zero, and nothing else
    stored = part.nonzero if whole else part.nonzero.copy()
    coded: list[tuple[Bools, Segment]] = []
    for i, layout in enumerate(plan):
        run = stored[part.ends[i] - part.sizes[i] : part.ends[i]]
        if layout == DENSE:
            run[:] = True
        elif layout == CODED:
            chunks.append(varint(part.counts[i]))
            coded.append((run, Segment(len(run), part.counts[i])))
        elif layout == SEEDED:
            chunks.append(varint(len(drawn[i])))
            run[drawn[i]] = True
        elif layout == BITMAP:
            chunks.append(pack_bits(run))
        elif layout == BOX:
            rows, columns = boxes[i]
            chunks += [varint(rows), varint(columns)]
            _grid(run, shapes[i])[:rows, :columns] = True
    if POOLED in plan:
        segment = part.pool(plan)
        runs = [part.run(i) for i, layout in enumerate(plan) if layout == POOLED]
        pool = part.nonzero if len(runs) == len(plan) else np.concatenate(runs)
        chunks += [varint(segment.kept), bytes([segment.coding])]
        if segment.coding == RANGE:
            coded.append((pool, segment))
        else:
            chunks.append(encode_pool(pool, segment))
    if coded:
        chunks.append(encode_positions(np.concatenate([run for run, _ in coded]), [segment for _, segment in coded]))
    if whole:
        return Stored(b"".join(chunks), part.where, part.counts)
    where = np.flatnonzero(stored)
    return Stored(b"".join(chunks), where, _counts(where, part.ends))


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

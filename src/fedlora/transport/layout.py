"""Layouts: which entries of each tensor in a part are stored, encoded in the fewest bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import getitem, sub
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import WireError
from fedlora.core.tree import Tree
from fedlora.transport.coder import pack_bits, take_bits
from fedlora.transport.framing import Reader, varint
from fedlora.transport.positions import (
    RANGE,
    Chosen,
    Run,
    Segment,
    chosen_of,
    decode_pool,
    decode_positions,
    encode_pool,
    encode_positions,
    positions_of,
    random_positions,
    run_of,
)

EMPTY, DENSE, BITMAP, CODED, POOLED, SEEDED, BOX = range(7)
"""Nothing is stored; everything; one bit per entry; range-coded positions at the tensor's own density; positions in all
such tensors together, at their common density; positions drawn from a seed; the first rows and columns."""

_MIXED = 255
_PLAIN_BITS = 16  # below this, values are entropy coded, and zeros among them cost as much as their positions would
_DIGITS = 2.0 ** (7 * np.arange(1, 9))  # the smallest numbers of 2, 3, ... digits as a varint
_WORD_BITS = 64.0  # the overhead of a range coder beyond the entropy
Bools = NDArray[np.bool_]
Costs = NDArray[np.float64]


class Draw(NamedTuple):
    """Positions drawn from a seed: the seed, and the number of positions in each tensor, by name."""

    seed: int
    counts: Mapping[str, int]


class Stored(NamedTuple):
    """A layout: its bytes, the stored entries, and the number of them of each tensor."""

    raw: bytes
    where: Chosen | None  # None: all of them
    runs: list[int]
    zeros: bool = True  # whether entries may be among them that need not be stored


class _Part:
    """The entries of a part that must be stored, and where its tensors lie."""

    def __init__(self, whole: Run, sizes: Sequence[int]) -> None:
        self.whole = whole
        self.sizes = sizes
        self._is_sparse = whole.is_sparse
        self.ends = list(accumulate(sizes))
        at = np.searchsorted(whole.rare, self.ends)
        self._at: list[int] = at.tolist()
        self._last: list[int] = whole.rare[at - 1].tolist() if self._is_sparse else []
        self._rare = _steps(self._at)
        self.counts = self._rare if self._is_sparse else list(map(sub, sizes, self._rare))

    def slice(self, i: int) -> slice:
        """Where the entries of one tensor lie."""
        return slice(self.ends[i] - self.sizes[i], self.ends[i])

    def kept(self, i: int) -> Bools:
        """One bool for each entry of one tensor."""
        return self.whole.kept[self.slice(i)]

    def where(self, i: int) -> NDArray[np.intp]:
        """The positions in the part of the kept entries of one tensor."""
        return self._places(i) if self._is_sparse else np.flatnonzero(self.kept(i)) + self.slice(i).start

    def last(self, i: int) -> int:
        """The position in the part of the last kept entry of one tensor."""
        if self._is_sparse:
            return self._last[i]
        return self.ends[i] - 1 if self.whole.kept[self.ends[i] - 1] else int(self.where(i)[-1])

    def run(self, i: int) -> Run:
        """The entries of one tensor."""
        alike = self._is_sparse == (2 * self.counts[i] <= self.sizes[i])
        return (
            Run(self.kept(i), self.counts[i], self._places(i), self.slice(i).start) if alike else run_of(self.kept(i))
        )

    def _places(self, i: int) -> NDArray[np.intp]:
        """The positions in the part of those entries of one tensor that are of the kind that is rarer in the part."""
        return self.whole.rare[self._at[i] - self._rare[i] : self._at[i]]

    def pool(self, plan: Sequence[int]) -> Run:
        """The entries of the pooled tensors."""
        if set(plan) == {POOLED}:
            return self.whole
        return run_of(np.concatenate([self.kept(i) for i, layout in enumerate(plan) if layout == POOLED]))

    def pooled(self, plan: Sequence[int]) -> Segment:
        """The size and count of the pooled tensors together."""
        if set(plan) == {POOLED}:
            return self.whole.segment
        chosen = [i for i, layout in enumerate(plan) if layout == POOLED]
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
    if nonzero.all():
        return Stored(_table([DENSE] * len(sizes)), None, sizes, zeros=False)
    whole = run_of(nonzero)
    if not whole.num:
        return Stored(_table([EMPTY] * len(sizes)), whole.rare, [0] * len(sizes), zeros=False)
    part = _Part(whole, sizes)
    shapes = [value.shape for value in like.values()]
    drawn = _drawn(part, list(like), draw) if draw else {}
    boxes = _boxes(part, shapes)
    table = _costs(part, value_bits, drawn, boxes)
    # the cost shared by all coded or all seeded tensors (words and a seed) may be too much for a small part
    without: list[tuple[int, ...]] = [(), (CODED,), *([(SEEDED,), (CODED, SEEDED)] if drawn else [])]
    plans = [_cheapest(table, left) for left in without]
    plans += [[POOLED if layout == CODED else layout for layout in plan] for plan in plans]
    plans.append([POOLED] * len(sizes))
    table[POOLED] = 0.0  # these cost something together
    columns: list[list[float]] = table.T.tolist()  # numbers one by one are quicker from a list
    costs = {plan: _cost(plan, columns, part, value_bits) for plan in dict.fromkeys(map(tuple, plans))}
    plan = min(costs, key=costs.__getitem__)
    if value_bits >= _PLAIN_BITS and costs[plan] >= 8.0 + value_bits * total:
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
    if set(layouts) == {POOLED}:
        (whole,) = _read_positions(reader, [], sum(sizes))
        return Stored(b"", whole, _counts(whole, sizes))
    found: list[Chosen] = [np.zeros(0, np.intp)] * len(sizes)  # the kept entries of each tensor
    coded: dict[int, Segment] = {}
    for i, ((name, value), layout, size) in enumerate(zip(like.items(), layouts, sizes, strict=True)):
        if layout == DENSE:
            found[i] = np.ones(size, np.bool_)
        elif layout == CODED:
            coded[i] = Segment(size, reader.varint(size))
        elif layout == SEEDED:
            found[i] = random_positions(seed, name, size, reader.varint(size))
        elif layout == BITMAP:
            found[i] = take_bits(reader, size).view(np.bool_)
        elif layout == BOX:
            grid = np.zeros(_sides(value.shape, size), np.bool_)
            rows, columns = (reader.varint(side) for side in grid.shape)
            grid[:rows, :columns] = True
            found[i] = grid.reshape(-1)
    pool = [i for i, layout in enumerate(layouts) if layout == POOLED]
    apart = _read_apart(reader, list(coded.values()), [sizes[i] for i in pool])
    for i, kept in zip([*coded, *pool], apart, strict=True):
        found[i] = kept
    return _together(found, sizes)


def _together(found: Sequence[Chosen], sizes: Sequence[int]) -> Stored:
    """The kept entries of all tensors, from those of each."""
    runs = [int(np.count_nonzero(kept)) if kept.dtype == np.bool_ else len(kept) for kept in found]
    starts = list(accumulate(sizes, initial=0))
    if 2 * sum(runs) > starts[-1]:
        mask = np.zeros(starts[-1], np.bool_)
        for kept, start, end in zip(found, starts, starts[1:], strict=False):
            mask[start:end][kept] = True
        return Stored(b"", mask, runs)
    where = [positions_of(kept) + start for kept, start in zip(found, starts, strict=False)]
    return Stored(b"", np.concatenate(where), runs)


def _read_apart(reader: Reader, coded: Sequence[Segment], pool: Sequence[int]) -> list[Chosen]:
    """The kept entries of each coded tensor, and of each of a pool, from the sizes of these."""
    if not pool:
        return _read_positions(reader, coded, None)
    *found, kept = _read_positions(reader, coded, sum(pool))
    starts = list(accumulate(pool[:-1], initial=0))
    if kept.dtype == np.bool_:
        return [*found, *np.split(kept.view(np.bool_), starts[1:])]
    parts = np.split(kept.view(np.intp), np.searchsorted(kept, starts[1:]))
    return [*found, *(part - start for part, start in zip(parts, starts, strict=True))]


def _read_positions(reader: Reader, coded: Sequence[Segment], pool: int | None) -> list[Chosen]:
    """The kept entries of each coded tensor, and last those in a pool of so many entries, if there is one."""
    if pool is None:
        return decode_positions(reader, coded) if coded else []
    segment, coding = Segment(pool, reader.varint(pool)), reader.byte()
    if coding == RANGE:
        return decode_positions(reader, [*coded, segment])
    places = decode_pool(reader, segment, coding)
    return [*(decode_positions(reader, coded) if coded else []), places]


def _counts(kept: Chosen, sizes: Sequence[int]) -> list[int]:
    """The number of kept entries of each tensor."""
    ends = list(accumulate(sizes))
    if kept.dtype == np.bool_:
        return [int(np.count_nonzero(kept[end - size : end])) for size, end in zip(sizes, ends, strict=True)]
    return _steps(np.searchsorted(kept, ends).tolist())


def _steps(ends: Sequence[int]) -> list[int]:
    """The lengths of what ends there, one after the other."""
    return [end - start for end, start in zip(ends, [0, *ends], strict=False)]


def _drawn(part: _Part, names: Sequence[str], draw: Draw) -> dict[int, NDArray[np.intp]]:
    """The positions that the seed draws in each tensor, where they include every entry that must be stored."""
    drawn = {}
    for i, name in enumerate(names):
        if name in draw.counts and 0 < part.counts[i] < part.sizes[i]:
            places = random_positions(draw.seed, name, part.sizes[i], draw.counts[name])
            if np.count_nonzero(part.kept(i)[places]) == part.counts[i]:
                drawn[i] = places
    return drawn


def _boxes(part: _Part, shapes: Sequence[Sequence[int]]) -> dict[int, tuple[int, int]]:
    """The rows and columns that hold entries, of the tensors where these are not all."""
    boxes: dict[int, tuple[int, int]] = {}
    found: list[tuple[int, int]] = []
    for i, (shape, size, count) in enumerate(zip(shapes, part.sizes, part.counts, strict=True)):
        if len(shape) < 2 or not 0 < count < size:
            continue
        end, width = part.ends[i], size // shape[0]
        rows = shape[0] - (end - 1 - part.last(i)) // width
        if not np.count_nonzero(part.whole.kept[end - size + width - 1 : end : width]):
            boxes[i] = rows, 0  # how many columns is found below
            found.append((i, width))
        elif rows < shape[0]:
            boxes[i] = rows, width
    if not found:
        return boxes
    counts = [part.counts[i] for i, _ in found]
    places = np.concatenate([part.where(i) for i, _ in found])
    places -= np.repeat([part.ends[i] - part.sizes[i] for i, _ in found], counts)
    places %= np.repeat([width for _, width in found], counts)
    columns = np.maximum.reduceat(places, np.cumsum([0, *counts[:-1]]))
    return boxes | {i: (boxes[i][0], last + 1) for (i, _), last in zip(found, columns.tolist(), strict=True)}


def _costs(
    part: _Part, value_bits: float, drawn: Mapping[int, NDArray[np.intp]], boxes: Mapping[int, tuple[int, int]]
) -> Costs:
    """Bits of each layout, in rows, for each tensor on its own; infinite if it cannot have that layout."""
    table = np.full((BOX + 1, len(part.sizes)), np.inf)
    size, count = np.array([part.sizes, part.counts], np.float64)
    rows, columns = np.array([boxes.get(i, (0, 0)) for i in range(len(size))], np.float64).T
    area, values, any_ = rows * columns, value_bits * count, count > 0
    some, plain = any_ & (count < size), value_bits >= _PLAIN_BITS
    # all numbers of one kind at a time: there are few, and every call takes longer than they
    for_count, for_rows, for_columns = 8 * (np.searchsorted(_DIGITS, [count, rows, columns], side="right") + 1)
    for_places, for_inside = _entropy(count, np.stack([size, area]))
    table[EMPTY, ~any_] = 0.0
    np.copyto(table[DENSE], value_bits * size, where=any_ if plain else any_ ^ some)
    np.copyto(table[BITMAP], 8 * np.ceil(size / 8) + values, where=some)
    np.copyto(table[CODED], for_count + for_places + values, where=some)
    if boxes:
        # as symbols, zeros cost bits and a table
        inside = np.where((area == count) | plain, value_bits * area, values + (for_inside + 2 * _WORD_BITS))
        np.copyto(table[BOX], for_rows + for_columns + inside, where=area > 0)
    for i, places in drawn.items():
        table[SEEDED, i] = 8 * len(varint(len(places))) + value_bits * len(places)
    return table


def _entropy(count: Costs, size: Costs) -> Costs:
    """Bits of the positions of so many entries, by Shannon's formula; NaN where there is nothing to choose."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bits: Costs = -(count * np.log2(count / size) + (size - count) * np.log2(1 - count / size))
    return bits


def _cheapest(table: Costs, left: Sequence[int]) -> list[int]:
    """The layout of each tensor that needs the fewest bits, the layouts ``left`` aside."""
    rest = table.copy()
    rest[list(left)] = np.inf
    layouts: list[int] = rest.argmin(axis=0).tolist()
    return layouts


def _cost(plan: Sequence[int], columns: Sequence[Sequence[float]], part: _Part, value_bits: float) -> float:
    """Bits of a plan, from the bits of every layout for each tensor."""
    table = 1 if len(set(plan)) < 2 else 1 + -(-len(plan) // 2)
    bits = 8.0 * table + sum(map(getitem, columns, plan))
    bits += 64.0 * (SEEDED in plan) + _WORD_BITS * (CODED in plan or POOLED in plan)
    if POOLED in plan:
        pool = part.pooled(plan)
        bits += 8.0 * (len(varint(pool.kept)) + 1) + pool.entropy + value_bits * pool.kept
    return bits


def _write(
    plan: Sequence[int],
    part: _Part,
    shapes: Sequence[Sequence[int]],
    drawn: Mapping[int, NDArray[np.intp]],
    boxes: Mapping[int, tuple[int, int]],
    draw: Draw | None,
) -> Stored:
    chunks, sizes = [_table(plan)], part.sizes
    if draw and SEEDED in plan:
        chunks.append(draw.seed.to_bytes(8, "little"))
    whole = set(plan) <= {EMPTY, BITMAP, CODED, POOLED}  # these store what is not zero, and nothing else
    stored = part.whole.kept if whole else part.whole.kept.copy()
    coded: list[Run] = []
    for i, layout in enumerate(plan):
        if layout in (EMPTY, POOLED):
            continue
        run = stored[part.slice(i)]
        if layout == DENSE:
            run[:] = True
        elif layout == CODED:
            chunks.append(varint(part.counts[i]))
            coded.append(part.run(i))
        elif layout == SEEDED:
            chunks.append(varint(len(drawn[i])))
            run[drawn[i]] = True
        elif layout == BITMAP:
            chunks.append(pack_bits(run))
        elif layout == BOX:
            rows, columns = boxes[i]
            chunks += [varint(rows), varint(columns)]
            run.reshape(_sides(shapes[i], len(run)))[:rows, :columns] = True
    chunks.append(_write_positions(coded, part.pool(plan) if POOLED in plan else None))
    if whole:
        return Stored(b"".join(chunks), part.whole.chosen, part.counts, zeros=False)
    chosen = chosen_of(stored)
    return Stored(b"".join(chunks), chosen, _counts(chosen, sizes))


def _write_positions(coded: list[Run], pool: Run | None) -> bytes:
    """The inverse of ``_read_positions``."""
    if pool is None:
        return encode_positions(coded) if coded else b""
    coding = pool.segment.coding
    head = varint(pool.num) + bytes([coding])
    if coding == RANGE:
        return head + encode_positions([*coded, pool])
    return head + encode_pool(pool) + (encode_positions(coded) if coded else b"")


def _sides(shape: Sequence[int], size: int) -> tuple[int, int]:
    """A tensor as rows and columns: its first axis, and all the others flattened."""
    return (shape[0], size // shape[0]) if len(shape) and size else (1, size)


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

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
    decode_pool,
    decode_positions,
    encode_pool,
    encode_positions,
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


class _Part:
    """The entries of a part that must be stored, and where its tensors lie."""

    def __init__(self, whole: Run, sizes: Sequence[int]) -> None:
        self.whole = whole
        self.sizes = sizes
        self._is_sparse = whole.is_sparse
        ends = np.cumsum(sizes)
        self.ends: list[int] = ends.tolist()
        self._at: list[int] = np.searchsorted(whole.rare, ends).tolist()
        self._last: list[int] = whole.rare[np.subtract(self._at, 1)].tolist() if self._is_sparse else []
        self._rare = _steps(self._at)
        self.counts = self._rare if self._is_sparse else list(map(sub, sizes, self._rare))

    def slice(self, i: int) -> slice:
        """Where the entries of one tensor lie."""
        return slice(self.ends[i] - self.sizes[i], self.ends[i])

    def kept(self, i: int) -> Bools:
        """One bool for each entry of one tensor."""
        return self.whole.kept[self.slice(i)]

    def where(self, i: int) -> NDArray[np.intp]:
        """The positions in one tensor of its kept entries."""
        return self._local(i) if self._is_sparse else np.flatnonzero(self.kept(i))

    def last(self, i: int) -> int:
        """The position in one tensor of its last kept entry."""
        if self._is_sparse:
            return self._last[i] - (self.ends[i] - self.sizes[i])
        return self.sizes[i] - 1 if bool(self.kept(i)[-1]) else int(self.where(i)[-1])

    def run(self, i: int) -> Run:
        """The entries of one tensor."""
        alike = self._is_sparse == (2 * self.counts[i] <= self.sizes[i])
        return Run(self.kept(i), self.counts[i], self._local(i)) if alike else run_of(self.kept(i))

    def _local(self, i: int) -> NDArray[np.intp]:
        """The positions in one tensor of the kind that is rarer in the part."""
        local: NDArray[np.intp] = self.whole.rare[self._at[i] - self._rare[i] : self._at[i]] - self.slice(i).start
        return local

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
        return Stored(_table([DENSE] * len(sizes)), None, sizes)
    whole = run_of(nonzero)
    if not whole.num:
        return Stored(_table([EMPTY] * len(sizes)), whole.rare, [0] * len(sizes))
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
        (places,) = _read_positions(reader, [], sum(sizes))
        return Stored(b"", places, _counts(places, sizes))
    mask = np.zeros(sum(sizes), np.bool_)
    runs = np.split(mask, np.cumsum(sizes)[:-1])
    coded: list[tuple[Bools, Segment]] = []
    for (name, value), layout, run in zip(like.items(), layouts, runs, strict=True):
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
    pool = [run for run, layout in zip(runs, layouts, strict=True) if layout == POOLED]
    _fill(reader, coded, pool)
    return Stored(b"", mask, _counts(mask, sizes))


def _fill(reader: Reader, coded: Sequence[tuple[Bools, Segment]], pool: Sequence[Bools]) -> None:
    """Reads the positions in the coded tensors, and in those of the pool, and marks them."""
    segments = [segment for _, segment in coded]
    found = _read_positions(reader, segments, sum(map(len, pool)) if pool else None)
    for (run, _), places in zip(coded, found, strict=False):
        run[places] = True
    if pool:
        _spread(found[-1], pool)


def _spread(places: Chosen, pool: Sequence[Bools]) -> None:
    """Marks the places of a pool in its tensors, which lie one after the other in it."""
    ends = np.cumsum([len(run) for run in pool])
    together = np.zeros(ends[-1], np.bool_)
    together[places] = True
    for run, part in zip(pool, np.split(together, ends[:-1]), strict=True):
        run[:] = part


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
    if kept.dtype == np.bool_:
        return [
            int(np.count_nonzero(kept[end - size : end])) for size, end in zip(sizes, accumulate(sizes), strict=True)
        ]
    return _steps(np.searchsorted(kept, np.cumsum(sizes)).tolist())


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
    found: list[tuple[int, int, int]] = []
    for i, (shape, size, count) in enumerate(zip(shapes, part.sizes, part.counts, strict=True)):
        if len(shape) < 2 or not 0 < count < size:
            continue
        end, width = part.ends[i], size // shape[0]
        rows = part.last(i) // width + 1
        if rows < shape[0] or not np.count_nonzero(part.whole.kept[end - size + width - 1 : end : width]):
            found.append((i, rows, width))
    if not found:
        return {}
    counts = [part.counts[i] for i, _, _ in found]
    places = np.concatenate([part.where(i) for i, _, _ in found])
    places %= np.repeat([width for _, _, width in found], counts)
    columns = np.maximum.reduceat(places, np.cumsum([0, *counts[:-1]]))
    return {i: (rows, last + 1) for (i, rows, _), last in zip(found, columns.tolist(), strict=True)}


def _costs(
    part: _Part, value_bits: float, drawn: Mapping[int, NDArray[np.intp]], boxes: Mapping[int, tuple[int, int]]
) -> Costs:
    """Bits of each layout, in rows, for each tensor on its own; infinite if it cannot have that layout."""
    table = np.full((BOX + 1, len(part.sizes)), np.inf)
    size, count = np.array(part.sizes, np.float64), np.array(part.counts, np.float64)
    none, all_, values = count == 0, count == size, value_bits * count
    table[EMPTY, none] = 0.0
    dense = ~none if value_bits >= _PLAIN_BITS else all_ & ~none
    table[DENSE, dense] = value_bits * size[dense]
    some = ~none & ~all_
    table[BITMAP, some] = (8 * np.ceil(size / 8) + values)[some]
    table[CODED, some] = (8 * _digits(count) + _entropy(count, size) + values)[some]
    for i, places in drawn.items():
        table[SEEDED, i] = 8 * len(varint(len(places))) + value_bits * len(places)
    if boxes:
        at, (rows, columns) = list(boxes), np.array(list(boxes.values()), np.float64).T
        area, kept = rows * columns, count[at]
        # as symbols, zeros cost bits and a table
        inside = value_bits * kept + (_entropy(kept, area) + 2 * _WORD_BITS)
        inside = np.where((area == kept) | (value_bits >= _PLAIN_BITS), value_bits * area, inside)
        table[BOX, at] = 8 * (_digits(rows) + _digits(columns)) + inside
    return table


def _digits(count: Costs) -> Costs:
    """Bytes of counts as varints."""
    digits = np.searchsorted(_DIGITS, count, side="right") + 1
    return digits.astype(np.float64)


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
    bits = 8.0 * len(_table(plan)) + sum(map(getitem, columns, plan))
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
            _grid(run, shapes[i])[:rows, :columns] = True
    chunks.append(_write_positions(coded, part.pool(plan) if POOLED in plan else None))
    if whole:
        return Stored(b"".join(chunks), part.whole.chosen, part.counts)
    return Stored(b"".join(chunks), stored, _counts(stored, sizes))


def _write_positions(coded: list[Run], pool: Run | None) -> bytes:
    """The inverse of ``_read_positions``."""
    if pool is None:
        return encode_positions(coded) if coded else b""
    coding = pool.segment.coding
    head = varint(pool.num) + bytes([coding])
    if coding == RANGE:
        return head + encode_positions([*coded, pool])
    return head + encode_pool(pool) + (encode_positions(coded) if coded else b"")


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

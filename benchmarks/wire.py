"""Bytes and times of messages against entropy, plain formats and zstd."""

from __future__ import annotations

import io
import math
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from benchmarks.common import SEED, Figure, Settings, figure, ratios, side_by_side
from fedlora.core import tree as trees
from fedlora.core.schema import Leaf, Schema
from fedlora.core.tree import Tree
from fedlora.transport import (
    AnyPrecision,
    BFloat16,
    Float16,
    Float32,
    Link,
    Precision,
    TopK,
    Uniform,
    unpack,
)

DENSITIES = {"1": 1.0, "1/4": 1 / 4, "1/16": 1 / 16, "1/64": 1 / 64}
PRECISIONS: dict[str, AnyPrecision] = {
    "float32": Float32(),
    "bfloat16": BFloat16(),
    "float16": Float16(),
    **{f"uniform {bits}": Uniform(bits=bits) for bits in (8, 4, 2, 1)},
}
TIMED = "RoBERTa-base"  # the adapter whose times have goals
LARGE = "Llama class"  # the one that takes seconds
ZSTD = "zstd of dense float32"
Vector = NDArray[np.float32]
Times = dict[str, list[float]]


class Adapter(NamedTuple):
    """Normal random values in the shapes of an adapter, and what each of them is."""

    name: str
    params: Tree
    schema: Schema


class Reference(NamedTuple):
    """A plain way to write a vector, and to read it again."""

    write: Callable[[], bytes]
    read: Callable[[bytes], Vector]

    def there_and_back(self) -> Vector:
        """Written and read."""
        return self.read(self.write())


class RoundRecord(NamedTuple):
    """What one precision at one density costs: bytes and those of the envelope, the least by entropy, seconds."""

    density: str
    precision: str
    size: int
    envelope: int
    least: float
    encode: list[float]
    decode: list[float]
    top_k: list[float]
    zstd: list[float]

    @property
    def both(self) -> list[float]:
        """Encoding and decoding."""
        return [a + b for a, b in zip(self.encode, self.decode, strict=True)]

    @property
    def all(self) -> list[float]:
        """The choice of entries, encoding and decoding."""
        return [a + b for a, b in zip(self.both, self.top_k, strict=True)]


def adapters() -> list[Adapter]:
    """MiniLM and RoBERTa-base at rank 16 with a head of 20 classes; 32 layers of 4096 with keys of 1024 at rank 50."""
    wide = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096)}
    return [
        _adapter("MiniLM", 6, 16, {"query": (384, 384), "value": (384, 384)}, 384),
        _adapter(TIMED, 12, 16, {"query": (768, 768), "value": (768, 768)}, 768),
        _adapter(LARGE, 32, 50, wide, 0),
    ]


def measure(settings: Settings) -> list[Figure]:
    """The largest of normal random values, at each density and precision, for three adapters."""
    figures = []
    for adapter in adapters():
        rows: list[RoundRecord] = []
        beside: list[Figure] = []
        for density in DENSITIES:
            at_density, notes = _measure_density(settings, adapter, density)
            rows += at_density
            beside += notes
        figures += [*_goals(adapter, rows), *beside, *(_figure_of(adapter, row) for row in rows)]
    return figures


def _adapter(name: str, layers: int, rank: int, modules: dict[str, tuple[int, int]], head: int) -> Adapter:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for module, (inputs, outputs) in modules.items():
            shapes[f"layers.{layer}.{module}.lora_A"] = (rank, inputs)
            shapes[f"layers.{layer}.{module}.lora_B"] = (outputs, rank)
    schema = Schema(dict.fromkeys(shapes, Leaf("adapter")))
    if head:
        shapes |= {"classifier.weight": (20, head), "classifier.bias": (20,)}
        schema |= dict.fromkeys(("classifier.weight", "classifier.bias"), Leaf("head"))
    draws = torch.Generator().manual_seed(SEED)
    return Adapter(name, {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}, schema)


def _link(density: str, precision: str) -> Link:
    share = DENSITIES[density]
    return Link(sparsify=TopK(density=share), precision=PRECISIONS[precision])


def _measure_density(settings: Settings, adapter: Adapter, density: str) -> tuple[list[RoundRecord], list[Figure]]:
    """The rows of one density, and figures of what is measured beside them."""
    schema, large = adapter.schema, adapter.name == LARGE
    thinned = _link(density, "float32").thin(adapter.params, schema, 0, SEED)
    parts = schema.split(thinned)
    references, precisions = _references(thinned), list(PRECISIONS)
    if settings.quick and large:
        references, precisions = {ZSTD: references[ZSTD]}, ["float32", "uniform 8"]
    packets = {name: _link(density, name).encode(thinned, schema, 0, SEED) for name in precisions}
    functions: dict[str, Callable[[], object]] = {}
    for name in precisions:
        link, raw = _link(density, name), packets[name].raw
        functions[f"encode {name}"] = partial(link.encode, thinned, schema, 0, SEED)
        functions[f"decode {name}"] = partial(unpack, raw, parts)
    for name, reference in references.items():
        functions[name] = reference.there_and_back
    if density != "1":
        functions["top-k"] = partial(_link(density, "float32").thin, adapter.params, schema, 0, SEED)
    repeats = (1 if settings.quick else 2) if large else (5 if settings.quick else 15)
    times = side_by_side(settings, functions, repeats, warm=0 if large else 1)
    rows = [
        RoundRecord(
            density,
            name,
            len(packet.raw),
            packet.sizes["envelope"],
            _least(parts, packet.trees, PRECISIONS[name]),
            times[f"encode {name}"],
            times[f"decode {name}"],
            times.get("top-k", [0.0] * repeats),
            times[ZSTD],
        )
        for name, packet in packets.items()
    ]
    return rows, _beside(adapter, density, references, times, len(packets["float32"].raw))


def _beside(adapter: Adapter, density: str, references: dict[str, Reference], times: Times, size: int) -> list[Figure]:
    """The smallest of the plain formats against the float32 message, and the time of top-k."""
    sizes = {name: len(reference.write()) for name, reference in references.items()}
    listed = "; ".join(f"{name} {sizes[name]:,} ({_ms(times[name]):.3g})" for name in sizes)
    label = f"{adapter.name}, density {density}"
    smallest = min(sizes.values()) / size
    note = f"plain formats in bytes, and ms to write and read: {listed}"
    figures = [figure(f"{label}: smallest plain format / float32 message", [smallest], "x", note=note)]
    if "top-k" in times:
        figures.append(figure(f"{label}: top-k", [1e3 * value for value in times["top-k"]], "ms"))
    return figures


def _goals(adapter: Adapter, rows: list[RoundRecord]) -> list[Figure]:
    """The figures that have goals."""
    entries = trees.num_entries(adapter.params)
    of = {(row.density, row.precision): row for row in rows}
    figures = []
    for density, share in DENSITIES.items():
        if share < 1:
            row = of[density, "float32"]
            kept = int(entries * share)
            spent, positions = row.size - row.envelope - 4 * kept, row.least - 4 * kept
            note = f"{spent:,} bytes, headers and counts included, envelope {row.envelope}; {kept:,} of {entries:,}"
            name = f"{adapter.name}, density {density}: positions above entropy"
            figures.append(figure(name, [100 * (spent / positions - 1)], "%", "<= 1.2", note))
    down, up = of["1/4", "uniform 8"].size, of["1/16", "uniform 8"].size
    note = f"down 1/4, up 1/16, both 8 bits: {down:,} and {up:,} bytes; dense float32 is {4 * entries:,} each way"
    name = f"{adapter.name}: dense float32 / FLASC, both ways"
    figures.append(figure(name, [8 * entries / (down + up)], "x", ">= 15", note))
    if adapter.name == TIMED:
        worst = max(rows, key=lambda row: _ms(row.both))
        note = f"density {worst.density}, {worst.precision}; {entries:,} entries"
        name = f"{adapter.name}: slowest encode and decode"
        figures.append(figure(name, [1e3 * value for value in worst.both], "ms", "<= 30", note))
        for row in rows:
            name = f"{adapter.name}, density {row.density}, {row.precision}: encode and decode / zstd"
            note = f"{_ms(row.both):.3g} ms; zstd level 3 of the dense float32 vector {_ms(row.zstd):.3g} ms"
            figures.append(figure(name, ratios(row.both, row.zstd), "x", "<= 1", note))
            name = f"{adapter.name}, density {row.density}, {row.precision}: the same with top-k / zstd"
            figures.append(figure(name, ratios(row.all, row.zstd), "x", "<= 1.5", f"{_ms(row.all):.3g} ms"))
    if adapter.name == LARGE:
        row = of["1/4", "float32"]
        note = f"{entries:,} entries; encode {_ms(row.encode):.4g} ms, decode {_ms(row.decode):.4g} ms"
        figures.append(figure(f"{LARGE}, density 1/4, float32: encode and decode", row.both, "s", "<= 1", note))
        figures.append(_memory(adapter))
    return figures


def _memory(adapter: Adapter) -> Figure:
    """The most memory that encoding or decoding takes, the tree included, against the size of its entries."""
    link, schema = _link("1/4", "float32"), adapter.schema
    thinned = link.thin(adapter.params, schema, 0, SEED)
    size, parts = 4 * trees.num_entries(thinned), schema.split(thinned)
    raw = link.encode(thinned, schema, 0, SEED, trees=False).raw
    encode = size + _peak(lambda: link.encode(thinned, schema, 0, SEED, trees=False))
    decode = len(raw) + _peak(lambda: unpack(raw, parts))
    note = f"density 1/4, float32; encode with its tree {encode:,} bytes, decode with its message {decode:,} bytes"
    return figure(f"{adapter.name}: memory / size of the entries", [max(encode, decode) / size], "x", "<= 3", note)


def _peak(function: Callable[[], object]) -> int:
    """Bytes that a call allocates at most, its result included; messages are made of NumPy's arrays, which report."""
    tracemalloc.start()
    function()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def _figure_of(adapter: Adapter, row: RoundRecord) -> Figure:
    """The bytes of a row, and all else about it."""
    entries = trees.num_entries(adapter.params)
    note = (
        f"{8 * row.size / entries:.3f} bits per entry; {4 * entries / row.size:.1f} times smaller than dense float32; "
        f"{row.size / row.least:.4f} x entropy; encode {_ms(row.encode):.3g} ms, decode {_ms(row.decode):.3g} ms"
    )
    return figure(f"{adapter.name}, density {row.density}, {row.precision}", [row.size], "bytes", note=note)


def _least(thinned: dict[str, Tree], arrived: dict[str, Tree], precision: Precision) -> float:
    """Bytes that positions and values need by Shannon's formula, part by part; scales and counts are left out."""
    least = 0.0
    for part, tree in thinned.items():
        size, kept = trees.num_entries(tree), sum(int(value.count_nonzero()) for value in tree.values())
        if isinstance(precision, Uniform):
            multiples = np.concatenate([_multiples(value.numpy()) for value in arrived[part].values()])
            counts = np.bincount(multiples + 128)  # what is not kept is a zero among them
        else:
            counts = np.array([kept, size - kept])
            least += kept * precision.value_bits / 8
        least -= sum(count * math.log2(count / size) for count in counts.tolist() if count) / 8
    return least


def _multiples(value: Vector) -> NDArray[np.int64]:
    """A tensor that arrived, in units of its scale: the smallest step between its magnitudes."""
    magnitudes = np.unique(np.abs(value[value != 0]))
    step = np.diff(magnitudes, prepend=0).min() if len(magnitudes) else 1.0
    return np.rint(value / step).astype(np.int64).reshape(-1)


def _references(tree: Tree) -> dict[str, Reference]:
    """Plain formats of a thinned tree, by name."""
    vector: Vector = trees.flatten(tree).numpy()
    size = len(vector)

    def spread(where: NDArray[np.integer], values: Vector) -> Vector:
        found = np.zeros(size, np.float32)
        found[where] = values
        return found

    def write_indices() -> bytes:
        where = np.flatnonzero(vector)
        return where.astype(np.int32).tobytes() + vector[where].tobytes()

    def read_indices(raw: bytes) -> Vector:
        half = len(raw) // 2
        return spread(np.frombuffer(raw[:half], np.int32), np.frombuffer(raw[half:], np.float32))

    def write_bitmap() -> bytes:
        return np.packbits(vector != 0).tobytes() + vector[np.flatnonzero(vector)].tobytes()

    def read_bitmap(raw: bytes) -> Vector:
        half = -(-size // 8)
        bits = np.unpackbits(np.frombuffer(raw[:half], np.uint8), count=size)
        return spread(np.flatnonzero(bits), np.frombuffer(raw[half:], np.float32))

    def save_indices() -> bytes:
        where = np.flatnonzero(vector)
        return _save({"index": torch.from_numpy(where.astype(np.int32)), "value": torch.from_numpy(vector[where])})

    def load_indices(raw: bytes) -> Vector:
        found = _load(raw)
        return spread(found["index"].numpy(), found["value"].numpy())

    plain = {
        "dense float32": Reference(vector.tobytes, lambda raw: np.frombuffer(raw, np.float32)),
        "index + float32": Reference(write_indices, read_indices),
        "bitmap + float32": Reference(write_bitmap, read_bitmap),
    }
    zipped = {f"zstd of {name}": _zipped(reference) for name, reference in plain.items()}
    saved = {
        "torch.save of the tree": Reference(lambda: _save(tree), lambda raw: trees.flatten(_load(raw)).numpy()),
        "torch.save of index, value": Reference(save_indices, load_indices),
    }
    return plain | zipped | saved


def _zipped(reference: Reference) -> Reference:
    """A reference through zstd level 3, on the thread that asks."""
    pack, open_ = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    return Reference(lambda: pack.compress(reference.write()), lambda raw: reference.read(open_.decompress(raw)))


def _save(tree: Tree) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def _load(raw: bytes) -> Tree:
    loaded: Tree = torch.load(io.BytesIO(raw), weights_only=True)
    return loaded


def _ms(seconds: list[float]) -> float:
    return 1e3 * float(np.median(seconds))

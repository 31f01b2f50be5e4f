"""Trees to bytes and back. The byte format is described in ``docs/links.md``."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

from fedlora.errors import WireError
from fedlora.transport.precision import PRECISIONS, Precision
from fedlora.tree import Tree, flatten, unflatten

MAGIC = b"FLW"
"""The first three bytes of every message."""

VERSION = 1
"""The version of the byte format; a receiver refuses every other."""

_ENVELOPE = struct.Struct("<3sBIQ")  # magic, version, template, checksum
_SECTION = struct.Struct("<BB")  # precision, layout
_EMPTY, _DENSE, _SHARED, _PER_TENSOR = range(4)
_SMALLEST_SPARSE = 6  # bytes: a count, the number of words, one word
_PRECISIONS: dict[int, Precision] = {cls.code: cls() for cls in PRECISIONS.values()}


class Packet(NamedTuple):
    """A message and what each part of it costs.

    Attributes:
        raw: the bytes that travel.
        sizes: their number by part, and under ``envelope`` what belongs to none; the sum is ``len(raw)``.
        kept: how many entries of each part are not zero.
    """

    raw: bytes
    sizes: dict[str, int]
    kept: dict[str, int]


class _Segment(NamedTuple):
    """A run of entries whose positions share one probability."""

    size: int
    kept: int


def pack(parts: Mapping[str, Tree], precision: Mapping[str, Precision]) -> Packet:
    """One message of all parts in their order, each in the smallest of the layouts.

    Values are rounded to their part's precision first. A negative zero is a zero, and arrives as a positive one.
    The same trees give the same bytes.

    Args:
        parts: the trees by part name, float32 of any shapes.
        precision: the number format by part name.

    Returns:
        The bytes, and their number by part.

    Raises:
        WireError: a value is not finite (once rounded), a tensor is not float32, or a part is called ``envelope``.
        KeyError: a part has no precision.
    """
    if "envelope" in parts:
        raise WireError("A part is called 'envelope', which names the bytes of no part; call it something else.")
    template = _fingerprint(parts)
    checksum = xxh3_64(seed=template)
    chunks: list[bytes | memoryview] = [b""]
    sizes = {"envelope": _ENVELOPE.size}
    kept = {}
    for part, tree in parts.items():
        section, kept[part] = _pack_section(part, tree, precision[part])
        sizes[part] = sum(map(len, section))
        chunks += section
        for chunk in section:
            checksum.update(chunk)
    chunks[0] = _ENVELOPE.pack(MAGIC, VERSION, template, checksum.intdigest())
    return Packet(b"".join(chunks), sizes, kept)


def unpack(raw: bytes, like: Mapping[str, Tree]) -> dict[str, Tree]:
    """The inverse of ``pack``. Parts, names and shapes come from ``like``, never from the message.

    The checksum is verified before anything is decoded, and nothing larger than the template is allocated.

    Args:
        raw: the whole message.
        like: the parts that are expected, in the order in which they were packed; only names and shapes are read.

    Returns:
        float32 tensors on the CPU with ``like``'s names and shapes. The tensors of a part are views of one vector.

    Raises:
        WireError: the bytes are damaged, of another version, or made for another template.
    """
    if len(raw) < _ENVELOPE.size:
        raise WireError(f"The message has {len(raw)} bytes, fewer than its envelope ({_ENVELOPE.size}); send it again.")
    magic, version, template, checksum = _ENVELOPE.unpack_from(raw)
    if magic != MAGIC:
        raise WireError(f"The message begins with {magic!r} instead of {MAGIC!r}; it is not one of fedlora's.")
    if version != VERSION:
        raise WireError(
            f"The message has format version {version}, this side reads {VERSION}; use one fedlora version on both."
        )
    body = memoryview(raw)[_ENVELOPE.size :]
    if xxh3_64_intdigest(body, seed=template) != checksum:
        raise WireError("The message is damaged: its checksum does not match its bytes; send it again.")
    if template != _fingerprint(like):
        raise WireError(
            "The message was made for other parts, names or shapes than are expected; use one recipe on both sides."
        )
    reader = _Reader(body)
    trees = {part: _unpack_section(part, reader, tree) for part, tree in like.items()}
    if reader.rest():
        raise WireError(f"The message has {reader.rest()} bytes after its last part; it was not made by this format.")
    return trees


def _fingerprint(parts: Mapping[str, Tree]) -> int:
    """32 bits of a hash of part names, tensor names and shapes, in their order."""
    text = repr([(part, [(name, tuple(value.shape)) for name, value in tree.items()]) for part, tree in parts.items()])
    return xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) & 0xFFFFFFFF


def _pack_section(part: str, tree: Tree, precision: Precision) -> tuple[list[bytes | memoryview], int]:
    """One part: header, counts, positions, values; and how many values are not zero."""
    if wrong := [name for name, value in tree.items() if value.dtype != torch.float32]:
        raise WireError(f"Tensor {wrong[0]!r} of part {part!r} is {tree[wrong[0]].dtype}; convert it to float32.")
    vector = precision.round_values(flatten(tree).detach().cpu())
    values: NDArray[np.float32] = vector.numpy()
    values += 0.0  # flatten copied; -0.0 + 0.0 is 0.0. NumPy, as threads do not pay here
    if not np.isfinite(values).all():
        name = next(name for name, value in unflatten(vector, tree).items() if not torch.isfinite(value).all())
        raise WireError(
            f"Tensor {name!r} of part {part!r} has an entry that is NaN, or infinite at this precision; nothing was "
            "sent. Look for a diverged step: a lower learning rate or clipping may help."
        )
    nonzero: NDArray[np.bool_] = values != 0
    kept = int(np.count_nonzero(nonzero))
    if kept == 0:
        return [_SECTION.pack(precision.code, _EMPTY)], 0
    saved = precision.num_bytes(values.size) - precision.num_bytes(kept)
    if saved > _SMALLEST_SPARSE:
        layout, segments, least = _choose_sparse(nonzero, kept, [value.numel() for value in tree.values()])
        if saved > least:
            positions = _encode_positions(nonzero, segments)
            counts = b"".join(_varint(count) for count in (*(each.kept for each in segments), len(positions) // 4))
            if saved > len(counts) + len(positions):
                nonzero_values = torch.from_numpy(values[np.flatnonzero(nonzero)])
                header = _SECTION.pack(precision.code, layout) + counts
                return [header, positions, precision.to_bytes(nonzero_values)], kept
    return [_SECTION.pack(precision.code, _DENSE), precision.to_bytes(vector)], kept


def _choose_sparse(nonzero: NDArray[np.bool_], kept: int, sizes: Sequence[int]) -> tuple[int, list[_Segment], float]:
    """One probability for the section, or one per tensor, whichever is smaller, and the fewest bytes it can take."""
    shared = [_Segment(nonzero.size, kept)]
    ends = np.cumsum([0, *sizes]).tolist()
    per_tensor = [_Segment(end - start, int(np.count_nonzero(nonzero[start:end]))) for start, end in pairwise(ends)]
    least_shared, least_per_tensor = _estimate(shared), _estimate(per_tensor)
    if least_shared <= least_per_tensor:
        return _SHARED, shared, least_shared
    return _PER_TENSOR, per_tensor, least_per_tensor


def _estimate(segments: Sequence[_Segment]) -> float:
    """The bytes of the counts and, by Shannon's formula, of the positions."""
    bits = 8.0  # the number of words
    for size, kept in segments:
        bits += 8 * len(_varint(kept))
        if 0 < kept < size:
            bits -= kept * math.log2(kept / size) + (size - kept) * math.log2(1 - kept / size)
    return bits / 8


def _bernoulli(segment: _Segment) -> Any:
    """The model of one position; a quotient of integers is the same double everywhere."""
    smallest = 2.0**-24  # the resolution of the coder
    return constriction.stream.model.Bernoulli(
        min(max(segment.kept / segment.size, smallest), 1 - smallest), perfect=False
    )


def _encode_positions(nonzero: NDArray[np.bool_], segments: Sequence[_Segment]) -> bytes:
    """Range-coded positions as 32-bit words; segments that are empty or full cost nothing."""
    encoder = constriction.stream.queue.RangeEncoder()
    start = 0
    for segment in segments:
        if 0 < segment.kept < segment.size:
            encoder.encode(nonzero[start : start + segment.size].astype(np.int32), _bernoulli(segment))
        start += segment.size
    return bytes(encoder.get_compressed().astype("<u4", copy=False).tobytes())


def _decode_positions(part: str, raw: memoryview, segments: Sequence[_Segment]) -> NDArray[np.bool_]:
    """The inverse of ``_encode_positions``, held to the stated counts."""
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(raw, dtype="<u4").astype(np.uint32))
    nonzero = np.empty(sum(segment.size for segment in segments), dtype=np.bool_)
    start = 0
    for segment in segments:
        run = nonzero[start : start + segment.size]
        if 0 < segment.kept < segment.size:
            try:
                run[:] = decoder.decode(_bernoulli(segment), segment.size)
            except AssertionError as error:  # the coder's word for a stream that no encoder writes
                raise WireError(f"Part {part!r} has positions that cannot be decoded; send it again.") from error
            if np.count_nonzero(run) != segment.kept:
                raise WireError(f"Part {part!r} has another number of positions than it states; send it again.")
        else:
            run[:] = segment.kept > 0
        start += segment.size
    if not decoder.maybe_exhausted():
        raise WireError(f"Part {part!r} has more position bytes than positions; send it again.")
    return nonzero


def _unpack_section(part: str, reader: _Reader, like: Tree) -> Tree:
    """One part, in the shapes of ``like``."""
    code, layout = reader.take(_SECTION.size)
    if code not in _PRECISIONS:
        raise WireError(f"Part {part!r} has the unknown precision code {code}; expected one of {list(_PRECISIONS)}.")
    precision = _PRECISIONS[code]
    sizes = [value.numel() for value in like.values()]
    total = sum(sizes)
    if layout == _EMPTY:
        vector = torch.zeros(total)
    elif layout == _DENSE:
        vector = _read_values(part, reader, precision, total)
    elif layout in (_SHARED, _PER_TENSOR):
        segments = [_Segment(size, reader.varint(size)) for size in ([total] if layout == _SHARED else sizes)]
        num_words = reader.varint(reader.rest() // 4)
        nonzero = _decode_positions(part, reader.take(4 * num_words), segments)
        values = _read_values(part, reader, precision, sum(segment.kept for segment in segments))
        if not values.numpy().all():
            raise WireError(f"Part {part!r} lists a zero among its non-zero values; send it again.")
        vector = torch.zeros(total)
        vector.numpy()[np.flatnonzero(nonzero)] = values.numpy()
    else:
        raise WireError(f"Part {part!r} has the unknown layout {layout}; expected 0 to {_PER_TENSOR}.")
    return unflatten(vector, like)


def _read_values(part: str, reader: _Reader, precision: Precision, count: int) -> Tensor:
    values = precision.from_bytes(reader.take(precision.num_bytes(count)), count)
    if not np.isfinite(values.numpy()).all():
        raise WireError(f"Part {part!r} has a value that is NaN or infinite; the sender is faulty, leave it out.")
    return values


class _Reader:
    """A position in a message; every step past its end raises ``WireError``."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._at = 0

    def rest(self) -> int:
        return len(self._raw) - self._at

    def take(self, count: int) -> memoryview:
        if count > self.rest():
            raise WireError(f"The message ends early: {count} bytes are expected where {self.rest()} are left.")
        self._at += count
        return self._raw[self._at - count : self._at]

    def varint(self, largest: int) -> int:
        """A count in base 128, lowest digit first, refused above ``largest``."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if value > largest or shift > 63:
                raise WireError(f"The message states a count of {value} or more where at most {largest} is possible.")
            if byte < 128:
                return value


def _varint(value: int) -> bytes:
    """Base 128, lowest digit first, the high bit set on all bytes but the last."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)

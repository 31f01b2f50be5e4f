"""Serialises trees to bytes and back. The byte format is described in ``docs/wire-format.md``."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_intdigest

from fedlora.core.errors import WireError
from fedlora.core.tree import Tree, as_vector, num_entries, unflatten
from fedlora.transport.framing import Reader
from fedlora.transport.layout import Draw, Stored, read_layout, write_layout
from fedlora.transport.positions import Chosen
from fedlora.transport.precision import BFloat16, Float16, Float32, Precision
from fedlora.transport.uniform import Uniform

MAGIC = b"FLW"
"""The first three bytes of every message."""

VERSION = 3
"""The version of the byte format; a receiver refuses every other."""

REFERENCES = ("zero", "init", "last_round")
"""What a message's values are relative to: zero, the start of the phase, or the last message to the receiver."""

_ENVELOPE = struct.Struct("<3sBBIQ")  # magic, version, reference, template, checksum
_NEGATIVE_ZERO = -(2**31)  # its bits as an integer
_PIECE = 1 << 16  # entries whose positions, of eight bytes each, are held at a time
_PRECISIONS: dict[int, type[Precision]] = {cls.code: cls for cls in (Float32, BFloat16, Float16, Uniform)}


class Packet(NamedTuple):
    """A message, the size of each part, and what its receiver will decode.

    Attributes:
        raw: the bytes that are sent.
        sizes: bytes by part, with those that belong to no part under ``envelope``; the sum is ``len(raw)``.
        kept: the number of nonzero entries of each part after decoding; empty unless requested.
        trees: what ``unpack`` will return, bit for bit; empty unless requested.
    """

    raw: bytes
    sizes: dict[str, int]
    kept: dict[str, int]
    trees: dict[str, Tree]


class Form(NamedTuple):
    """How a part is encoded: its number format, the seed for random rounding, and positions drawn from a seed."""

    precision: Precision = Float32()
    seed: int = 0
    draw: Draw | None = None


def pack(parts: Mapping[str, Tree], forms: Mapping[str, Form], reference: str = "zero", trees: bool = True) -> Packet:
    """Packs all parts into one message, in order, each tensor in its smallest layout.

    A negative zero is treated as zero and arrives as a positive one. The same trees give the same bytes.

    Args:
        parts: the trees by part name, float32 of any shapes.
        forms: how each part is encoded; a part without a form is sent in plain float32.
        reference: what the values are relative to, one of ``REFERENCES``.
        trees: whether the packet includes the trees that its receiver will decode.

    Returns:
        The bytes, their number by part, and the decoded content.

    Raises:
        WireError: a value is not finite (once rounded), a tensor is not float32, or a part is named ``envelope``.
    """
    if "envelope" in parts:
        raise WireError("A part is called 'envelope', which names the bytes of no part; call it something else.")
    template = _fingerprint(parts)
    checksum = xxh3_64(seed=_seed(template, REFERENCES.index(reference)))
    chunks: list[bytes | memoryview] = [b""]
    sizes = {"envelope": _ENVELOPE.size}
    kept, delivered = {}, {}
    for part, tree in parts.items():
        section, sent = _pack_section(part, tree, forms.get(part, Form()))
        if trees:
            delivered[part], kept[part] = sent.arrives(tree), sent.kept
        sizes[part] = sum(map(len, section))
        chunks += section
        for chunk in section:
            checksum.update(chunk)
    chunks[0] = _ENVELOPE.pack(MAGIC, VERSION, REFERENCES.index(reference), template, checksum.intdigest())
    return Packet(b"".join(chunks), sizes, kept, delivered)


def unpack(raw: bytes, like: Mapping[str, Tree], formats: Sequence[Precision] = ()) -> dict[str, Tree]:
    """The trees of ``receive``."""
    return receive(raw, like, formats).trees


def receive(raw: bytes, like: Mapping[str, Tree], formats: Sequence[Precision] = ()) -> Packet:
    """The inverse of ``pack``. Parts, names and shapes come from ``like``, never from the message.

    The checksum is verified before anything is decoded. Allocation is bounded by the template, whatever the message
    says: at most 64 bytes per entry, 1 kB per tensor, and 1 MB in addition.

    Args:
        raw: the whole message.
        like: the expected parts, in the order in which they were packed; only names and shapes are read.
        formats: number formats accepted in addition to the built-in ones.

    Returns:
        The packet that ``pack`` returned. Trees are float32 on the CPU with ``like``'s names and shapes; the tensors of
        a part are views of one vector.

    Raises:
        WireError: the bytes are corrupted, of another version, or packed for another template.
    """
    reference_of(raw)
    _, _, reference, template, checksum = _ENVELOPE.unpack_from(raw)
    body = memoryview(raw)[_ENVELOPE.size :]
    if xxh3_64_intdigest(body, seed=_seed(template, reference)) != checksum:
        raise WireError("The message is damaged: its checksum does not match its bytes; send it again.")
    if template != _fingerprint(like):
        raise WireError(
            "The message was made for other parts, names or shapes than are expected; use one recipe on both sides."
        )
    known = {one.code: type(one) for one in formats} | _PRECISIONS
    reader = Reader(body)
    packet = Packet(raw, {"envelope": _ENVELOPE.size}, {}, {})
    for part, tree in like.items():
        before = reader.rest()
        try:
            sent = _unpack_section(reader, tree, known)
        except WireError as error:
            raise WireError(f"Part {part!r} is not of this format: {error}; send it again.") from error
        packet.sizes[part] = before - reader.rest()
        packet.kept[part] = sent.kept
        packet.trees[part] = sent.arrives(tree)
    if reader.rest():
        raise WireError(f"The message has {reader.rest()} bytes after its last part; it was not made by this format.")
    return packet


def reference_of(raw: bytes) -> str:
    """The reference that a message's values are relative to, one of ``REFERENCES``; ``unpack`` verifies it.

    Raises:
        WireError: the envelope is not of this version.
    """
    if len(raw) < _ENVELOPE.size:
        raise WireError(f"The message has {len(raw)} bytes, fewer than its envelope ({_ENVELOPE.size}); send it again.")
    magic, version, reference, _, _ = _ENVELOPE.unpack_from(raw)
    if magic != MAGIC:
        raise WireError(f"The message begins with {magic!r} instead of {MAGIC!r}; it is not one of fedlora's.")
    if version != VERSION:
        raise WireError(
            f"The message has format version {version}, this side reads {VERSION}; use one fedlora version on both."
        )
    if reference >= len(REFERENCES):
        raise WireError(f"The message is relative to the unknown reference {reference}; send it again.")
    return REFERENCES[reference]


def _seed(template: int, reference: int) -> int:
    """The seed of the checksum, which thereby covers the envelope."""
    return template | reference << 32


def _fingerprint(parts: Mapping[str, Tree]) -> int:
    """32 bits of a hash of the part names, tensor names and shapes, in order, as compact JSON."""
    return _hash(
        tuple((part, tuple((name, value.shape) for name, value in tree.items())) for part, tree in parts.items())
    )


@lru_cache(maxsize=64)
def _hash(named: tuple[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], ...]) -> int:
    return xxh3_64_intdigest(json.dumps(named, separators=(",", ":")).encode("ascii")) & 0xFFFFFFFF


class _Sent(NamedTuple):
    """The stored values of a part as its receiver reads them, and which entries they are; None: all of them."""

    values: NDArray[np.float32]
    where: Chosen | None

    @property
    def kept(self) -> int:
        """The number of nonzero entries."""
        return int(np.count_nonzero(self.values != 0))  # counting on the floats directly is slow

    def arrives(self, like: Tree) -> Tree:
        """The decoded tree, zero where nothing is stored: views of one vector."""
        if self.where is None:
            return unflatten(torch.from_numpy(self.values), like)
        vector = np.zeros(num_entries(like), np.float32)
        for found, run in _pieces(self.where):
            vector[found] = self.values[run]
        return unflatten(torch.from_numpy(vector), like)


def _pieces(where: Chosen) -> Iterator[tuple[NDArray[np.intp], slice]]:
    """The positions of stored entries, and where their values lie; a piece at a time, unless they are known."""
    if where.dtype != np.bool_:
        yield where.view(np.intp), slice(None)
        return
    done = 0
    for start in range(0, len(where), _PIECE):
        found = np.flatnonzero(where[start : start + _PIECE])
        found += start
        yield found, slice(done, done + len(found))
        done += len(found)


def _taken(values: NDArray[np.float32], where: Chosen, count: int) -> NDArray[np.float32]:
    """The stored ones of the values."""
    if where.dtype != np.bool_:
        return values[where]
    taken = np.empty(count, values.dtype)
    for found, run in _pieces(where):
        taken[run] = values[found]
    return taken


def _pack_section(part: str, tree: Tree, form: Form) -> tuple[list[bytes | memoryview], _Sent]:
    """One encoded part (number format, layout, values), and what will be decoded from it."""
    if wrong := [name for name, value in tree.items() if value.dtype != torch.float32]:
        raise WireError(f"Tensor {wrong[0]!r} of part {part!r} is {tree[wrong[0]].dtype}; convert it to float32.")
    values: NDArray[np.float32] = as_vector(tree).cpu().numpy()
    stored, chosen = _rounded(values, tree, form)
    if stored.zeros and chosen.view(np.int32).min() == _NEGATIVE_ZERO:
        with np.errstate(invalid="ignore"):  # NaN is refused in `write`
            chosen = chosen + np.float32(0)  # -0.0 + 0.0 is 0.0
    try:
        written = form.precision.write(chosen, stored.runs, form.seed)
    except WireError as error:
        named = unflatten(torch.from_numpy(form.precision.nonzero(values)), tree)
        largest = {name: float(value.abs().max()) for name, value in named.items() if value.numel()}
        name = max(largest, key=lambda name: math.inf if math.isnan(largest[name]) else largest[name])
        raise WireError(
            f"Tensor {name!r} of part {part!r} has an entry that is NaN, or infinite at this "
            "precision; nothing was sent. Look for a diverged step: a lower learning rate or clipping may help."
        ) from error
    header = bytes([form.precision.code]) + form.precision.settings() + stored.raw
    return [header, *written.chunks], _Sent(written.values, stored.where)


def _rounded(values: NDArray[np.float32], like: Tree, form: Form) -> tuple[Stored, NDArray[np.float32]]:
    """The layout of a part, and the values that it stores as the number format rounds them."""
    stored, chosen = _chosen(values, like, form)
    rounded = form.precision.nonzero(chosen)
    if rounded is chosen or np.count_nonzero(rounded != 0) == np.count_nonzero(chosen != 0):
        return stored, rounded
    del stored, chosen, rounded
    # some are zeros in this format alone, and their positions need not be stored
    return _chosen(form.precision.nonzero(values), like, form)


def _chosen(values: NDArray[np.float32], like: Tree, form: Form) -> tuple[Stored, NDArray[np.float32]]:
    """The layout of a part, and the values that it stores."""
    stored = write_layout(values != 0, like, form.precision.value_bits, form.draw)
    return stored, values if stored.where is None else _taken(values, stored.where, sum(stored.runs))


def _unpack_section(reader: Reader, like: Tree, known: Mapping[int, type[Precision]]) -> _Sent:
    """The values of one part, and their positions among the entries of ``like``."""
    code = reader.byte()
    if code not in known:
        raise WireError(f"it has the unknown number format {code}, expected one of {list(known)}")
    precision = known[code].from_settings(reader)
    stored = read_layout(reader, like)
    return _Sent(precision.read(reader, stored.runs), stored.where)

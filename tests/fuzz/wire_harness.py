"""What every fuzzer of ``unpack`` needs: templates, right checksums around any body, and what must hold of the result.

An input is one byte that selects a template, then the body of a message. The checksum is made right again, since it
would otherwise refuse every mutation before the code behind it is reached.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xxhash
from transport.outside_writer import SCALE, Writer

from fedlora.core.errors import WireError
from fedlora.core.tree import Tree
from fedlora.transport import BFloat16, Draw, Float16, Float32, Form, RandomK, Uniform, pack, unpack

CORPUS = Path(__file__).parent / "corpus"
ENVELOPE = 17
"""Bytes before the body."""


def zeros(**shapes: tuple[int, ...]) -> Tree:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


TEMPLATES: list[dict[str, Tree]] = [
    {"adapter": zeros(a=(4, 9), b=(9, 4)), "head": zeros(w=(3, 5), c=(3,)), "report": zeros(loss=())},
    {"adapter": zeros(a=(300,), none=(0, 2), b=(20, 2))},
    {"adapter": {f"t{i}": torch.zeros(30) for i in range(9)}, "head": {}},
    {"adapter": zeros(a=(300,)), "head": zeros(none=(0, 2), c=(7,))},
]


def fingerprint(like: Mapping[str, Tree]) -> int:
    named = [[part, [[name, list(value.shape)] for name, value in tree.items()]] for part, tree in like.items()]
    return xxhash.xxh3_64_intdigest(json.dumps(named, separators=(",", ":")).encode()) % 2**32


def seal(body: bytes, like: Mapping[str, Tree], reference: int = 0) -> bytes:
    """An envelope with a right checksum around any body, written from the description of the format."""
    return seal_for(body, fingerprint(like), reference)


def seal_for(body: bytes, template: int, reference: int = 0) -> bytes:
    checksum = xxhash.xxh3_64_intdigest(body, seed=template | reference << 32)
    return struct.pack("<3sBBIQ", b"FLW", 3, reference, template, checksum) + body


def decodes(raw: bytes, like: Mapping[str, Tree]) -> bool:
    """Whether ``unpack`` takes the message; what it gives then is of the template, and finite.

    Anything that is raised but ``WireError`` comes through.
    """
    try:
        out = unpack(raw, like)
    except WireError:
        return False
    assert list(out) == list(like)
    for part, tree in like.items():
        assert list(out[part]) == list(tree)
        for name, value in tree.items():
            assert out[part][name].shape == value.shape
            assert out[part][name].dtype == torch.float32
            assert np.isfinite(out[part][name].numpy()).all()
    return True


def check(data: bytes) -> None:
    """What the fuzzer calls with every input."""
    if data:
        like = TEMPLATES[data[0] % len(TEMPLATES)]
        decodes(seal(data[1:], like), like)


def seeds() -> dict[str, bytes]:
    """A few small inputs that together reach every layout and number format."""
    precisions = {
        "float32": Float32(),
        "bfloat16": BFloat16(),
        "float16": Float16(),
        "uniform1": Uniform(bits=1),
        "uniform2": Uniform(bits=2),
        "uniform4": Uniform(bits=4),
        "uniform8": Uniform(bits=8),
        "blocks": Uniform(bits=4, block=64),
    }
    inputs = {}
    for number, like in enumerate(TEMPLATES):
        for kind in ("dense", "half", "sparse", "lone", "box", "drawn"):
            parts, draw = _parts(like, kind)
            for name, precision in precisions.items():
                forms = {part: Form(precision, draw=draw) for part in ("adapter", "head")}
                inputs[f"{number}-{kind}-{name}"] = bytes([number]) + pack(parts, forms).raw[ENVELOPE:]
        for choices in range(16):
            inputs[f"{number}-outside-{choices}"] = bytes([number]) + _outside(like, choices)
    return inputs


def _outside(like: Mapping[str, Tree], choices: int) -> bytes:
    """The body of an outside encoder's message, which uses every coding where ours would not."""
    rng, parts, formats = np.random.default_rng(choices), {}, {}
    for part, tree in like.items():
        bits = int(rng.choice([1, 2, 8, 8]))
        largest = max(1, 2 ** (bits - 1) - 1)
        formats[part] = (4, bits, int(rng.choice([0, 6])))
        parts[part] = {
            name: np.asarray(SCALE * rng.integers(-largest, largest + 1, value.shape), np.float32)
            * (rng.random(value.shape) < 0.4).astype(np.float32)
            + np.float32(0)
            for name, value in tree.items()
        }
    return Writer(choices).message(parts, formats, 0)[ENVELOPE:]


def _parts(like: Mapping[str, Tree], kind: str) -> tuple[dict[str, Tree], Draw | None]:
    """Values at some places: all, half, few, few of the first tensor, the first column, or drawn by a seed."""
    rng, parts = np.random.default_rng(0), {}
    density = {"half": 0.5, "sparse": 0.1, "lone": 0.1}.get(kind, 1.0)
    for part, tree in like.items():
        parts[part] = {}
        for i, (name, value) in enumerate(tree.items()):
            kept = rng.random(tuple(value.shape)) < (0 if kind == "lone" and i else density)
            if kind == "box" and value.ndim > 1:
                kept[:, 1:] = False
            values = np.asarray(rng.standard_normal(kept.shape) * kept, np.float32)
            parts[part][name] = torch.from_numpy(values)
    if kind != "drawn":
        return parts, None
    random_k, seed = RandomK(density=0.2), 7
    counts = {name: n for tree in parts.values() for name, n in random_k.counts(tree, {}).items()}
    return {part: random_k(tree, {}, 0, seed) for part, tree in parts.items()}, Draw(seed, counts)


COMMITTED = (
    "0-half-bfloat16",
    "0-dense-float16",
    "0-drawn-float32",
    "0-box-blocks",
    "3-lone-float32",
    "1-sparse-float32",
    "1-dense-uniform1",
    "1-half-uniform2",
    "1-dense-uniform8",
    "2-drawn-uniform4",
    "0-outside-6",
    "0-outside-15",
    "1-outside-9",
    "2-outside-2",
)
"""Those of ``seeds`` that are in the corpus."""

if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for each in COMMITTED:
        (CORPUS / each).write_bytes(seeds()[each])

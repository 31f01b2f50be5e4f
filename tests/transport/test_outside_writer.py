"""Messages of an encoder that was made from the page alone: each is accepted, and says what was written."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from outside_writer import SCALE, RangeEncoder, Writer

from fedlora.core.errors import WireError
from fedlora.transport import unpack
from fedlora.transport.coder import Decoder
from fedlora.transport.wire import REFERENCES, reference_of

FORMATS = [(1, 0, 0), (2, 0, 0), (3, 0, 0), *((4, bits, block) for bits in (1, 2, 4, 8) for block in (0, 6, 7, 8))]
SHAPES = [(), (0,), (3, 0), (0, 2), (1,), (7,), (300,), (5, 9), (40, 3), (2, 3, 4), (64, 20)]


def values_of(rng, shape, format, density):
    """Values that the format represents exactly: multiples of one half."""
    code, bits, _ = format
    largest = max(1, 2 ** (bits - 1) - 1) if code == 4 else 100
    q = np.rint(rng.standard_normal(shape) * largest / 3).clip(-largest, largest) * (rng.random(shape) < density)
    return np.asarray(q * SCALE, np.float32) + np.float32(0)


def parts_of(seed):
    """One to three parts of up to six tensors, and the format of each."""
    rng = np.random.default_rng(seed)
    parts, formats = {}, {}
    for part in ["adapter", "head", "ä report"][: rng.integers(1, 4)]:
        formats[part] = FORMATS[rng.integers(len(FORMATS))]
        shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=rng.integers(0, 7))]
        density = rng.choice([0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
        parts[part] = {f"t{i}é": values_of(rng, shape, formats[part], density) for i, shape in enumerate(shapes)}
    return parts, formats


def agrees(parts, raw):
    like = {part: {name: torch.full(v.shape, 9.0) for name, v in tensors.items()} for part, tensors in parts.items()}
    out = unpack(raw, like)
    for part, tensors in parts.items():
        for name, value in tensors.items():
            read = out[part][name].numpy()
            assert read.shape == value.shape
            assert read.tobytes() == (value + np.float32(0)).tobytes()  # a negative zero is read as a positive one


@pytest.mark.parametrize("start", range(0, 160, 40))
def test_every_message_is_accepted_and_says_what_was_written(start):
    for seed in range(start, start + 40):
        parts, formats = parts_of(seed)
        reference = seed % 3
        raw = Writer(seed).message(parts, formats, reference)
        agrees(parts, raw)
        assert reference_of(raw) == REFERENCES[reference]


@pytest.mark.parametrize("code", [(1, 0, 0), (4, 8, 0), (4, 2, 6)])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.4])
def test_so_are_large_ones(density, code):
    rng = np.random.default_rng(0)
    parts = {"p": {f"t{i}": values_of(rng, (80, 250), code, density) for i in range(2)}}
    for seed in range(3):
        writer = Writer(seed)
        writer._layouts = lambda tensors: ([4] * 2, [b""] * 2, [v.reshape(-1) != 0 for v in tensors.values()])
        agrees(parts, writer.message(parts, {"p": code}, 0))


def test_negative_zeros_are_read_as_positive_ones():
    parts = {"p": {"x": np.array([-0.0, 1.0, -2.0, -0.0], np.float32)}}
    for seed in range(40):
        for code in FORMATS[:3]:
            agrees(parts, Writer(seed).message(parts, {"p": code}, 0))


def test_a_stream_that_ends_otherwise_is_refused():
    # the rule of the page's range coder: not even a shorter ending
    refused = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        weights = rng.integers(1, 50, 3).astype(np.float64)
        symbols = rng.integers(0, 3, 12)
        coder = RangeEncoder()
        coder.encode(symbols.tolist(), weights.tolist())
        lower, span, shifts = coder._lower, coder._span, coder._shifts
        good = coder.stream()[1:]
        decoder = Decoder(memoryview(good))
        assert decoder.decode(weights, 12).tolist() == symbols.tolist()
        decoder.close()
        shorter = -(-lower >> 64) << 64  # a word less
        if shorter < lower + span and shifts and good != b"":
            words = [shorter >> 32 * i & 0xFFFFFFFF for i in range(shifts + 1, -1, -1)]
            while words and not words[-1]:
                words.pop()
            raw = np.array(words, "<u4").tobytes()
            if raw == good:
                continue
            decoder = Decoder(memoryview(raw))
            assert decoder.decode(weights, 12).tolist() == symbols.tolist()
            with pytest.raises(WireError, match="more words than symbols need"):
                decoder.close()
            refused += 1
    assert refused > 3


def test_the_encoder_knows_the_page_alone():
    source = (Path(__file__).parent / "outside_writer.py").read_text(encoding="utf-8")
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    own = {"__future__", "json", "math", "random", "struct"}
    assert imported - own == {"constriction", "numpy", "xxhash", "zlib"}

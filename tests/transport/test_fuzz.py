"""Round trips of anything, and hundreds of thousands of damaged and forged messages."""

from __future__ import annotations

import random
import tracemalloc
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from fuzz.wire_harness import ENVELOPE, TEMPLATES, decodes, fingerprint, seal, seal_for, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import same
from outside_writer import SCALE, Writer

from fedlora.core.errors import WireError
from fedlora.testing import schema_of
from fedlora.transport import (
    BFloat16,
    Dense,
    Draw,
    Float16,
    Float32,
    Form,
    Link,
    Quota,
    RandomK,
    RankSlice,
    Threshold,
    TopK,
    Uniform,
    pack,
    unpack,
)
from fedlora.transport.coder import encode_symbols
from fedlora.transport.framing import Reader, varint
from fedlora.transport.positions import decode_positions, encode_positions, run_of

FLOATS = [Float32(), BFloat16(), Float16()]
UNIFORMS = [
    Uniform(bits=n, block=block, rounding=rounding)
    for n, block, rounding in product((1, 2, 4, 8), (None, 64, 256), ("nearest", "stochastic"))
]
SPARSIFIERS = [
    Dense(),
    TopK(density=0.25),
    TopK(density=0.1, scope="tensor", quota=Quota(B=0.5, head=1)),
    RandomK(density=0.25),
    RandomK(density=0.01, quota=Quota(A=1), rescale=False),
    Threshold(value=1),
    RankSlice(rank=2),
]
NAMES = ["m.lora_A", "m.lora_B", "n.lora_A.weight", "head.w", "head.b"]
SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from([0, 1, 5, 63, 64, 65, 191, 192, 1000])),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3)),
)


def random_tree(shapes, density, scale, seed):
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in zip(NAMES, shapes, strict=False):
        values = rng.standard_normal(shape) * (rng.random(shape) < density) * scale
        tree[name] = torch.from_numpy(np.asarray(values, np.float32))
    return tree


def holds(link, tree, seed):
    """Everything that is true of a message and what it was made of."""
    groups = schema_of({name: "head" if name.startswith("head") else "adapter" for name in tree})
    packet = link.send(tree, groups, 0, seed)
    like = {part: {name: torch.zeros(value.shape) for name, value in t.items()} for part, t in packet.trees.items()}
    out = unpack(packet.raw, like)
    assert same(out, packet.trees)
    assert sum(packet.sizes.values()) == len(packet.raw)
    assert list(packet.sizes) == ["envelope", *like]
    assert packet.kept == {p: sum(int(torch.count_nonzero(v)) for v in t.values()) for p, t in out.items()}
    thinned = link.thin(tree, groups, 0, seed)
    if link.precision == Float32():
        assert all(torch.equal(out[groups[name].group][name], value) for name, value in thinned.items())
    if link.precision in FLOATS:
        draw = Draw(seed, link.sparsify.counts(tree, groups)) if isinstance(link.sparsify, RandomK) else None
        forms = {"adapter": Form(link.precision, seed, draw), "head": Form(link.precision, seed + 1, draw)}
        assert pack(out, forms).raw == packet.raw


@settings(max_examples=250, deadline=None)
@given(
    st.lists(SHAPES, max_size=len(NAMES)),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([1e-42, 1e-3, 1.0, 1e3]),
    st.sampled_from(FLOATS + UNIFORMS),
    st.sampled_from(SPARSIFIERS),
    st.integers(0, 2**64 - 1),
)
def test_what_is_packed_arrives(shapes, density, scale, precision, sparsify, seed):
    holds(Link(sparsify=sparsify, precision=precision), random_tree(shapes, density, scale, seed), seed)


@pytest.mark.parametrize("sparsify", SPARSIFIERS)
@pytest.mark.parametrize("precision", [*FLOATS, *UNIFORMS])
def test_every_precision_with_every_sparsifier(precision, sparsify):
    shapes = [(8, 40), (30, 8), (3, 200), (5, 4), (5,)]
    holds(Link(sparsify=sparsify, precision=precision), random_tree(shapes, 0.8, 1.0, 3), 5)


@pytest.mark.parametrize("link", [Link(), Link(sparsify=TopK(density=0.1), precision=Uniform(bits=4, block=64))])
def test_a_million_entries(link):
    holds(link, random_tree([(1000, 500), (500, 999), (1,), (499,)], 1.0, 1.0, 0), 0)


# damaged and forged


def mutated(raw: bytes, other: bytes, kind: str, rng: random.Random) -> bytes:
    """Flipped bits, another length, two messages in one, or random bytes behind an envelope."""
    if kind == "bits":
        flipped = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == "length":
        return raw[: rng.randrange(len(raw))] + rng.randbytes(rng.choice((0, 0, 1, 9)))
    if kind == "splice":
        cut = rng.randrange(len(raw))
        return raw[:cut] + other[cut if rng.random() < 0.5 else rng.randrange(len(other)) :]
    # what is left of the first bytes selects a number format and a layout
    cut = min(len(raw), ENVELOPE + rng.choice((0, 1, 2, 3, 4, 20)))
    return raw[:cut] + rng.randbytes(len(raw) - cut if rng.random() < 0.5 else rng.randrange(120))


@pytest.mark.parametrize("count", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "some"), [("bits", 0.03), ("length", 0), ("splice", 0.03), ("random", 0.001)])
def test_damaged_messages_are_refused_and_forged_ones_too_or_decode_in_the_template(kind, some, count):
    rng = random.Random(kind)
    inputs = sorted(seeds().values())
    messages = [[seal(each[1:], like) for each in inputs if each[0] == i] for i, like in enumerate(TEMPLATES)]
    templates = [fingerprint(like) for like in TEMPLATES]
    tried = decoded = 0
    while tried < count:
        which = rng.randrange(len(TEMPLATES))
        raw, other = rng.choice(messages[which]), rng.choice(messages[which])
        damaged = mutated(raw, other, kind, rng)
        if damaged in (raw, other):
            continue
        tried += 1
        with pytest.raises(WireError):  # the checksum is no longer right
            unpack(damaged, TEMPLATES[which])
        decoded += decodes(seal_for(damaged[ENVELOPE:], templates[which]), TEMPLATES[which])
    assert decoded > some * count  # the code behind the checksum was reached


# memory


def peak(raw, like):
    """Most bytes that were allocated at one time; NumPy reports its arrays to ``tracemalloc``."""
    tracemalloc.start()
    decodes(raw, like)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def bound(like):
    """As ``unpack`` states it."""
    values = [value for tree in like.values() for value in tree.values()]
    return 64 * sum(value.numel() for value in values) + 1000 * len(values) + 10**6


LARGE = {"adapter": {f"t{i}": torch.zeros(40, 50) for i in range(9)}, "head": {"w": torch.zeros(2000)}}


def thin(tree, density):
    """Multiples of the outside encoder's scale."""
    rng = np.random.default_rng(0)
    whole = {
        name: SCALE * rng.integers(1, 100, value.shape) * (rng.random(value.shape) < density)
        for name, value in tree.items()
    }
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in whole.items()}


def test_streams_that_grow_a_thousandfold_do_not():
    for coding in (1, 2):
        coder = zlib.compressobj(9, zlib.DEFLATED, -15)
        stream = coder.compress(bytes(2_000_000)) + coder.flush()
        assert len(stream) < 2500
        raw = seal(b"\1\4" + varint(9000) + bytes([coding]) + varint(len(stream)) + stream, LARGE)
        assert peak(raw, LARGE) <= bound(LARGE)
        with pytest.raises(WireError, match="a deflate stream of other than"):
            unpack(raw, LARGE)


def test_forged_messages_allocate_no_more_than_is_stated():
    assert bound(LARGE) == 64 * 20_000 + 10_000 + 10**6
    rng, messages = random.Random(0), []
    for sparsify, precision in product(SPARSIFIERS, [Float32(), Uniform(bits=1), Uniform(bits=8), UNIFORMS[-2]]):
        tree = {part: {name: torch.randn(value.shape) for name, value in each.items()} for part, each in LARGE.items()}
        flat = tree["adapter"] | tree["head"]
        groups = schema_of({name: part for part, each in tree.items() for name in each})
        messages.append(Link(sparsify=sparsify, precision=precision).send(flat, groups, 0, 1).raw)
    plain = {part: {name: value.numpy() for name, value in thin(each, 0.3).items()} for part, each in LARGE.items()}
    messages += [Writer(seed).message(plain, dict.fromkeys(plain, (4, 8, 0)), 0) for seed in range(12)]
    most = max(peak(raw, LARGE) for raw in messages)
    for raw in messages:
        for kind in ("bits", "bits", "length", "splice", "splice", "random"):
            damaged = mutated(raw, rng.choice(messages), kind, rng)
            most = max(most, peak(seal(damaged[ENVELOPE:], LARGE), LARGE))
    assert 10**5 < most <= bound(LARGE)


@pytest.mark.parametrize(
    "start",
    [
        b"\1\3" + varint(5) * 9,  # positions of each tensor
        b"\1\4" + varint(5) + b"\0",  # of all together
        b"\4\4\0\1" + bytes(2 * 9) + b"\1" + varint(17_000) + varint(1000) + bytes(6),  # classes
        b"\4\1\0\1" + bytes(2 * 9) + b"\2" + varint(17_000) + varint(1000) + bytes(1),  # symbols
    ],
)
def test_many_words_in_a_long_message_are_not_read(start):
    content = start + varint(4_000_000) + bytes(16_000_000)
    raw = seal(content, LARGE)
    assert peak(raw, LARGE) <= bound(LARGE)
    with pytest.raises(WireError, match=r"a count of \d+ or more where at most 18002 is possible"):
        unpack(raw, LARGE)


def test_many_small_tensors_allocate_no_more_than_is_stated():
    like = {"p": {f"t{i}": torch.zeros(()) for i in range(5000)}}
    ones = {"p": {name: torch.tensor(float(i % 5 == 0)) for i, name in enumerate(like["p"])}}
    for precision in (Float32(), Uniform(block=64)):
        assert peak(pack(ones, {"p": Form(precision)}).raw, like) <= bound(like)


def test_a_coder_writes_no_more_words_than_are_read():
    def there_and_back(kept):
        run = run_of(kept)
        raw = encode_positions([run])
        (places,) = decode_positions(Reader(memoryview(raw)), [run.segment])
        assert np.array_equal(places, kept if places.dtype == np.bool_ else np.flatnonzero(kept))
        return raw

    for size in range(1, 11):  # all positions among up to ten places
        for number in range(2**size):
            raw = there_and_back(np.array([number >> i & 1 for i in range(size)], np.bool_))
            assert raw[0] <= size + 2
    # gaps as unlikely as can be: all kept places lie at one end
    for size, count in ((300, 150), (300, 20), (5000, 3), (5000, 2500)):
        for kept in (np.arange(size) < count, np.arange(size) >= size - count):
            there_and_back(kept)
    # the rarest symbols cost 24 bits each
    symbols = np.array([0] * 10**6 + [1, 2, 3], np.int32)
    for order in (symbols, symbols[::-1]):
        assert len(encode_symbols(order, np.bincount(order))) < 4 * 20

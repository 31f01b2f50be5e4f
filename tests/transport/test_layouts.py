"""Which entries are stored: the smallest layout of each tensor, exact sizes, and decoding one position at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import BITMAP, BOX, CODED, DENSE, MIXED, POOLED, SEEDED, body, digits, one, packed, random_mask_tree, same
from slow_reader import slow_unpack

from fedlora.testing import schema_of
from fedlora.transport import BFloat16, Draw, Float16, Float32, Form, RandomK, RankSlice, Uniform, pack, unpack

FORMATS = [Float32(), BFloat16(), Float16(), *(Uniform(bits=n) for n in (1, 2, 4, 8)), Uniform(bits=4, block=64)]


def shapes_of(parts):
    return {part: {name: list(value.shape) for name, value in tree.items()} for part, tree in parts.items()}


def entropy(size, kept):
    """Bytes of Shannon's formula."""
    p = kept / size
    return size / 8 * -(p * math.log2(p) + (1 - p) * math.log2(1 - p))


def agrees_with_the_slow_reader(parts, packet):
    out = unpack(packet.raw, parts)
    slow = slow_unpack(packet.raw, shapes_of(parts))
    assert same(out, packet.trees)
    for part, tree in out.items():
        assert {name: value.reshape(-1).tolist() for name, value in tree.items()} == slow[part]


# each layout where it is the smallest


def test_coded_positions_by_hand():
    values = torch.zeros(100)
    values[[3, 70]] = torch.tensor([1.0, -2.5])
    raw = body({"p": {"x": values}})
    assert raw[:4] == bytes([1, CODED, 2, 1])  # float32, two values, one word
    # 2 * 2 ** (2 + 3) <= 100, so that two low bits stand apart; the gaps are 3 and 66: high parts 0 and 16
    assert raw[8:] == bytes([0b1011]) + bytes.fromhex("0000803f 000020c0")
    agrees_with_the_slow_reader({"p": {"x": values}}, packed({"p": {"x": values}}))


def test_a_bitmap_near_one_half():
    parts = {"p": random_mask_tree(4096, 1 / 2)}
    raw = body(parts)
    assert raw[1] == BITMAP
    assert len(raw) == 2 + 4096 // 8 + 4 * 2048
    assert raw[2:514] == np.packbits(parts["p"]["t0"] != 0, bitorder="little").tobytes()


def test_a_bitmap_by_hand():
    assert body(one([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.5])) == bytes.fromhex("01 02 0201 0000803f 000020c0")


def test_one_zero_among_many_values_is_sent_as_a_value():
    values = torch.ones(100_000)
    values[500] = 0
    assert packed({"p": {"x": values}}).sizes["p"] == 2 + 400_000


def test_dense_tensors_pay_no_positions_beside_sparse_ones():
    sparse = random_mask_tree(4096, 1 / 16)["t0"]
    alone = len(packed({"p": {"a": sparse}}).raw)
    both = packed({"p": {"a": sparse, "head": torch.ones(5000)}}).raw
    assert both[18:20] == bytes([MIXED, CODED | DENSE << 4])
    assert len(both) == alone + 5000 * 4 + 1  # the table
    with_empty = len(packed({"p": {"a": sparse, "head": torch.zeros(500_000)}}).raw)
    assert with_empty == alone + 1


def test_equal_densities_are_pooled_and_unequal_ones_are_not():
    alike = random_mask_tree(48_000, 1 / 16, num_tensors=48)
    assert body({"p": alike})[1] == POOLED
    unlike = {"a": random_mask_tree(50_000, 1 / 4)["t0"], "b": random_mask_tree(50_000, 1 / 500)["t0"]}
    raw = body({"p": unlike})
    assert raw[1] == CODED
    positions = entropy(50_000, 12_500) + entropy(50_000, 100)
    assert len(raw) - 4 * 12_600 <= 1.01 * positions + 2 + digits(12_500, 100, 2000)


@pytest.mark.parametrize("density", [1 / 4, 1 / 16, 1 / 64])
def test_positions_cost_their_entropy(density):
    size = 300_000
    tree = random_mask_tree(size, density, num_tensors=48)
    packet = packed({"p": tree})
    kept = int(size * density)
    assert packet.sizes["p"] - 4 * kept <= 1.012 * entropy(size, kept)
    out = unpack(packet.raw, {"p": tree})["p"]
    assert all(torch.equal(out[name], tree[name]) for name in tree)


@pytest.mark.parametrize(("density", "size"), [(0.25, 10_000), (0.01, 10_000), (0.5, 400)])
def test_seeded_positions_cost_eight_bytes_and_a_count(density, size):
    tree = {"x": torch.randn(size, generator=torch.Generator().manual_seed(0))}
    sparsify, seed = RandomK(density=density), 2**63 + 5
    kept = sparsify(tree, {}, 0, seed)
    count = int(size * density)
    packet = packed({"p": kept}, draw=Draw(seed, sparsify.counts(tree, {})))
    assert packet.raw[18] == SEEDED
    assert packet.raw[19:27] == seed.to_bytes(8, "little")
    assert packet.sizes["p"] == 2 + 8 + digits(count) + 4 * count
    assert same(unpack(packet.raw, {"p": tree}), {"p": kept})
    if size < 1000:
        agrees_with_the_slow_reader({"p": tree}, packet)


def test_drawn_places_that_are_smaller_otherwise_need_no_seed():
    # every drawn entry is zero but one: the draw's places would carry many zeros
    tree = {"x": torch.zeros(1000)}
    kept = RandomK(density=0.5)({"x": torch.ones(1000)}, {}, 0, 3)["x"]
    tree["x"][int(torch.nonzero(kept)[0])] = 1.0
    raw = body({"p": tree}, draw=Draw(3, {"x": 500}))
    assert raw[1] == CODED
    assert len(raw) < 20


def test_values_beside_the_drawn_places_still_arrive():
    tree = {"x": torch.tensor([1.0, 0.0, 2.0, 0.0] * 25)}
    packet = packed({"p": tree}, draw=Draw(3, {"x": 20}))
    assert same(unpack(packet.raw, {"p": tree}), {"p": tree})


@pytest.mark.parametrize("shape", [(16, 300), (16, 10, 5, 3)])
def test_a_slice_of_ranks_is_a_box(shape):
    tree = {"m.lora_A.weight": torch.randn(shape), "m.lora_B.weight": torch.randn(200, 16)}
    kept = RankSlice(rank=4)(tree, schema_of(dict.fromkeys(tree, "adapter")), 0)
    packet = packed({"p": kept})
    columns = math.prod(shape[1:])
    assert packet.raw[18] == BOX
    assert packet.sizes["p"] == 2 + digits(4, columns) + digits(200, 4) + 4 * (4 * columns + 200 * 4)
    assert packet.raw[19:21] == bytes([4, columns & 127 | 128])
    assert same(unpack(packet.raw, {"p": tree}), {"p": kept})


def test_every_layout_side_by_side():
    ones = {"x": torch.ones(2000)}
    tree = {
        "empty": torch.zeros(70),
        "dense": torch.ones(70),
        "bitmap": torch.tensor([0.0, 1.0]).repeat(400),
        "coded": random_mask_tree(2000, 1 / 20)["t0"],
        "x": RandomK(density=0.25)(ones, {}, 0, 9)["x"],
        "box": torch.nn.functional.pad(torch.ones(3, 4), (0, 30, 0, 20)),
        "scalar": torch.tensor(2.0),
    }
    packet = packed({"p": tree}, draw=Draw(9, {"x": 500}))
    assert packet.raw[18:23] == bytes([MIXED, DENSE << 4, BITMAP | CODED << 4, SEEDED | BOX << 4, DENSE])
    assert same(unpack(packet.raw, {"p": tree}), {"p": tree})
    agrees_with_the_slow_reader({"p": tree}, packet)


def test_a_lone_small_tensor_is_at_most_eight_bytes_from_its_smallest_layout():
    # the last word of the coder may hold little
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 8, 9, 24, 40, 64, 100, 300):
        for kept in {1, 2, size // 4, size // 2, size - 1, size} - {0}:
            if kept > size:
                continue
            values = np.zeros(size, np.float32)
            values[rng.permutation(size)[:kept]] = 1
            coded = digits(kept) + 1 + 4 * kept + math.ceil(entropy(size, kept) if kept < size else 0)
            smallest = min(4 * size, math.ceil(size / 8) + 4 * kept, coded)
            assert len(body(one(values))) <= 2 + smallest + 8


# against the slow reader


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4),
    st.sampled_from(FORMATS),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_messages_equal_a_slow_reader(pieces, precision, seed, drawn):
    rng = np.random.default_rng(seed)
    tree, draw = {}, None
    for i, (size, kept) in enumerate(pieces):
        values = np.zeros(size, np.float32)
        values[rng.permutation(size)[:kept]] = rng.standard_normal(min(kept, size))
        tree[f"t{i}"] = torch.tensor(values).view(-1, 4) if size % 4 == 0 else torch.tensor(values)
    if drawn:
        sparsify = RandomK(density=0.3)
        draw = Draw(seed, sparsify.counts(tree, {}))
        tree = sparsify(tree, {}, 0, seed)
    parts = {"p": tree, "rest": {"x": torch.tensor(1.5)}}
    agrees_with_the_slow_reader(parts, pack(parts, {"p": Form(precision, seed, draw)}))


@pytest.mark.parametrize(
    "precision", [*(Uniform(bits=n) for n in (1, 2, 4, 8)), Uniform(bits=8, rounding="stochastic")]
)
@pytest.mark.parametrize("size", [150, 1500, 17_000])
def test_counted_symbols_equal_a_slow_reader(precision, size):
    parts = {"p": random_mask_tree(size, 0.9, num_tensors=2) | {"y": torch.randn(30)}}
    agrees_with_the_slow_reader(parts, packed(parts, precision))

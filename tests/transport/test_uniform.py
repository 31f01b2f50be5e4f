"""Whole multiples of a scale: scales and symbols by hand, errors, unbiasedness, sizes, and odd values."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from fixtures.more import some_of
from fuzz.wire_harness import seal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from messages import body, digits, one, packed, same
from xxhash import xxh3_64_hexdigest

from fedlora.core.errors import WireError
from fedlora.transport import Uniform, unpack
from fedlora.transport.coder import splitmix
from fedlora.transport.scales import _LoneBlock, _refined, _scales, groups_of, least_squares

BITS = [1, 2, 4, 8]
ROUNDINGS = ["nearest", "stochastic"]
COUNTED, HUFFMAN, HALVES = 2, 3, 4
ALL = [Uniform(bits=n, block=b, rounding=r) for n in BITS for b in (None, 64) for r in ROUNDINGS]
FINITE = st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126)


def sent(values, precision, seed=0):
    """What arrives."""
    parts = one(values)
    packet = packed(parts, precision, seed=seed)
    out = unpack(packet.raw, parts)
    assert same(out, packet.trees)
    return out["p"]["x"].numpy()


def scales_of(raw, count):
    """From the body of one dense part."""
    return (np.frombuffer(raw[4 : 4 + 2 * count], "<u2").astype(np.uint32) << 16).view(np.float32)


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


# by hand


def test_the_scale_of_eight_bits_is_the_largest_over_127_rounded_up():
    values = [1.0, -0.5, 0.25]
    # 1 / 127 = 0.0078740157; the bfloat16 above it is 0x3c02
    assert body(one(values), Uniform()) == bytes.fromhex("04 08 00 01  023c  00 7ec120")
    scale = 2**-7 * (1 + 2 / 128)
    assert sent(values, Uniform()).tolist() == [126 * scale, -63 * scale, 32 * scale]


def test_one_bit_is_the_mean_magnitude_and_the_sign():
    assert sent([1.0, -3.0, 2.0, -2.0], Uniform(bits=1)).tolist() == [2.0, -2.0, 2.0, -2.0]
    # the mean of what is not zero: that is all there is a sign of
    assert sent([4.0, 0.0, 0.0, -2.0], Uniform(bits=1)).tolist() == [3.0, 0.0, 0.0, -3.0]


def test_two_bits_drop_what_is_small():
    # from 1.22 root mean squares: 2 and -2 are 1 and -1, 0.5 is 0; the mean magnitude of the two is 2
    assert sent([2.0, -2.0, 0.5, 2.0], Uniform(bits=2)).tolist() == [2.0, -2.0, 0.0, 2.0]


def test_whole_multiples_arrive_as_they_are():
    for n in (2, 4, 8):
        q = np.arange(-Uniform(bits=n).largest, Uniform(bits=n).largest + 1, dtype=np.float32)
        for rounding in ROUNDINGS:
            assert sent(q * 0.5, Uniform(bits=n, rounding=rounding)).tolist() == (q * 0.5).tolist()


@pytest.mark.parametrize("block", [64, 128, 256])
def test_blocks_have_scales_of_their_own_and_end_with_the_tensor(block):
    sizes = [300, 0, 30, 64]
    tree = {f"t{i}": torch.tensor(normal(size, i)) * 10**i for i, size in enumerate(sizes)}
    raw = body({"p": tree}, Uniform(block=block))
    lengths = [min(block, size - at) for size in sizes for at in range(0, size, block)]
    flat = torch.cat(list(tree.values())).numpy()
    largest = [np.abs(each).max() for each in np.split(flat, np.cumsum(lengths)[:-1])]
    assert raw[:4] == bytes([4, 8, block.bit_length() - 1, 1])
    scales = scales_of(raw, len(lengths))
    assert (scales >= np.array(largest) / 127).all()
    assert (scales <= np.array(largest) / 127 * (1 + 2**-7)).all()


def test_one_scale_a_tensor_without_blocks_and_none_for_empty_ones():
    tree = {"a": torch.tensor([127.0, 1.0]), "none": torch.zeros(0, 3), "b": torch.tensor([254.0])}
    assert body({"p": tree}, Uniform()) == bytes.fromhex("04 08 00 01  803f 0040  00 7f017f")


DIGESTS = {1: "125f9b9e5d028d61", 2: "d69d2f2d821c0eaa", 4: "a936c2266c52e62d", 8: "680d3d5545d24ad2"}


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_the_same_in_every_version(bits):
    # sums of four draws, with zeros, an outlier, subnormal numbers and ties; too few for zlib, whose versions differ
    draws = (splitmix(7, 4 * 9000) >> np.uint64(40)).astype(np.float64).reshape(4, -1)
    values = (draws.sum(axis=0) / 2.0**25 - 1).astype(np.float32)
    values[1000:1100], values[2000] = 0, 300
    values[3000:3064] *= np.float32(2.0**-130)
    values[4000:5000] = np.round(values[4000:5000] * 8) / 8
    content = b""
    for block in (None, 64):
        for rounding in ROUNDINGS:
            written = Uniform(bits=bits, block=block, rounding=rounding).write(values, [5000, 0, 3, 3997], 5)
            content += b"".join(written.chunks) + written.values.tobytes()
    assert xxh3_64_hexdigest(content) == DIGESTS[bits]


# what arrives


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 300), elements=FINITE), st.sampled_from(ALL), st.integers(0, 2**64 - 1))
def test_what_arrives_is_foretold_and_zeros_stay_zeros(values, precision, seed):
    out = sent(values, precision, seed)
    assert (out[values == 0] == 0).all()
    assert not np.signbit(out[out == 0]).any()
    assert ((out == 0) | (np.sign(out) == np.sign(values)) | (precision.bits == 1)).all()


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 300), elements=FINITE), st.sampled_from([None, 64]))
def test_eight_bits_are_wrong_by_half_a_scale_at_most(values, block):
    precision = Uniform(block=block)
    written = precision.write(values, [len(values)], 0)
    width = block or len(values)
    scales = (np.frombuffer(written.chunks[0], "<u2").astype(np.uint32) << 16).view(np.float32)
    bound = np.repeat(scales.astype(np.float64), width)[: len(values)] / 2
    assert (np.abs(written.values.astype(np.float64) - values) <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize(("bits", "bound"), [(1, 0.37), (2, 0.20), (4, 0.014), (8, 0.0003)])
def test_squared_error_of_normal_values_is_near_the_best(bits, bound):
    # the best uniform quantisers leave 0.363 with 2 levels, 0.190 with 3 and 0.0115 with 16 (Max, 1960); 8 bits span
    # all values
    values = normal(20_000)
    error = np.mean((sent(values, Uniform(bits=bits)) - values) ** 2) / np.mean(values**2)
    assert error <= bound


def test_blocks_lower_the_error_of_unequal_values():
    values = normal(6400) * np.repeat(10.0 ** np.arange(-2, 3), 1280).astype(np.float32)
    for bits in BITS:
        errors = [np.sum((sent(values, Uniform(bits=bits, block=b)) - values) ** 2) for b in (64, None)]
        assert errors[0] < errors[1]


BLOCKS = (None, 64)


@pytest.mark.parametrize(
    ("bits", "block"), some_of(product(BITS, BLOCKS), {(bits, BLOCKS[i % 2]) for i, bits in enumerate(BITS)})
)
def test_stochastic_rounding_is_unbiased(bits, block):
    precision = Uniform(bits=bits, block=block, rounding="stochastic")
    values = normal(128)
    values[:4] = 0.0, 1e-3, -1e-3, np.abs(values).max()
    draws = 3000
    outs = np.stack([precision.write(values, [128], seed).values for seed in range(draws)]).astype(np.float64)
    error = outs.mean(axis=0) - values
    standard = outs.std(axis=0) / math.sqrt(draws)
    assert (np.abs(error) <= 5 * standard + 1e-6).all()
    assert np.abs(error).sum() > 0  # it does draw
    # independent draws: the errors of two entries have nothing in common
    correlation = np.corrcoef(outs[:, 4:12].T)[np.triu_indices(8, 1)]
    assert np.abs(correlation[np.isfinite(correlation)]).max() < 5 / math.sqrt(draws)


@pytest.mark.parametrize("bits", BITS)
def test_the_seed_alone_decides(bits):
    precision, parts = Uniform(bits=bits, rounding="stochastic"), one(normal(500))
    assert packed(parts, precision, seed=1).raw == packed(parts, precision, seed=1).raw
    assert packed(parts, precision, seed=1).raw != packed(parts, precision, seed=2).raw
    nearest = Uniform(bits=bits)
    assert packed(parts, nearest, seed=1).raw == packed(parts, nearest, seed=2).raw


# sizes


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 5, 64, 191, 192, 1000, 20_000])
def test_never_more_than_bits_a_value_and_scales(bits, block, rounding, size):
    precision = Uniform(bits=bits, block=block, rounding=rounding)
    scales = 2 * (-(-size // block) if block else 1)
    for values in (normal(size), np.sign(normal(size)), np.linspace(-1, 1, size, dtype=np.float32) + np.float32(1e-4)):
        # number format, settings, layout and coding are 5 bytes; one bit also has its counts, and up to two words
        constant = 5 + (3 * digits(size) + digits(size) + 8 if bits == 1 else 0)
        assert len(body(one(values), precision)) <= math.ceil(bits * size / 8) + scales + constant


@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize(("bits", "rounding"), [(n, r) for n in (2, 4, 8) for r in ROUNDINGS])
def test_symbols_cost_their_entropy(bits, rounding, draw):
    values = getattr(np.random.default_rng(0), draw)(size=60_000).astype(np.float32)
    precision = Uniform(bits=bits, rounding=rounding)
    raw = body(one(values), precision)
    out = sent(values, precision)
    q = np.rint(out / scales_of(raw, 1)[0]).astype(int) + precision.largest
    counts = np.bincount(q, minlength=2 * precision.largest + 1)
    share = counts[counts > 0] / len(q)
    entropy = len(q) / 8 * -float((share * np.log2(share)).sum())
    # Huffman codes, of half of eight bits where the other half is random; a table for each 2 ** 15 bytes
    assert raw[6] == (HALVES if bits == 8 and draw == "normal" else HUFFMAN if bits > 2 else COUNTED)
    assert entropy <= len(raw) <= 1.012 * entropy + 200


def test_classes_cost_little_more_than_the_entropy_of_symbols():
    values = normal(12_000)  # too few to count 255 symbols
    raw, out = body(one(values), Uniform()), sent(values, Uniform())
    q = np.rint(out / scales_of(raw, 1)[0]).astype(int)
    share = np.unique(q, return_counts=True)[1] / len(q)
    assert raw[6] == 1
    assert len(raw) <= 1.02 * len(q) / 8 * -float((share * np.log2(share)).sum())


def test_zeros_among_values_cost_less_than_places():
    values = normal(10_000)
    values[np.random.default_rng(1).random(10_000) < 0.5] = 0
    kept = np.count_nonzero(values)
    assert len(body(one(values), Uniform(bits=1))) <= 10_000 / 8 + kept / 8 + 40


# odd values


@pytest.mark.parametrize("precision", ALL)
def test_odd_tensors(precision):
    assert sent([], precision).tolist() == []
    assert sent([0.0, -0.0, 0.0], precision).tolist() == [0.0, 0.0, 0.0]
    scalar = {"p": {"x": torch.tensor(-3.0), "none": torch.zeros(2, 0)}}
    packet = packed(scalar, precision)
    out = unpack(packet.raw, scalar)
    assert same(out, packet.trees)
    assert out["p"]["x"].shape == ()
    # only the scale is rounded, upwards if its the largest and to the next 128th; one bit is the sign, without fail
    assert out["p"]["x"].item() == pytest.approx(-3.0, rel=1 / 64)
    assert same(unpack(packed({"p": {}}, precision).raw, {"p": {}}), {"p": {}})


@pytest.mark.parametrize("precision", ALL)
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.1754944e-38, 1e-30, 1e30, 3e38])
def test_subnormal_and_huge_values(value, precision):
    values = np.array([value, -value, value / 2, 0], np.float32)
    out = sent(values, precision)
    assert np.isfinite(out).all()
    # at random up to a whole scale beside, or two where only the sign is sent; a scale is no less than 2 ** -126
    scale = max(value, 2.0**-126) * (1 + 2**-6) / precision.largest
    bound = value if precision.rounding == "nearest" else scale * (2 if precision.bits == 1 else 1)
    assert (np.abs(out.astype(np.float64) - values) <= max(bound, 2.0**-126)).all()
    assert (
        (out.view(np.uint32) & 0x7F800000)[out != 0] > 0
    ).all()  # no subnormal arrives, as some processors take these for zero


@pytest.mark.parametrize("bits", [2, 4])
def test_an_outlier_arrives_and_values_without_one_have_the_scale_of_one_start(bits):
    values = normal(4096, 3)
    precision = Uniform(bits=bits)
    groups = list(groups_of(np.array([4096], np.intp)))
    top = np.abs(values).max(keepdims=True) / np.float32(precision.largest)
    power = np.square(values, dtype=np.float64).mean()
    start = np.float32([{2: 1.22, 4: 0.35}[bits] * np.sqrt(power)])
    alone, _ = _refined(np.abs(values), groups[0], start, precision.largest)
    assert least_squares(np.abs(values), groups, top, precision.largest) == np.minimum(alone, top)
    values[100] = 1000.0
    arrived = sent(values, precision)
    assert arrived[100] == pytest.approx(1000.0, rel=0.01)
    blocks = sent(values, Uniform(bits=bits, block=64))
    assert blocks[100] == pytest.approx(1000.0, rel=0.01)
    calm = np.r_[0:64, 128:4096]  # the other blocks are as without it
    values[100] = 1.0
    assert np.array_equal(blocks[calm], sent(values, Uniform(bits=bits, block=64))[calm])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", [1, 200, 9000, 20_000])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "ties", "outlier", "zeros", "tiny", "of every size"])
def test_a_lone_block_has_the_scale_of_sums_in_order(kind, size, bits):
    rng = np.random.default_rng(size)
    values = {
        "normal": rng.standard_normal(size),
        "heavy tails": rng.standard_t(2, size),
        "ties": np.rint(rng.standard_normal(size) * 3) / 4,
        "outlier": np.where(np.arange(size) == size // 2, 40, rng.standard_normal(size)),
        "zeros": rng.standard_normal(size) * (rng.random(size) < 0.05),
        "tiny": rng.standard_normal(size) * 1e-40,
        "of every size": rng.standard_normal(size) * 10.0 ** rng.integers(-30, 30, size),
    }[kind]
    magnitude, largest = np.abs(values).astype(np.float32), Uniform(bits=bits).largest
    (group,) = groups_of(np.array([size], np.intp))
    top = magnitude.max(keepdims=True) / np.float32(largest)
    in_order = _scales(magnitude, group, top, largest)
    assert least_squares(magnitude, [group], top, largest).tobytes() == in_order.tobytes()
    quick = _LoneBlock(size, largest).scale(magnitude, float(top[0]))
    if kind in ("normal", "outlier") and size > 1:
        assert quick == in_order[0]
    if kind == "tiny":
        assert quick is None  # it leaves scales next to zero to others


@pytest.mark.parametrize("scale", ["807f", "c07f", "80ff", "ffff", "0080", "80bf"])
def test_forged_scales_are_refused(scale):
    like = one([0.0] * 3)
    for content in ("04 08 00 01 {} 00 010203", "04 01 00 01 {} 01 00 03 00 00", "04 04 06 01 {} 00 1101"):
        with pytest.raises(WireError, match="NaN, infinite or negative"):
            unpack(seal(bytes.fromhex(content.format(scale)), like), like)


def test_forged_symbols_are_refused():
    like = one([0.0] * 3)
    cases = {
        "04 02 00 01 803f 00 02": "a symbol beyond the largest",  # two bits say -2
        "04 04 00 01 803f 00 0810": "after the last",
        "04 01 00 01 803f 01 01 01 00 00": "another number of symbols",
        "04 01 00 01 803f 01 00 03 03 010203040506070809101112 00": "more words than symbols",
        "04 01 00 01 803f 01 00 03 00 08": "after the last",
        "04 01 00 01 803f 02 04 00 00 00": "at most 3 is possible",
    }
    for content, message in cases.items():
        with pytest.raises(WireError, match=message):
            unpack(seal(bytes.fromhex(content), like), like)

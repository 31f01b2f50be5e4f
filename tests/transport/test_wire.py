"""Bytes: round trips, exact sizes, the entropy bound, and refusal of everything else."""

from __future__ import annotations

import math
import struct

import constriction
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlora.errors import WireError
from fedlora.transport import PRECISIONS, BFloat16, Float32, pack, unpack

SHAPES = st.lists(
    st.one_of(st.just(()), st.tuples(st.integers(0, 40)), st.tuples(st.integers(0, 6), st.integers(0, 9))), max_size=4
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def trees(draw):
    """Dense, sparse and empty tensors side by side."""
    tree = {}
    for i, shape in enumerate(draw(SHAPES)):
        elements = draw(st.sampled_from([FINITE, st.just(0.0), st.sampled_from([0.0, 0.0, 0.0, 0.0, 1.5, -0.0])]))
        tree[f"t{i}"] = torch.tensor(draw(hnp.arrays(np.float32, shape, elements=elements)))
    return tree


def one(values):
    return {"p": {"x": torch.tensor(values, dtype=torch.float32)}}


def like_zeros(parts):
    return {part: {name: torch.full(v.shape, 9.0) for name, v in tree.items()} for part, tree in parts.items()}


def packed(parts, precision=None):
    return pack(parts, dict.fromkeys(parts, precision or Float32()))


def bits(tensor):
    return tensor.numpy().view(np.int32).tolist()


def seal(body, like):
    """An envelope with a right checksum around any body, written from the description of the format."""
    text = repr([(part, [(n, tuple(v.shape)) for n, v in tree.items()]) for part, tree in like.items()])
    template = xxhash.xxh3_64_intdigest(text.encode()) % 2**32
    return b"FLW\x01" + struct.pack("<IQ", template, xxhash.xxh3_64_intdigest(body, seed=template)) + body


def random_mask_tree(size, density, num_tensors=48, seed=0):
    """Exactly int(size * density) normal values at random places."""
    rng = np.random.default_rng(seed)
    values = np.zeros(size, np.float32)
    kept = rng.permutation(size)[: int(size * density)]
    values[kept] = rng.standard_normal(len(kept)) + 10
    return {f"t{i}": torch.tensor(part) for i, part in enumerate(np.array_split(values, num_tensors))}


# the format, by hand


def test_dense_bytes_by_hand():
    raw = packed(one([1.0, -2.5])).raw
    assert raw == seal(bytes.fromhex("01 01  0000803f 000020c0"), one([0, 0]))
    assert raw[:4] == b"FLW\x01"
    assert len(raw) == 16 + 2 + 8


def test_bfloat16_bytes_by_hand():
    raw = packed(one([1.0, -2.5]), BFloat16()).raw
    assert raw == seal(bytes.fromhex("02 01  803f 20c0"), one([0, 0]))


def test_zeros_cost_two_bytes_a_part():
    parts = {"a": {"x": torch.zeros(1000)}, "b": {}, "c": {"y": torch.zeros(0, 4)}}
    packet = packed(parts)
    assert packet.raw == seal(bytes.fromhex("0100 0100 0100"), parts)
    assert packet.sizes == {"envelope": 16, "a": 2, "b": 2, "c": 2}


def test_sparse_bytes_are_count_words_positions_values():
    values = torch.zeros(100)
    values[[3, 70]] = torch.tensor([1.0, -2.5])
    body = packed({"p": {"x": values}}).raw[16:]
    assert body[:4] == bytes([1, 2, 2, 1])  # float32, one probability, two values, one word of positions
    assert body[8:] == bytes.fromhex("0000803f 000020c0")
    assert slow_positions(body[4:8], [(100, 2)]) == [i in (3, 70) for i in range(100)]


def test_dense_tensors_pay_no_positions_beside_sparse_ones():
    sparse = random_mask_tree(4096, 1 / 16, 1)["t0"]
    alone = len(packed({"p": {"a": sparse}}).raw)
    both = len(packed({"p": {"a": sparse, "head": torch.ones(5000)}}).raw)
    assert both == alone + 5000 * 4 + 2  # the head's count
    with_empty = len(packed({"p": {"a": sparse, "head": torch.zeros(500_000)}}).raw)
    assert with_empty == alone + 1


def slow_positions(raw, segments):
    """A range decoder of 64-bit state, 32-bit words and 24-bit probabilities, one position at a time."""
    words = iter(struct.unpack(f"<{len(raw) // 4}I", raw))
    lower, span = 0, 2**64 - 1
    point = next(words, 0) << 32 | next(words, 0)
    out = []
    for size, kept in segments:
        zero = 1 + int((1 - kept / size) * (2**24 - 2))
        for _ in range(size):
            if kept in (0, size):
                out.append(kept > 0)
                continue
            step = span >> 24
            bit = (point - lower) % 2**64 // step >= zero
            lower = (lower + step * zero * bit) % 2**64
            span = step * (2**24 - zero if bit else zero)
            if span < 2**32:
                lower, span = (lower << 32) % 2**64, span << 32
                point = (point << 32 | next(words, 0)) % 2**64
            out.append(bool(bit))
    return out


@given(st.lists(st.tuples(st.integers(1, 80), st.integers(0, 80)), min_size=1, max_size=3), st.integers(0, 2**32))
def test_positions_equal_a_slow_decoder(pieces, seed):
    rng = np.random.default_rng(seed)
    tree = {}
    for i, (size, kept) in enumerate(pieces):
        tree[f"t{i}"] = torch.zeros(size)
        tree[f"t{i}"][torch.tensor(rng.permutation(size)[:kept].tolist(), dtype=torch.long)] = 1.0
    flat = torch.cat(list(tree.values()))
    body = packed({"p": tree}).raw[16:]
    if body[1] < 2:  # no positions
        return
    if body[1] == 2:
        segments = [(len(flat), int(flat.sum()))]
    else:
        segments = [(len(each), int(each.sum())) for each in tree.values()]
    at = 2 + sum(1 + (kept > 127) for _, kept in segments)
    num_words = body[at]
    assert slow_positions(body[at + 1 : at + 1 + 4 * num_words], segments) == (flat != 0).tolist()
    assert len(body) == at + 1 + 4 * num_words + 4 * int(flat.sum())


# round trips and sizes


@given(
    st.dictionaries(st.sampled_from(["adapter", "head", "report", "ä\ud800"]), trees()),
    st.sampled_from(["float32", "bfloat16"]),
)
@example({"p": {"x": torch.tensor([-0.0, 1e-45, -3.4e38])}}, "float32")
@example({"p": {"x": torch.tensor([-1e-45, 1e-40])}}, "bfloat16")
def test_round_trip_is_exact_and_sizes_add_up(parts, kind):
    precision = PRECISIONS[kind]()
    if not all(torch.isfinite(value).all() for tree in parts.values() for value in precision.round(tree).values()):
        with pytest.raises(WireError, match="NaN, or infinite"):
            packed(parts, precision)
        return
    packet = packed(parts, precision)
    out = unpack(packet.raw, like_zeros(parts))
    assert list(out) == list(parts)
    for part, tree in parts.items():
        assert list(out[part]) == list(tree)
        for name, value in precision.round(tree).items():
            assert out[part][name].dtype == torch.float32
            assert out[part][name].shape == value.shape
            assert bits(out[part][name]) == bits(value + 0.0)  # a negative zero arrives as a positive one
    assert sum(packet.sizes.values()) == len(packet.raw)
    assert list(packet.sizes) == ["envelope", *parts]
    for part, tree in parts.items():
        total = sum(value.numel() for value in tree.values())
        assert packet.sizes[part] <= 2 + precision.num_bytes(total)
    # what was decoded is sent in the same bytes
    assert packed(out, precision).raw == packet.raw


@pytest.mark.parametrize("density", [1 / 4, 1 / 16, 1 / 64])
def test_positions_are_within_one_percent_of_the_entropy(density):
    size = 300_000
    tree = random_mask_tree(size, density)
    packet = packed({"p": tree})
    kept = int(size * density)
    entropy_bytes = size / 8 * -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert packet.sizes["p"] - 4 * kept <= 1.01 * entropy_bytes
    out = unpack(packet.raw, {"p": tree})["p"]
    assert all(torch.equal(out[name], tree[name]) for name in tree)


def test_unequal_tensors_get_probabilities_of_their_own():
    tree = {"a": random_mask_tree(50_000, 1 / 2, 1)["t0"], "b": random_mask_tree(50_000, 1 / 500, 1)["t0"]}
    alone = sum(packed({"p": {name: value}}).sizes["p"] for name, value in tree.items())
    packet = packed({"p": tree})
    assert packet.raw[17] == 3
    assert packet.sizes["p"] <= alone


def test_one_zero_among_many_values_is_sent_as_a_value():
    values = torch.ones(100_000)
    values[500] = 0
    assert packed({"p": {"x": values}}).sizes["p"] == 2 + 400_000


def test_precision_is_chosen_by_part():
    parts = {"a": {"x": torch.ones(10)}, "b": {"x": torch.ones(10)}}
    assert pack(parts, {"a": BFloat16(), "b": Float32()}).sizes == {"envelope": 16, "a": 22, "b": 42}


def test_packing_leaves_its_input_alone_and_decoding_shares_no_memory():
    parts = one([-0.0, 1.0])
    raw = packed(parts).raw
    assert torch.signbit(parts["p"]["x"][0])
    first, second = unpack(raw, parts), unpack(raw, parts)
    first["p"]["x"] += 5
    assert second["p"]["x"].tolist() == [0.0, 1.0]
    assert unpack(raw, parts)["p"]["x"].tolist() == [0.0, 1.0]


def test_gradients_and_strides_do_not_matter():
    weight = torch.arange(6.0).view(2, 3).t().requires_grad_()
    out = unpack(packed({"p": {"x": weight}}).raw, {"p": {"x": weight}})["p"]["x"]
    assert out.tolist() == weight.tolist()
    assert not out.requires_grad


def test_bfloat16_rounds_to_the_nearest_even():
    tree = one([1.00390625, 1.01171875, 1.0040, -1.00390625, 3.0])["p"]
    assert BFloat16().round(tree)["x"].tolist() == [1.0, 1.015625, 1.0078125, -1.0, 3.0]
    assert Float32().round(tree)["x"] is tree["x"]


@given(hnp.arrays(np.float32, st.integers(0, 20), elements=FINITE), st.sampled_from(list(PRECISIONS)))
def test_precisions_invert_and_count(values, kind):
    precision, vector = PRECISIONS[kind](), torch.tensor(values)
    raw = bytes(precision.to_bytes(vector))
    assert len(raw) == precision.num_bytes(len(vector))
    assert bits(precision.from_bytes(raw, len(vector))) == bits(precision.round_values(vector))


def test_codes_are_unique():
    assert len({cls.code for cls in PRECISIONS.values()}) == len(PRECISIONS)


# refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rest", [[0.0] * 50, [1.0] * 50])
def test_garbage_is_not_sent(bad, rest):
    with pytest.raises(WireError, match=r"Tensor 'x' of part 'p'.*NaN"):
        packed(one([*rest, bad]))


def test_values_that_overflow_once_rounded_are_not_sent():
    with pytest.raises(WireError, match="infinite at this precision"):
        packed(one([3.4e38]), BFloat16())


def test_other_dtypes_and_names_are_not_sent():
    with pytest.raises(WireError, match="convert it to float32"):
        packed({"p": {"x": torch.ones(3, dtype=torch.float64)}})
    with pytest.raises(WireError, match="envelope"):
        packed({"envelope": {}})
    with pytest.raises(KeyError):
        pack(one([1.0]), {})


SMALL = {
    "p": {"x": torch.tensor([0.0] * 40 + [1.5]), "y": torch.tensor([[2.0, -1.0]])},
    "report": {"loss": torch.tensor(0.5)},
}


def test_every_flipped_bit_is_noticed():
    raw = packed(SMALL).raw
    for i in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(WireError):
            unpack(bytes(flipped), SMALL)


def test_every_truncation_and_extension_is_noticed():
    raw = packed(SMALL).raw
    body = raw[16:]
    for end in range(len(raw)):
        with pytest.raises(WireError):
            unpack(raw[:end], SMALL)
    for end in range(len(body)):  # with a right checksum
        with pytest.raises(WireError):
            unpack(seal(body[:end], SMALL), SMALL)
    for extra in (b"\0", b"\xff" * 9, raw):
        with pytest.raises(WireError):
            unpack(raw + extra, SMALL)
        with pytest.raises(WireError, match="after its last part"):
            unpack(seal(body + extra, SMALL), SMALL)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(raw):
    with pytest.raises(WireError):
        unpack(raw, SMALL)


@settings(max_examples=400)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.tuples(st.sampled_from([1, 2]), st.sampled_from([2, 3]), st.binary(max_size=60)).map(
            lambda t: bytes(t[:2]) + t[2]
        ),
        st.tuples(st.integers(0, 27), st.integers(0, 255)).map(
            lambda t: (lambda b: b[: t[0]] + bytes([t[1]]) + b[t[0] + 1 :])(packed(SMALL).raw[16:])
        ),
    )
)
def test_forged_messages_are_decoded_in_the_template_or_refused(body):
    try:
        out = unpack(seal(body, SMALL), SMALL)
    except WireError:
        return
    for part, tree in SMALL.items():
        for name, value in tree.items():
            assert out[part][name].shape == value.shape
            assert torch.isfinite(out[part][name]).all()


def words(nonzero, p):
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(np.array(nonzero, np.int32), constriction.stream.model.Bernoulli(p, perfect=False))
    return encoder.get_compressed().astype("<u4").tobytes()


def test_wrong_contents_are_named():
    like, ones = one([0.0] * 100), struct.pack("<2f", 1, 1)
    nonzero = [i in (3, 70) for i in range(100)]
    good = words(nonzero, 0.02)
    assert unpack(seal(b"\1\2\2\1" + good + ones, like), like)["p"]["x"].tolist() == [float(i) for i in nonzero]
    cases = {
        "unknown precision": b"\x09\x01" + bytes(400),
        "unknown layout": b"\x01\x04" + bytes(400),
        "ends early": b"\1\2\2\1" + good + ones[:-1],
        "another number of positions": b"\1\2\2\1" + words([i < 3 for i in range(100)], 0.02) + ones,
        "more position bytes": b"\1\2\2\4" + good + bytes(12) + ones,
        "lists a zero": b"\1\2\2\1" + good + struct.pack("<2f", 0, 1),
        "NaN or infinite": b"\1\2\2\1" + good + struct.pack("<2f", math.nan, 1),
        "at most 100 is possible": b"\1\2\x65\1" + good + ones,
        "a count of": b"\1\2" + b"\x80" * 30,
        "where at most": b"\1\2\2\xff\x7f" + good + ones,
    }
    for message, body in cases.items():
        with pytest.raises(WireError, match=message):
            unpack(seal(body, like), like)
    with pytest.raises(WireError, match="NaN or infinite"):
        unpack(seal(b"\x02\x01" + b"\x80\x7f" * 100, like), like)


def test_envelope_errors_say_what_is_wrong():
    raw = packed(SMALL).raw
    with pytest.raises(WireError, match="fewer than its envelope"):
        unpack(raw[:10], SMALL)
    with pytest.raises(WireError, match="begins with"):
        unpack(b"PK\3" + raw[3:], SMALL)
    with pytest.raises(WireError, match="format version 2"):
        unpack(b"FLW\x02" + raw[4:], SMALL)
    with pytest.raises(WireError, match="damaged"):
        unpack(raw[:-1] + b"\0", SMALL)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"p": SMALL["p"]},
        {"report": SMALL["report"], "p": SMALL["p"]},
        {"p": {"y": SMALL["p"]["y"], "x": SMALL["p"]["x"]}, "report": SMALL["report"]},
        {"p": SMALL["p"] | {"x": torch.zeros(42)}, "report": SMALL["report"]},
        {"p": SMALL["p"] | {"y": torch.zeros(2, 1)}, "report": SMALL["report"]},
        {"p": SMALL["p"], "report": {"accuracy": torch.tensor(0.0)}},
    ],
)
def test_another_template_is_refused(other):
    with pytest.raises(WireError, match="other parts, names or shapes"):
        unpack(packed(SMALL).raw, other)

"""The envelope, bytes by hand, and refusal of everything that is not this format."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from pathlib import Path

import constriction
import numpy as np
import pytest
import torch
import xxhash
from fuzz.wire_harness import ENVELOPE, seal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from messages import bits, body, one, packed, same
from slow_reader import gap_weights, slow_unpack

from fedlora.core.errors import WireError
from fedlora.transport import PRECISIONS, BFloat16, Float16, Float32, Form, Uniform, pack, unpack
from fedlora.transport.coder import splitmix
from fedlora.transport.deflate import deflate
from fedlora.transport.framing import varint
from fedlora.transport.wire import REFERENCES, reference_of

SHAPES = st.lists(
    st.one_of(st.just(()), st.tuples(st.integers(0, 40)), st.tuples(st.integers(0, 6), st.integers(0, 9))), max_size=4
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = {
    "p": {"x": torch.tensor([0.0] * 40 + [1.5]), "y": torch.tensor([[2.0, -1.0]])},
    "report": {"loss": torch.tensor(0.5)},
}
FORMATS = [Float32(), BFloat16(), Float16(), Uniform(), Uniform(bits=4, block=64), Uniform(bits=2), Uniform(bits=1)]


@st.composite
def trees(draw):
    """Dense, sparse and empty tensors side by side."""
    tree = {}
    for i, shape in enumerate(draw(SHAPES)):
        elements = draw(st.sampled_from([FINITE, st.just(0.0), st.sampled_from([0.0, 0.0, 0.0, 0.0, 1.5, -0.0])]))
        tree[f"t{i}"] = torch.tensor(draw(hnp.arrays(np.float32, shape, elements=elements)))
    return tree


def like_nines(parts):
    return {part: {name: torch.full(v.shape, 9.0) for name, v in tree.items()} for part, tree in parts.items()}


# the format, by hand


@pytest.mark.parametrize("reference", REFERENCES)
def test_envelope_by_hand(reference):
    parts = {"ä": {"x": torch.zeros(2, 3), "y": torch.zeros(())}, "q": {}}
    raw = pack(parts, {}, reference).raw
    names = r'[["\u00e4",[["x",[2,3]],["y",[]]]],["q",[]]]'
    assert json.loads(names) == [["ä", [["x", [2, 3]], ["y", []]]], ["q", []]]
    template = xxhash.xxh3_64_intdigest(names.encode("ascii")) & 0xFFFFFFFF
    code = REFERENCES.index(reference)
    checksum = xxhash.xxh3_64_intdigest(raw[17:], seed=template | code << 32)
    assert raw[:17] == b"FLW\x03" + bytes([code]) + struct.pack("<IQ", template, checksum)
    assert reference_of(raw) == reference
    assert raw == seal(raw[17:], parts, code)


@pytest.mark.parametrize(
    ("precision", "values", "expected"),
    [
        (Float32(), [1.0, -2.5], "01 01  0000803f 000020c0"),
        (BFloat16(), [1.0, -2.5], "02 01  803f 20c0"),
        (Float16(), [1.0, -2.5], "03 01  003c 00c1"),
        (Uniform(bits=8), [127.0, -64.0, 1.0], "04 08 00 01  803f  00 7fc001"),
        (Uniform(bits=4), [7.0, -3.0, 1.0, 2.0], "04 04 00 01  803f  00 d721"),
        (Uniform(bits=2), [2.0, -2.0, 0.5, 2.0], "04 02 00 01  0040  00 4d"),
        (Uniform(bits=1), [1.0, -3.0, 2.0, -2.0], "04 01 00 01  0040  05 0a"),
        (Uniform(bits=8, block=128), [127.0, -64.0, 1.0], "04 08 07 01  803f  00 7fc001"),
    ],
)
def test_dense_bytes_by_hand(precision, values, expected):
    assert packed(one(values), precision).raw == seal(bytes.fromhex(expected), one(values))


def test_zeros_cost_two_bytes_a_part():
    parts = {"a": {"x": torch.zeros(1000)}, "b": {}, "c": {"y": torch.zeros(0, 4)}}
    packet = packed(parts)
    assert packet.raw == seal(bytes.fromhex("0100 0100 0101"), parts)
    assert packet.sizes == {"envelope": 17, "a": 2, "b": 2, "c": 2}
    assert packet.kept == {"a": 0, "b": 0, "c": 0}


# round trips


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["adapter", "head", "report", "ä\ud800"]), trees()),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
@example({"p": {"x": torch.tensor([-0.0, 1e-45, -3.4e38])}}, "float32")
@example({"p": {"x": torch.tensor([-1e-45, 1e-40])}}, "bfloat16")
@example({"p": {"x": torch.tensor([-1e-9, 6e-8])}}, "float16")
def test_round_trip_is_exact_and_sizes_add_up(parts, kind):
    precision = PRECISIONS[kind]()
    rounded = {
        part: {n: torch.from_numpy(precision.nonzero(v.reshape(-1).numpy())).view(v.shape) for n, v in tree.items()}
        for part, tree in parts.items()
    }
    if not all(torch.isfinite(value).all() for tree in rounded.values() for value in tree.values()):
        with pytest.raises(WireError, match="NaN, or infinite"):
            packed(parts, precision)
        return
    packet = packed(parts, precision)
    out = unpack(packet.raw, like_nines(parts))
    assert same(out, packet.trees)
    for part, tree in rounded.items():
        for name, value in tree.items():
            assert out[part][name].dtype == torch.float32
            assert bits(out[part][name]) == bits(value + 0.0)  # a negative zero arrives as a positive one
        assert packet.kept[part] == sum(int(torch.count_nonzero(value)) for value in tree.values())
        total = sum(value.numel() for value in tree.values())
        assert packet.sizes[part] <= 2 + total * precision.value_bits // 8
    assert sum(packet.sizes.values()) == len(packet.raw)
    assert list(packet.sizes) == ["envelope", *parts]
    # what was decoded is sent in the same bytes
    assert packed(out, precision).raw == packet.raw


def test_precision_is_chosen_by_part():
    parts = {"a": {"x": torch.ones(10)}, "b": {"x": torch.ones(10)}, "c": {"x": torch.ones(10)}}
    forms = {"a": Form(BFloat16()), "b": Form(Uniform(bits=4))}
    assert pack(parts, forms).sizes == {"envelope": 17, "a": 22, "b": 4 + 2 + 1 + 5, "c": 42}


def test_packing_leaves_its_input_alone_and_decoding_shares_no_memory():
    parts = one([-0.0, 1.0])
    packet = packed(parts)
    raw = packet.raw
    assert torch.signbit(parts["p"]["x"][0])
    packet.trees["p"]["x"] += 1
    assert parts["p"]["x"].tolist() == [0.0, 1.0]
    first, second = unpack(raw, parts), unpack(raw, parts)
    first["p"]["x"] += 5
    assert second["p"]["x"].tolist() == [0.0, 1.0]
    assert unpack(raw, parts)["p"]["x"].tolist() == [0.0, 1.0]


def test_gradients_and_strides_do_not_matter():
    weight = torch.arange(6.0).view(2, 3).t().requires_grad_()
    out = unpack(packed({"p": {"x": weight}}).raw, {"p": {"x": weight}})["p"]["x"]
    assert out.tolist() == weight.tolist()
    assert not out.requires_grad


def test_floats_round_to_the_nearest_even():
    values = np.array([1.00390625, 1.01171875, 1.0040, -1.00390625, 3.0], np.float32)
    assert BFloat16().nonzero(values).tolist() == [1.0, 1.015625, 1.0078125, -1.0, 3.0]
    assert Float16().nonzero(np.array([1.00048828125, 1.00146484375], np.float32)).tolist() == [1.0, 1.001953125]
    assert Float32().nonzero(values) is values


def test_codes_are_unique():
    assert len({cls.code for cls in PRECISIONS.values()}) == len(PRECISIONS)
    assert {kind: cls.code for kind, cls in PRECISIONS.items()} == {
        "float32": 1,
        "bfloat16": 2,
        "float16": 3,
        "uniform": 4,
    }


# refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rest", [[0.0] * 50, [1.0] * 50])
@pytest.mark.parametrize("precision", FORMATS)
def test_garbage_is_not_sent(bad, rest, precision):
    with pytest.raises(WireError, match=r"Tensor 'x' of part 'p'.*NaN"):
        packed(one([*rest, bad]), precision)


def test_signalling_nans_are_not_sent_either():
    bad = torch.from_numpy(np.array([0x7F800001, 0], np.uint32).view(np.float32))
    for precision in FORMATS:
        with pytest.raises(WireError, match=r"Tensor 'x' of part 'p'.*NaN"):
            packed({"p": {"x": bad}}, precision)


def test_the_tensor_with_garbage_is_named():
    tree = {"a": torch.ones(3), "b": torch.tensor([[1.0, math.nan]])}
    with pytest.raises(WireError, match="Tensor 'b' of part 'p'"):
        packed({"p": tree})


@pytest.mark.parametrize(("precision", "value"), [(BFloat16(), 3.4e38), (Float16(), 65520.0), (Uniform(), 3.4028e38)])
def test_values_that_overflow_once_rounded_are_not_sent(precision, value):
    with pytest.raises(WireError, match="infinite at this precision"):
        packed(one([value]), precision)


def test_other_dtypes_and_names_are_not_sent():
    with pytest.raises(WireError, match="convert it to float32"):
        packed({"p": {"x": torch.ones(3, dtype=torch.float64)}})
    with pytest.raises(WireError, match="envelope"):
        packed({"envelope": {}})


@pytest.mark.parametrize("precision", FORMATS)
def test_every_flipped_bit_is_noticed(precision):
    raw = packed(SMALL, precision).raw
    for i in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(WireError):
            unpack(bytes(flipped), SMALL)


@pytest.mark.parametrize("precision", FORMATS)
def test_every_truncation_and_extension_is_noticed(precision):
    raw = packed(SMALL, precision).raw
    content = raw[ENVELOPE:]
    for end in range(len(raw)):
        with pytest.raises(WireError):
            unpack(raw[:end], SMALL)
    for end in range(len(content)):  # with a right checksum
        with pytest.raises(WireError):
            unpack(seal(content[:end], SMALL), SMALL)
    for extra in (b"\0", b"\xff" * 9, raw):
        with pytest.raises(WireError, match="damaged"):
            unpack(raw + extra, SMALL)
        with pytest.raises(WireError, match="after its last part"):
            unpack(seal(content + extra, SMALL), SMALL)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(raw):
    with pytest.raises(WireError):
        unpack(raw, SMALL)


def positions(*high):
    """The words of these high parts of gaps, for two positions among a hundred."""
    model = constriction.stream.model.Categorical(np.array(gap_weights(100, 2)), perfect=False, lazy=False)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(np.array(high, np.int32), model)
    return encoder.get_compressed().astype("<u4").tobytes()


def test_wrong_contents_are_named():
    like, ones = one([0.0] * 100), struct.pack("<2f", 1, 1)
    nonzero = [i in (3, 70) for i in range(100)]
    good = positions(0, 16) + bytes([0b1011])  # gaps 3 and 66
    coded = b"\1\3\2\1"  # float32, coded positions, two of them, one word
    assert unpack(seal(coded + good + ones, like), like)["p"]["x"].tolist() == [float(i) for i in nonzero]
    cases = {
        "unknown number format 9": b"\x09\x01" + bytes(400),
        "unknown number format 0": b"\x00\x01" + bytes(400),
        "number format of 3 bits": b"\x04\x03\x00\x01" + bytes(400),
        "blocks of 2 .. 5": b"\x04\x08\x05\x01" + bytes(400),
        "unknown layout": b"\x01\x07" + bytes(400),
        "ends early": coded + good + ones[:-1],
        "a position behind the last entry": coded + positions(0, 24) + bytes([0b1011]) + ones,
        "position behind the last": coded + positions(128, 0, 0) + bytes([0b1011]) + ones,
        "bits after the last that": coded + positions(0, 16) + bytes([0b11011]) + ones,
        "more words than symbols need": b"\1\3\2\4" + positions(0, 16) + bytes(12) + bytes([0b1011]) + ones,
        "more words than symbols": b"\1\3\2\2" + positions(0, 16) + bytes(4) + bytes([0b1011]) + ones,
        "words than symbols need": b"\x04\1\0\1\x80\x3f\1\0\x64\1" + b"\7\0\0\0" + bytes(13),
        "NaN or infinite": coded + good + struct.pack("<2f", math.nan, 1),
        "at most 100 is possible": b"\1\3\x65\1" + good + ones,
        "a count of": b"\1\3" + b"\x80" * 30,
        "more digits than needed": b"\1\3\x82\0\1" + good + ones,
        "where at most": b"\1\3\2\xff\x7f" + good + ones,
        "bits after the last": b"\1\2" + b"\xff" * 13 + struct.pack("<100f", *[1] * 100),
        "at most 1 is possible": b"\1\6\2\2" + ones,  # columns of a vector
        "an unknown layout; expected": b"\1\xff\x11" + bytes(400),
        "an unknown layout": b"\1\xff\x07" + bytes(400),
        "unknown coding 6": b"\x04\x08\0\1\x80\x3f\6" + bytes(100),
        "unknown coding 0": b"\x04\x01\0\1\x80\x3f\0" + bytes(100),
        "a symbol beyond the largest": b"\x04\x08\0\1\x80\x3f\0" + b"\x80" * 100,
        "another number of symbols": b"\x04\x01\0\1\x80\x3f\1\1\1\0\0",
        "a value that is infinite": b"\x04\x08\0\1\x7f\x7f\0" + b"\x7f" * 100,
    }
    for message, content in cases.items():
        with pytest.raises(WireError, match=message):
            unpack(seal(content, like), like)


def deflated(raw, *more, strategy=zlib.Z_HUFFMAN_ONLY):
    """A stream with its length, and bytes behind it that are counted too."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    stream = coder.compress(raw) + coder.flush() + b"".join(more)
    return varint(len(stream)) + stream


def test_streams_are_the_same_in_every_version():
    draws = splitmix(3, 250_000) >> np.uint64(32)
    streams = {
        "short": np.zeros(3, np.uint8),
        "of gaps": np.minimum(np.uint64(1 << 32) // (draws + np.uint64(1 << 24)), 255).astype(np.uint8),
        "random": draws.astype(np.uint8),
        "bits": np.packbits(draws < np.uint64(1 << 30)),
    }
    digests = {name: xxhash.xxh3_64_hexdigest(deflate(raw)) for name, raw in streams.items()}
    assert digests == {
        "short": "bd59e10a128d66c5",
        "of gaps": "1704226a0b173bc3",
        "random": "d92598feaa010846",
        "bits": "5ee1a859f901f631",
    }


def test_wrong_streams_are_named():
    like, ones = one([0.0] * 100), struct.pack("<2f", 1, 1)
    nonzero = [float(i in (3, 70)) for i in range(100)]
    bitmap = np.packbits(np.array(nonzero) != 0, bitorder="little").tobytes()
    pooled = b"\1\4\2"  # float32, pooled positions, two of them
    low = bytes([0b1011])  # gaps 3 and 66 are 0 and 16, and two bits each
    assert unpack(seal(pooled + b"\1" + deflated(bitmap) + ones, like), like)["p"]["x"].tolist() == nonzero
    assert unpack(seal(pooled + b"\2" + deflated(b"\0\x10") + low + ones, like), like)["p"]["x"].tolist() == nonzero
    bomb = deflated(bytes(60_000), strategy=zlib.Z_DEFAULT_STRATEGY)
    assert len(bomb) < 78
    symbols = b"\4\x08\0\1\x80\x3f"
    cases = {
        "unknown coding 3 of positions": pooled + b"\3" + deflated(bitmap) + ones,
        "bitmap of other than the stated": b"\1\4\3\1" + deflated(bitmap) + ones,
        "after the last that": pooled + b"\1" + deflated(bytes(12) + b"\x82") + ones,
        "12 bytes instead of 13": pooled + b"\1" + deflated(bitmap[:-1]) + ones,
        "stream of other than 13 bytes": pooled + b"\1" + deflated(bitmap + b"\0") + ones,
        "a deflate stream of other than 13": pooled + b"\1" + bomb + ones,
        "or of other than its own length": pooled + b"\1" + deflated(bitmap, b"\0") + ones,
        "not a deflate stream": pooled + b"\1\4\xff\xff\xff\xff" + ones,
        "other than 13 bytes, or": pooled + b"\1" + varint(5) + deflated(bitmap)[1:6] + ones,
        "where at most 77 is possible": pooled + b"\1" + varint(78) + bytes(100),
        "of other than 2 bytes": pooled + b"\2" + deflated(b"\0\x10\1") + low + ones,
        "gaps than are counted": pooled + b"\2" + deflated(b"\0") + low + ones,
        "than are counted": pooled + b"\2" + deflated(b"\0\xff") + low + ones,
        "a position behind the last entry": pooled + b"\2" + deflated(b"\0\x19") + low + ones,
        "bits after the last": pooled + b"\2" + deflated(b"\0\x10") + bytes([0b11011]) + ones,
        "99 bytes instead of 100": symbols + b"\3" + deflated(bytes(99)),
        "stream of other than 100 bytes": symbols + b"\3" + deflated(bytes(101)),
        "49 bytes instead of 50": symbols + b"\4" + deflated(bytes(49)) + bytes(50),
        "a symbol beyond the largest": symbols + b"\4" + deflated(b"\x88" * 50) + bytes(50),
        "symbol beyond the largest": b"\4\1\0\1\x80\x3f\3" + deflated(b"\xaa" * 25),
        "unknown coding 5": symbols + b"\5" + bytes(13),
        "unknown coding 4": b"\4\4\0\1\x80\x3f\4" + deflated(bytes(50)) + bytes(50),
    }
    for message, content in cases.items():
        with pytest.raises(WireError, match=message):
            unpack(seal(content, like), like)


@pytest.mark.parametrize("raw", ["807f", "c07f", "80ff", "0180", "80bf"])
def test_floats_and_scales_that_are_not_finite_are_refused(raw):
    like = one([0.0] * 100)
    scale = bytes.fromhex(raw)
    with pytest.raises(WireError, match="NaN, infinite or negative"):
        unpack(seal(b"\x04\x08\0\1" + scale + b"\0" + bytes(100), like), like)
    if raw in ("807f", "c07f", "80ff"):
        with pytest.raises(WireError, match="NaN or infinite"):
            unpack(seal(b"\x02\x01" + scale * 100, like), like)


def test_envelope_errors_say_what_is_wrong():
    raw = packed(SMALL).raw
    with pytest.raises(WireError, match="fewer than its envelope"):
        unpack(raw[:16], SMALL)
    with pytest.raises(WireError, match="begins with"):
        unpack(b"PK\3" + raw[3:], SMALL)
    with pytest.raises(WireError, match="format version 2"):
        unpack(b"FLW\x02" + raw[4:], SMALL)
    with pytest.raises(WireError, match="unknown reference 3"):
        unpack(seal(raw[17:], SMALL, 3), SMALL)
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


def test_the_same_trees_give_the_same_bytes():
    assert body(SMALL) == body({part: {n: v.clone() for n, v in tree.items()} for part, tree in SMALL.items()})


def test_the_examples_of_the_documentation_are_these_bytes():
    a = torch.zeros(2, 48)
    a[0, 5], a[0, 40], a[1, 33] = 1.0, -0.5, 0.25
    adapter = {"q.lora_A": a, "q.lora_B": torch.tensor([[0.5, -0.25], [0.75, -1.0]])}
    parts = {"adapter": adapter, "report": {"loss": torch.tensor(0.5)}}
    text = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text(encoding="utf-8").split("## Examples")[1]
    # in each block of code, bytes stand before the first two blanks of a line
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    examples = [bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines())) for block in blocks]
    for precision, expected in zip((BFloat16(), Uniform(bits=4)), examples, strict=True):
        packet = pack(parts, {"adapter": Form(precision)}, "init")
        assert packet.raw.hex(" ") == expected.hex(" ")
        slow = slow_unpack(expected, {p: {n: list(v.shape) for n, v in tree.items()} for p, tree in parts.items()})
        assert slow["adapter"]["q.lora_A"] == packet.trees["adapter"]["q.lora_A"].reshape(-1).tolist()
        assert slow["report"]["loss"] == [0.5]

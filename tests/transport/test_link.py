"""One direction of the exchange: stages, number formats by group, and what the receiver will hold."""

from __future__ import annotations

import pytest
import torch
from fuzz.wire_harness import ENVELOPE
from messages import same
from pydantic import TypeAdapter, ValidationError

from fedlora.core.errors import ConfigError, WireError
from fedlora.testing import schema_of
from fedlora.transport import (
    PRECISIONS,
    AnyPrecision,
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
    Stage,
    Threshold,
    TopK,
    Uniform,
    pack,
    unpack,
)
from fedlora.transport.wire import reference_of

GROUPS = schema_of({"m.lora_A": "adapter", "head.w": "head", "m.lora_B": "adapter"})
LINKS = [
    Link(),
    Link(sparsify=TopK(density=0.25, quota=Quota(head=1)), precision=BFloat16(), reference="init"),
    Link(sparsify=RandomK(density=0.3), precision=Uniform(bits=4, rounding="stochastic")),
    Link(sparsify=RandomK(density=0.3), head_precision=Float16()),
    Link(sparsify=Threshold(value=0.5), precision=Uniform(bits=8, block=64), head_precision=Float32(), feedback=True),
    Link(sparsify=RankSlice(rank=2), precision=Uniform(bits=1)),
    Link(stages=(Stage(round=2, sparsify=TopK(density=0.5)), Stage(round=4, precision=Uniform(bits=2)))),
]


def tree_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"m.lora_A": (4, 30), "head.w": (3, 10), "m.lora_B": (20, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_link_sparsifies_and_then_rounds():
    link = Link(sparsify=TopK(density=0.5), precision=BFloat16(), reference="init")
    # 1.01171875 lies between 1.0078125 and 1.015625; the tie goes to the even significand
    prepared = link.prepare({"a": torch.tensor([1.01171875, 0.5])}, schema_of({"a": "adapter"}), round=0)
    assert prepared["a"].tolist() == [1.015625, 0.0]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("round", [0, 3, 5])
def test_prepare_is_what_is_decoded(link, round):
    tree, seed = tree_of(), 2**60 + 7
    before = {name: value.clone() for name, value in tree.items()}
    packet = link.send(tree, GROUPS, round, seed)
    like = GROUPS.split(tree)
    out = unpack(packet.raw, like)
    assert list(out) == ["adapter", "head"]
    assert same(out, packet.trees)
    prepared = link.prepare(tree, GROUPS, round, seed)
    assert list(prepared) == list(GROUPS)
    assert all(torch.equal(prepared[name], GROUPS.join(out)[name]) for name in GROUPS)
    assert all(torch.equal(before[name], tree[name]) for name in GROUPS)
    assert link.encode(link.thin(tree, GROUPS, round, seed), GROUPS, round, seed).raw == packet.raw
    assert link.lossy or all(torch.equal(prepared[name], tree[name]) for name in GROUPS)


@pytest.mark.parametrize("link", LINKS)
def test_json_gives_the_same_link(link):
    adapter = TypeAdapter(Link)
    again = adapter.validate_json(adapter.dump_json(link))
    assert again == link
    assert hash(again) == hash(link)
    assert adapter.validate_python({}) == Link()


def test_every_precision_survives_json():
    adapter = TypeAdapter(AnyPrecision)
    for kind, cls in PRECISIONS.items():
        value = adapter.validate_python({"kind": kind})
        assert type(value) is cls
        assert adapter.validate_json(adapter.dump_json(value)) == value


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 3},
        {"bits": 16},
        {"block": 32},
        {"rounding": "up"},
    ],
)
def test_wrong_settings_of_uniform_are_refused(wrong):
    with pytest.raises(ValidationError):
        Uniform(**wrong)


def test_a_stage_before_the_first_round_is_refused():
    with pytest.raises(ValidationError):
        Stage(round=-1)


# stages


def test_stages_change_density_and_bits_at_their_rounds():
    link = Link(
        sparsify=TopK(density=0.5),
        precision=Uniform(bits=8),
        stages=(
            Stage(round=2, sparsify=TopK(density=0.25)),
            Stage(round=4, precision=Uniform(bits=4)),
            Stage(round=6, sparsify=Dense(), head_precision=Float32()),
        ),
    )
    tree = {"a": torch.arange(1.0, 1001.0), "h": torch.arange(1.0, 101.0)}
    groups = schema_of({"a": "adapter", "h": "head"})
    seen = []
    for round in range(8):
        stage, packet = link.at(round), link.send(tree, groups, round, 0)
        offset = ENVELOPE + packet.sizes["adapter"]
        formats = packet.raw[ENVELOPE : ENVELOPE + 2], packet.raw[offset]
        assert stage.round == round
        assert formats == (bytes([4, stage.precision.bits]), stage.head_precision.code)
        seen.append((getattr(stage.sparsify, "density", 1), stage.precision.bits, stage.head_precision.value_bits))
        sparsified = link.thin(tree, groups, round, 0)
        assert sum(int(torch.count_nonzero(value)) for value in sparsified.values()) == int(1100 * seen[-1][0])
    assert seen == [(0.5, 8, 8)] * 2 + [(0.25, 8, 8)] * 2 + [(0.25, 4, 4)] * 2 + [(1, 4, 32)] * 2


def test_a_stage_keeps_what_it_does_not_name():
    link = Link(precision=BFloat16(), head_precision=Float16(), stages=(Stage(round=1), Stage(round=3)))
    for round in (0, 1, 5):
        assert link.at(round) == Stage(round=round, sparsify=Dense(), precision=BFloat16(), head_precision=Float16())


def test_the_head_follows_the_rest_until_it_has_a_format_of_its_own():
    link = Link(stages=(Stage(round=1, precision=Uniform(bits=2)), Stage(round=2, head_precision=BFloat16())))
    assert [link.at(round).head_precision for round in range(4)] == [
        Float32(),
        Uniform(bits=2),
        BFloat16(),
        BFloat16(),
    ]


# parts


def test_head_precision_holds_for_the_head_alone():
    tree = tree_of()
    packet = Link(precision=Uniform(bits=4), head_precision=Float32()).send(tree, GROUPS, 0, 0)
    assert packet.sizes["head"] == 2 + 4 * 30
    assert torch.equal(packet.trees["head"]["head.w"], tree["head.w"])
    assert packet.sizes["adapter"] <= 4 + 4 + 1 + 100
    assert not torch.equal(packet.trees["adapter"]["m.lora_A"], tree["m.lora_A"])


def test_groups_draw_from_seeds_of_their_own():
    tree = {"a": torch.full((400,), 0.3), "h": torch.full((400,), 0.3)}
    tree["a"][0] = tree["h"][0] = 1.0
    link = Link(precision=Uniform(bits=1, rounding="stochastic"))
    trees = link.send(tree, schema_of({"a": "adapter", "h": "head"}), 0, 5).trees
    assert not torch.equal(trees["adapter"]["a"], trees["head"]["h"])


def test_a_seed_travels_in_place_of_random_places():
    tree, link = tree_of(), Link(sparsify=RandomK(density=0.3))
    packet = link.send(tree, GROUPS, 0, 11)
    thinned = GROUPS.split(link.thin(tree, GROUPS, 0, 11))
    counts = {"m.lora_A": 36, "head.w": 9, "m.lora_B": 24}
    assert packet.raw == pack(thinned, {part: Form(draw=Draw(11, counts)) for part in thinned}).raw
    assert packet.sizes == {"envelope": 17, "adapter": 2 + 8 + 2 + 4 * 60, "head": 2 + 4 + 4 * 9}


def test_other_parts_travel_in_float32_and_the_reference_is_named():
    tree = tree_of()
    report = {"report": {"loss": torch.tensor(0.1), "count": torch.tensor(3.0)}}
    packet = Link(precision=Uniform(bits=1)).encode(tree, GROUPS, 0, 0, report, "last_round")
    assert packet.sizes["report"] == 2 + 8
    assert same({"report": packet.trees["report"]}, report)
    assert reference_of(packet.raw) == "last_round"


def test_a_group_without_names_is_no_part():
    assert list(schema_of({"a": "head"}).split({"a": torch.ones(1)})) == ["head"]
    tree = tree_of()
    assert list(GROUPS.join(GROUPS.split(tree))) == list(tree)


# what is claimed


@pytest.mark.parametrize(
    ("link", "thins", "rounds"),
    [
        (Link(), False, False),
        (Link(feedback=True, reference="init"), False, False),
        (Link(sparsify=TopK(density=1)), True, False),
        (Link(sparsify=RandomK(density=0.5)), True, False),
        (Link(precision=Float16()), False, True),
        (Link(head_precision=Uniform()), False, True),
        (Link(stages=(Stage(round=9, sparsify=RankSlice(rank=1)),)), True, False),
        (Link(stages=(Stage(round=9, precision=BFloat16()),)), False, True),
        (Link(stages=(Stage(round=9, head_precision=BFloat16()), Stage(round=10, precision=Float32()))), False, True),
        (Link(stages=(Stage(round=1),)), False, False),
        (Link(sparsify=Threshold(value=1), precision=BFloat16()), True, True),
    ],
)
def test_a_link_says_whether_it_thins_or_rounds(link, thins, rounds):
    assert (link.drops_entries, link.rounds_values, link.lossy) == (thins, rounds, thins or rounds)


@pytest.mark.parametrize("rounds", [(3, 1), (2, 2)])
def test_stages_out_of_order_are_refused(rounds):
    with pytest.raises(ConfigError, match="name them in order"):
        Link(stages=tuple(Stage(round=number) for number in rounds))


def test_a_scale_that_overflows_is_blamed_on_its_own_tensor():
    tree = {"good": torch.ones(2), "bad": torch.tensor([3.4028e38])}
    with pytest.raises(WireError, match="Tensor 'bad'"):
        Link(precision=Uniform()).prepare(tree, schema_of({"good": "adapter", "bad": "adapter"}), 0)

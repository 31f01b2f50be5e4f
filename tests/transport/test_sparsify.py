"""Which entries are kept, against hand-computed cases and slow, obvious references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError
from slow_reader import slow_places, slow_splitmix

from fedlora.core.schema import Leaf, Schema, factor_leaf
from fedlora.testing import schema_of
from fedlora.transport import SPARSIFIERS, AnySparsifier, Dense, Quota, RandomK, RankSlice, Threshold, TopK
from fedlora.transport.coder import splitmix
from fedlora.transport.positions import random_positions

GROUPS = schema_of({"a": "adapter", "b": "adapter", "head": "head"})
HEAD_WHOLE = Quota(head=1)


def tree_of(a, b, head):
    return {"a": torch.tensor(a), "b": torch.tensor(b), "head": torch.tensor(head)}


TREE = tree_of([[1.0, -8.0], [0.5, 2.0]], [-3.0, 4.0], [7.0, -6.0])


def lists(tree):
    return {name: value.tolist() for name, value in tree.items()}


def slow_top_k(values, k):
    """Indices of the k largest magnitudes; a stable sort puts the first of equals first."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    return sorted(order[:k])


def test_global_top_k_competes_across_tensors_and_head():
    # 8 entries, k = 3: -8, 7, -6
    kept = TopK(density=3 / 8)(TREE, GROUPS, round=0)
    assert lists(kept) == {"a": [[0.0, -8.0], [0.0, 0.0]], "b": [0.0, 0.0], "head": [7.0, -6.0]}


def test_a_head_with_a_quota_of_one_is_kept_whole_and_not_counted():
    # 6 entries besides the head, k = int(6 * 3/8) = 2: -8, 4
    kept = TopK(density=3 / 8, quota=HEAD_WHOLE)(TREE, GROUPS, round=0)
    assert lists(kept) == {"a": [[0.0, -8.0], [0.0, 0.0]], "b": [0.0, 4.0], "head": [7.0, -6.0]}


def test_top_k_per_tensor():
    kept = TopK(density=0.5, scope="tensor")(TREE, GROUPS, round=0)
    assert lists(kept) == {"a": [[0.0, -8.0], [0.0, 2.0]], "b": [0.0, 4.0], "head": [7.0, 0.0]}
    kept = TopK(density=0.5, scope="tensor", quota=HEAD_WHOLE)(TREE, GROUPS, round=0)
    assert lists(kept)["head"] == [7.0, -6.0]


def test_top_k_per_tensor_keeps_at_least_one_entry_of_each():
    kept = TopK(density=0.1, scope="tensor")({**TREE, "empty": torch.zeros(0)}, {**GROUPS, "empty": GROUPS["a"]}, 0)
    assert lists(kept) == {"a": [[0.0, -8.0], [0.0, 0.0]], "b": [0.0, 4.0], "head": [7.0, 0.0], "empty": []}


LORA = {
    "m.lora_A.weight": torch.tensor([[1.0, 8.0], [3.0, 4.0]]),
    "m.lora_B.weight": torch.tensor([[5.0], [-6.0]]),
    "n.lora_embedding_A": torch.tensor([[-7.0, 2.0]]),
    "n.bias": torch.tensor([0.5, -9.0]),
    "head": torch.tensor([10.0, -20.0, 30.0, 40.0]),
}
LORA_GROUPS = Schema(
    {
        name: Leaf("head") if name == "head" else factor_leaf(name.split("_")[-1][0]) if "lora" in name else Leaf()
        for name in LORA
    }
)


def test_quotas_by_hand():
    # of the six in A the int(6 * 0.5) largest: 8, -7, 4; of the two in B one: -6; of the head three
    quota = Quota(A=0.5, B=0.5, head=0.75)
    kept = TopK(density=0.5, quota=quota)(LORA, LORA_GROUPS, round=0)
    assert lists(kept) == {
        "m.lora_A.weight": [[0.0, 8.0], [0.0, 4.0]],
        "m.lora_B.weight": [[0.0], [-6.0]],
        "n.lora_embedding_A": [[-7.0, 0.0]],
        "n.bias": [0.0, -9.0],  # the rest: one of two
        "head": [0.0, -20.0, 30.0, 40.0],
    }
    # only B has a quota: the other 12 compete for int(12 * 0.25) places, the head among them
    kept = TopK(density=0.25, quota=Quota(B=1))(LORA, LORA_GROUPS, round=0)
    assert lists(kept)["m.lora_B.weight"] == [[5.0], [-6.0]]
    assert lists(kept)["head"] == [0.0, -20.0, 30.0, 40.0]
    assert not any(bool(kept[name].any()) for name in ("m.lora_A.weight", "n.lora_embedding_A", "n.bias"))


def test_a_quota_does_not_decay():
    sparsify = TopK(density=0.5, decay=0.5, quota=Quota(head=0.5))
    counts = [{name: int(mask.sum()) for name, mask in sparsify.mask(LORA, LORA_GROUPS, r).items()} for r in (0, 2)]
    assert [each["head"] for each in counts] == [2, 2]
    assert [sum(each.values()) - each["head"] for each in counts] == [5, 1]


def test_quotas_of_random_places():
    counts = RandomK(density=0.5, quota=Quota(A=0.25, head=1)).counts(LORA, LORA_GROUPS)
    # each tensor by itself, and one entry at least; what is kept whole is not listed
    assert counts == {"m.lora_A.weight": 1, "n.lora_embedding_A": 1, "m.lora_B.weight": 1, "n.bias": 1}


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([2.0, -2.0, 2.0, 1.0], 2, [1, 1, 0, 0]),
        ([1.0, 2.0, -1.0, 1.0], 2, [1, 1, 0, 0]),
        ([0.0, 0.0, 0.0, 0.0], 1, [1, 0, 0, 0]),
        ([0.0, 0.0, 0.0, 5.0], 2, [1, 0, 0, 1]),
        ([0.0, -0.0, 3.0, 5.0], 3, [1, 0, 1, 1]),
        ([1e-45, 3e-45, 0.0, 0.0], 1, [0, 1, 0, 0]),
        ([1.0, float("inf"), float("nan"), 3e38], 2, [0, 1, 1, 0]),  # so that `pack` sees and refuses them
    ],
)
def test_exactly_k_are_kept_and_the_first_of_equals_wins(values, k, expected):
    mask = TopK(density=k / 4).mask({"a": torch.tensor(values)}, {}, round=0)
    assert mask["a"].dtype == torch.bool
    assert mask["a"].int().tolist() == expected


@given(
    hnp.arrays(np.float32, st.integers(0, 60), elements=st.integers(-4, 4).map(float)),
    st.integers(0, 60),
    st.floats(0.001, 1),
)
def test_top_k_equals_a_slow_reference(values, cut, density):
    tree = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:]).view(-1, 1)}
    before = {name: value.clone() for name, value in tree.items()}
    sparsify = TopK(density=density)
    keep = slow_top_k(values, int(len(values) * density))
    expected = np.zeros_like(values)
    expected[keep] = values[keep]
    mask = torch.cat([each.reshape(-1) for each in sparsify.mask(tree, {}, 0).values()])
    kept = sparsify(tree, {}, 0)
    assert torch.nonzero(mask).reshape(-1).tolist() == keep
    assert torch.cat([each.reshape(-1) for each in kept.values()]).tolist() == expected.tolist()
    assert all(kept[name].shape == tree[name].shape and torch.equal(before[name], tree[name]) for name in tree)


def test_k_is_rounded_down_as_in_the_official_code():
    values = {"a": torch.arange(1.0, 101.0)}
    assert int(TopK(density=0.29).mask(values, {}, 0)["a"].sum()) == 28  # 100 * 0.29 is 28.999999999999996
    assert int(TopK(density=0.009).mask(values, {}, 0)["a"].sum()) == 0


def test_density_decays_in_steps():
    sparsify = TopK(density=0.5, decay=0.5, decay_every=3)
    assert [sparsify.density_at(r) for r in range(7)] == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert int(sparsify.mask({"a": torch.arange(16.0)}, {}, round=6)["a"].sum()) == 2


@pytest.mark.parametrize(
    "sparsify",
    [
        Dense(),
        TopK(density=1.0),
        TopK(density=1.0, scope="tensor", quota=HEAD_WHOLE),
        RandomK(density=1.0),
        RankSlice(rank=1),
    ],
)
def test_everything_is_kept_at_density_one(sparsify):
    kept = sparsify(TREE, GROUPS, round=0)
    assert lists(kept) == lists(TREE)
    assert kept is not TREE
    assert all(
        bool(mask.all()) and mask.shape == TREE[name].shape for name, mask in sparsify.mask(TREE, GROUPS, 0).items()
    )


@pytest.mark.parametrize(
    "sparsify",
    [
        Dense(),
        TopK(density=0.5),
        TopK(density=0.5, scope="tensor", quota=HEAD_WHOLE),
        RandomK(density=0.5),
        Threshold(value=1),
        RankSlice(rank=2),
    ],
)
def test_trees_without_entries(sparsify):
    assert sparsify({}, {}, 0) == {}
    empty = {"a": torch.zeros(0, 3), "b": torch.tensor(2.0)}
    kept = sparsify(empty, GROUPS, 0)
    assert {name: value.shape for name, value in kept.items()} == {"a": (0, 3), "b": ()}


def test_dropped_entries_are_positive_zeros():
    kept = TopK(density=0.5)({"a": torch.tensor([-1.0, -2.0])}, {}, 0)
    assert not torch.signbit(kept["a"][0])


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"density": 0.0},
        {"density": 1.5},
        {"density": 0.5, "decay": 0},
        {"density": 0.5, "decay_every": 0},
        {"density": 0.5, "scope": "row"},
        {"density": 0.5, "head": "dense"},
        {"density": 0.5, "quota": {"head": 0.0}},
        {"density": 0.5, "quota": {"C": 0.5}},
        {"density": 0.5, "keep": 1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TopK(**wrong)


EXAMPLES = {
    "dense": {},
    "top_k": {"density": 0.25, "quota": {"A": 0.5, "head": 1.0}},
    "random_k": {"density": 0.25, "rescale": False},
    "threshold": {"value": 0.5},
    "rank_slice": {"rank": 2},
}


def test_table_and_union_agree_and_settings_survive_json():
    adapter = TypeAdapter(AnySparsifier)
    assert list(SPARSIFIERS) == list(EXAMPLES)
    for kind, cls in SPARSIFIERS.items():
        value = adapter.validate_python({"kind": kind, **EXAMPLES[kind]})
        assert type(value) is cls
        assert adapter.validate_json(adapter.dump_json(value)) == value
        assert hash(value) == hash(adapter.validate_json(adapter.dump_json(value)))


@pytest.mark.parametrize(
    "wrong",
    [
        (RandomK, {"density": 0}),
        (RandomK, {"density": 0.5, "decay": 0.5}),
        (Threshold, {"value": 0}),
        (Threshold, {"value": -1.0}),
        (RankSlice, {"rank": 0}),
    ],
)
def test_wrong_settings_of_the_others_are_refused(wrong):
    with pytest.raises(ValidationError):
        wrong[0](**wrong[1])


# by threshold, by rank


def test_threshold_by_hand():
    kept = Threshold(value=2)({"a": torch.tensor([[1.0, -2.0], [1.9999999, 7.0]])}, {}, round=9, seed=9)
    assert lists(kept) == {"a": [[0.0, -2.0], [0.0, 7.0]]}
    mask = Threshold(value=1e30).mask({"a": torch.tensor([float("nan"), float("-inf"), 1.0])}, {}, 0)["a"]
    assert mask.tolist() == [True, True, False]  # so that `pack` sees and refuses them


def test_ranks_by_hand():
    kept = RankSlice(rank=1)(LORA, LORA_GROUPS, round=0)
    assert lists(kept) == lists(LORA) | {"m.lora_A.weight": [[1.0, 8.0], [0.0, 0.0]]}
    b = {"m.lora_B.default": torch.ones(2, 3), "conv.lora_A.x": torch.ones(3, 2, 1, 1), "lora_Ab": torch.ones(3, 3)}
    schema = {"m.lora_B.default": factor_leaf("B"), "conv.lora_A.x": factor_leaf("A"), "lora_Ab": Leaf()}
    kept = RankSlice(rank=2)(b, schema, round=0)
    assert kept["m.lora_B.default"].tolist() == [[1.0, 1.0, 0.0]] * 2
    assert kept["conv.lora_A.x"].reshape(3, 2).tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert torch.equal(kept["lora_Ab"], b["lora_Ab"])
    assert all(torch.equal(RankSlice(rank=3)(b, schema, 0)[name], b[name]) for name in b)
    vector = {"m.lora_A": torch.ones(3), "m.lora_B": torch.ones(())}  # these are no matrices
    factors = {"m.lora_A": factor_leaf("A"), "m.lora_B": factor_leaf("B")}
    assert lists(RankSlice(rank=1)(vector, factors, 0)) == lists(vector)


# at random


def test_numbers_are_those_of_a_slow_splitmix():
    for seed in (0, 1, 1234567, 2**64 - 1):
        assert splitmix(seed, 20).tolist() == [slow_splitmix(seed, i) for i in range(20)]
    assert splitmix(1234567, 2).tolist() == [6457827717110365317, 3203168211198807973]  # as published with it


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.text(st.characters(codec="ascii"), max_size=8), st.integers(0, 80), st.data())
def test_places_are_those_of_a_slow_reference(seed, name, size, data):
    count = data.draw(st.integers(0, size))
    assert random_positions(seed, name, size, count).tolist() == slow_places(seed, name, size, count)


@pytest.mark.parametrize(
    ("size", "density", "count"), [(100, 0.29, 28), (100, 0.009, 1), (1, 0.01, 1), (0, 0.5, 0), (7, 0.999, 6)]
)
def test_exactly_k_random_places_of_each_tensor_and_one_at_least(size, density, count):
    for seed in range(5):
        mask = RandomK(density=density).mask({"a": torch.ones(size)}, {}, 0, seed)["a"]
        assert int(mask.sum()) == count


def test_places_depend_on_the_seed_and_the_name_and_not_on_values_or_rounds():
    tree = {"a": torch.ones(1000), "b": torch.ones(1000)}
    other = {"a": torch.randn(1000), "b": torch.zeros(1000)}
    sparsify = RandomK(density=0.1)
    first = sparsify.mask(tree, {}, 0, 1)
    assert all(torch.equal(first[name], sparsify.mask(other, {}, 7, 1)[name]) for name in tree)
    for mask in (first["b"], sparsify.mask(tree, {}, 0, 2)["a"], sparsify.mask(tree, {}, 0, 2**63)["a"]):
        assert 0 < int((mask & first["a"]).sum()) < 40  # 10 are expected to agree by chance


def test_every_place_is_as_likely():
    draws, size = 4000, 40
    hits = np.zeros(size)
    for seed in range(draws):
        hits[random_positions(seed, "x", size, 10)] += 1
    assert np.abs(hits / draws - 0.25).max() < 5 * (0.25 * 0.75 / draws) ** 0.5


@pytest.mark.parametrize(
    ("sparsify", "unbiased"),
    [
        (Dense(), True),
        (RandomK(density=0.3), True),
        (RandomK(density=0.01), True),
        (RandomK(density=0.3, rescale=False), False),
        (TopK(density=0.3), False),
        (TopK(density=0.3, scope="tensor"), False),
        (Threshold(value=0.5), False),
        (RankSlice(rank=1), False),
    ],
)
def test_facts_are_true(sparsify, unbiased):
    generator = torch.Generator().manual_seed(0)
    tree = {"m.lora_A": torch.randn(4, 8, generator=generator), "m.lora_B": torch.randn(6, 4, generator=generator)}
    groups = schema_of(dict.fromkeys(tree, "adapter"))
    draws = 2000 if isinstance(sparsify, RandomK) else 2
    assert sparsify.facts.unbiased is unbiased
    sent = [sparsify(tree, groups, 0, seed) for seed in range(draws)]
    for name, value in tree.items():
        outs = torch.stack([one[name] for one in sent]).double()
        standard = outs.std(dim=0) / draws**0.5
        near = (outs.mean(dim=0) - value).abs() <= 5 * standard + 1e-6
        assert bool(near.all()) is unbiased
    negated = {name: torch.randn(value.shape, generator=generator) for name, value in tree.items()}
    left, right = (sparsify.mask(each, groups, 0, 3) for each in (tree, negated))
    alike = all(torch.equal(left[name], right[name]) for name in tree)
    assert alike is not sparsify.facts.reads_values

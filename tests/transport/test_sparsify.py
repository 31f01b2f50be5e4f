"""Which entries are kept, against hand-computed cases and a slow, obvious reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError

from fedlora.transport import SPARSIFIERS, AnySparsifier, BFloat16, Dense, Link, TopK

GROUPS = {"a": "adapter", "b": "adapter", "head": "head"}


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


def test_dense_head_is_kept_whole_and_not_counted():
    # 6 entries besides the head, k = int(6 * 3/8) = 2: -8, 4
    kept = TopK(density=3 / 8, head="dense")(TREE, GROUPS, round=0)
    assert lists(kept) == {"a": [[0.0, -8.0], [0.0, 0.0]], "b": [0.0, 4.0], "head": [7.0, -6.0]}
    assert kept["head"] is TREE["head"]


def test_top_k_per_tensor():
    kept = TopK(density=0.5, scope="tensor")(TREE, GROUPS, round=0)
    assert lists(kept) == {"a": [[0.0, -8.0], [0.0, 2.0]], "b": [0.0, 4.0], "head": [7.0, 0.0]}
    kept = TopK(density=0.5, scope="tensor", head="dense")(TREE, GROUPS, round=0)
    assert lists(kept)["head"] == [7.0, -6.0]


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


@pytest.mark.parametrize("sparsify", [Dense(), TopK(density=1.0), TopK(density=1.0, scope="tensor", head="dense")])
def test_everything_is_kept_at_density_one(sparsify):
    kept = sparsify(TREE, GROUPS, round=0)
    assert all(kept[name] is TREE[name] for name in TREE)
    assert kept is not TREE
    assert all(
        bool(mask.all()) and mask.shape == TREE[name].shape for name, mask in sparsify.mask(TREE, GROUPS, 0).items()
    )
    assert sparsify.density_at(5) == 1.0


@pytest.mark.parametrize("sparsify", [Dense(), TopK(density=0.5), TopK(density=0.5, scope="tensor", head="dense")])
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
        {"density": 0.5, "head": "none"},
        {"density": 0.5, "keep": 1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TopK(**wrong)


def test_table_and_union_agree_and_settings_survive_json():
    adapter = TypeAdapter(AnySparsifier)
    for kind, cls in SPARSIFIERS.items():
        value = cls(density=0.25) if kind == "top_k" else cls()
        assert adapter.validate_json(adapter.dump_json(value)) == value
        assert hash(value) == hash(
            adapter.validate_python({"kind": kind} | ({"density": 0.25} if kind == "top_k" else {}))
        )
    assert len(adapter.json_schema()["$defs"]) == len(SPARSIFIERS)


def test_link_sparsifies_and_then_rounds():
    link = Link(sparsify=TopK(density=0.5), precision=BFloat16(), reference="init")
    # 1.01171875 lies between 1.0078125 and 1.015625; the tie goes to the even significand
    prepared = link.prepare({"a": torch.tensor([1.01171875, 0.5])}, {}, round=0)
    assert prepared["a"].tolist() == [1.015625, 0.0]
    adapter = TypeAdapter(Link)
    assert adapter.validate_json(adapter.dump_json(link)) == link
    assert adapter.validate_python({}) == Link()

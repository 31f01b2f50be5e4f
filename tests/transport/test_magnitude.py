"""The largest magnitudes, against a stable sort, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.transport import TopK, coder, magnitude
from fedlora.transport.coder import where_true
from fedlora.transport.magnitude import largest

RNG = np.random.default_rng(0)
SIZE = 5000
NORMAL = RNG.standard_normal(SIZE)
VALUES = {
    "normal": NORMAL,
    "ties": np.rint(NORMAL * 3) / 4,
    "mostly zeros": NORMAL * (RNG.random(SIZE) < 0.1),
    "zeros of either sign": np.where(RNG.random(SIZE) < 0.5, -0.0, 0.0),
    "neighbours": np.float32(1) + RNG.integers(-3, 4, SIZE) * np.float32(2**-23),
    "of every size": NORMAL * 10.0 ** RNG.integers(-44, 38, SIZE),
    "infinite and NaN": np.where(RNG.random(SIZE) < 0.1, np.nan, np.where(RNG.random(SIZE) < 0.1, -np.inf, NORMAL)),
}


@pytest.mark.parametrize("piece", [7, 1000, 1 << 18])
@pytest.mark.parametrize("kind", VALUES)
def test_they_are_those_of_a_stable_sort(kind, piece, monkeypatch):
    monkeypatch.setattr(magnitude, "_PIECE", piece)
    monkeypatch.setattr(magnitude, "_CACHED", piece)
    values = VALUES[kind][: 200 if piece == 7 else SIZE].astype(np.float32)
    order = np.argsort(-(values.view(np.int32) & 0x7FFFFFFF), kind="stable")  # NaN is the largest
    for k in {0, 1, 2, len(values) // 64, len(values) // 4, len(values) - 1, len(values)}:
        kept = largest(torch.from_numpy(values), k)
        assert kept.dtype == torch.bool
        assert torch.nonzero(kept).reshape(-1).tolist() == sorted(order[:k].tolist())


def test_a_sample_bounds_what_is_looked_at_again(monkeypatch):
    values = VALUES["normal"].astype(np.float32)
    assert magnitude._by_sample(values.view(np.int32), SIZE // 4) is not None
    monkeypatch.setattr(magnitude, "_SAMPLE", 50)  # the bounds are then far apart
    assert magnitude._by_sample(values.view(np.int32), SIZE // 4) is None


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_sample_that_misleads_changes_nothing(factor, monkeypatch):
    monkeypatch.setattr(magnitude, "_SAMPLE", 100)
    values = VALUES["normal"].astype(np.float32)
    values[:: SIZE // 100 | 1] *= np.float32(factor)  # the sample, and nothing else
    assert magnitude._by_sample(values.view(np.int32), SIZE // 4) is None
    order = np.argsort(-np.abs(values), kind="stable")
    assert torch.nonzero(largest(torch.from_numpy(values), SIZE // 4)).reshape(-1).tolist() == sorted(
        order[: SIZE // 4]
    )


def test_histograms_find_the_same(monkeypatch):
    monkeypatch.setattr(magnitude, "_by_sample", lambda bits, k: None)  # as on other devices
    for kind, piece in (("normal", 1000), ("ties", 7), ("infinite and NaN", 1 << 18)):
        test_they_are_those_of_a_stable_sort(kind, piece, monkeypatch)


def test_other_devices_find_the_same_places(monkeypatch):
    # what a device other than the CPU does, on the CPU
    places = magnitude._where(torch.tensor([3, 1, 3, 2]), 3)

    class Elsewhere:
        type = "elsewhere"

    class Values:
        device = Elsewhere()

        def __eq__(self, other):
            return torch.tensor([3, 1, 3, 2]) == other

    assert magnitude._where(Values(), 3).tolist() == places.tolist() == [0, 2]


def test_of_many_zeros_some_are_kept_by_the_sample_too():
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(600_000).astype(np.float32))
    zeros = torch.where(torch.rand(600_000, generator=torch.Generator().manual_seed(0)) < 0.8, 0.0, values)
    for vector in (values, zeros):  # a partition by comparisons takes twenty times as long for zeros
        kept = magnitude._by_sample(vector.view(torch.int32).numpy(), 150_000)
        assert kept is not None
        assert torch.equal(torch.from_numpy(kept), magnitude._by_histogram(vector.view(torch.int32), 150_000))


@pytest.mark.parametrize("piece", [7, 1000, 1 << 18])
@pytest.mark.parametrize("kind", VALUES)
def test_places_of_few_are_those_of_the_mask(kind, piece, monkeypatch):
    monkeypatch.setattr(magnitude, "_CACHED", piece)
    values = torch.from_numpy(VALUES[kind].astype(np.float32))
    for k in (1, SIZE // 64, SIZE // 20):
        places = magnitude.few_largest(values, k)
        assert places is not None or kind == "zeros of either sign"  # all of them are candidates
        if places is not None:
            assert places.tolist() == torch.nonzero(largest(values, k)).reshape(-1).tolist()
    assert magnitude.few_largest(values, 0) is None


def test_few_that_a_sample_misses_are_found_otherwise(monkeypatch):
    monkeypatch.setattr(magnitude, "_SAMPLE", 100)
    values = VALUES["normal"].astype(np.float32)
    values[:: SIZE // 100 | 1] *= np.float32(1e6)  # the sample, and nothing else
    assert magnitude.few_largest(torch.from_numpy(values), SIZE // 25) is None
    thinned = TopK(density=1 / 25)({"a": torch.from_numpy(values)}, {}, round=0)["a"]
    assert torch.equal(thinned != 0, largest(torch.from_numpy(values), SIZE // 25))


def test_a_tree_thinned_to_few_entries_keeps_their_bits_and_is_a_copy():
    values = VALUES["infinite and NaN"].astype(np.float32)
    tree = {"a": torch.from_numpy(values[:3000]).view(30, 100), "b": torch.from_numpy(values[3000:])}
    before = values.copy()
    thinned = TopK(density=0.03)(tree, {}, round=0)
    bits = torch.cat([thinned["a"].reshape(-1), thinned["b"]]).view(torch.int32)
    kept = largest(torch.from_numpy(values), int(SIZE * 0.03))
    assert bits.tolist() == (torch.from_numpy(values).view(torch.int32) * kept).tolist()
    assert np.array_equal(values.view(np.int32), before.view(np.int32))
    (alone,) = TopK(density=0.03)({"b": tree["b"]}, {}, round=0).values()
    assert alone.data_ptr() != tree["b"].data_ptr()


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.02, 0.09, 0.11, 0.6, 1.0])
@pytest.mark.parametrize("size", [0, 100, (1 << 15) + 5, 1 << 16])
def test_the_places_of_a_mask(size, density, monkeypatch):
    monkeypatch.setattr(coder, "_PIECE", 1 << 14)
    mask = RNG.random(size) < density
    assert where_true(mask).tolist() == np.flatnonzero(mask).tolist()
    assert where_true(mask[3:]).tolist() == np.flatnonzero(mask[3:]).tolist()

"""Masks of large matrices: drawn and handed over in memory proportional to what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.core.state import PhaseHandover, generator
from fedlora.tuning import LoRA, SparseMask, SvdOfDelta, subset
from fedlora.tuning.subset import _draw, _scattered


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 20))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All matrices count as large."""
    monkeypatch.setattr(subset, "_LARGE", 1)


@pytest.mark.usefixtures("large")
def test_positions_are_distinct_sorted_and_uniform() -> None:
    counts = torch.zeros(40)
    for seed in range(2000):
        found = _draw(40, 5, generator(seed))
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == 5
        counts[found] += 1
    # each is drawn with probability 1/8: 250 +- 15 of 2,000
    assert float((counts - 250).abs().max()) < 5 * 15
    assert torch.equal(_draw(40, 5, generator(1)), _draw(40, 5, generator(1)))
    assert len(_draw(40, 40, generator(1))) == 40


@pytest.mark.usefixtures("large")
def test_a_sparse_change_is_the_dense_one() -> None:
    values, index = torch.tensor([1.0, -2.0]), torch.tensor([3, 17])
    found = _scattered(values, index, torch.Size((4, 5)))
    assert found.is_sparse
    dense = torch.zeros(20)
    dense[index] = values
    assert torch.equal(found.to_dense(), dense.view(4, 5))
    assert float(found.square().sum()) == 5.0
    assert not _scattered(values, index, torch.Size((3, 3, 4))).is_sparse


@pytest.mark.parametrize("fold", ["none", "rest"])
def test_a_hand_over_is_the_same_from_sparse_and_dense(fold: str, large: None) -> None:
    def learnt(dense: bool) -> PhaseHandover:
        tuning = SparseMask(density=0.1)
        installed = tuning.install(net(), frozenset(), 0)
        start = tuning.start(installed, 5, None)
        tuning.apply_setup(installed, tuning.setup(installed, start, reference=False))
        after = {name: value + 0.1 for name, value in start.params.items()}
        delta = tuning.changes(installed, start.params, after)
        assert any(value.is_sparse for value in delta.values())
        return PhaseHandover({name: value.to_dense() if dense else value for name, value in delta.items()}, {})

    lora = LoRA(rank=2, targets="all-linear", init=SvdOfDelta(fold=fold))  # type: ignore[arg-type]
    starts = [lora.start(lora.install(net(), frozenset(), 0), 1, learnt(dense)) for dense in (True, False)]
    for name, value in starts[0].params.items():
        assert torch.equal(value, starts[1].params[name])
    assert starts[0].facts == pytest.approx(starts[1].facts)
    assert starts[0].fold.dense.keys() == starts[1].fold.dense.keys()
    assert not any(value.is_sparse for value in starts[1].fold.dense.values())

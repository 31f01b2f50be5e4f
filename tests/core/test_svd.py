"""The leading part of a decomposition agrees with all of it, from dense and sparse matrices, with the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.core import svd
from fedlora.core.svd import leading_svd


def matrix(rows: int, columns: int, density: float = 1.0) -> Tensor:
    draws = torch.Generator().manual_seed(3)
    values = torch.randn(rows, columns, generator=draws)
    return values * (torch.rand(rows, columns, generator=draws) < density)


def product(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    left, values, right = parts
    return left * values @ right


@pytest.mark.parametrize("shape", [(600, 520), (520, 700)])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_product_is_the_best_approximation(shape: tuple[int, int], sparse: bool) -> None:
    value = matrix(*shape, density=0.02 if sparse else 1.0)
    left, values, right = torch.linalg.svd(value.double(), full_matrices=False)
    best = left[:, :8] * values[:8] @ right[:8]
    found = leading_svd(value.to_sparse() if sparse else value, 8)
    assert [part.dtype for part in found] == [torch.float32] * 3
    assert float((product(found).double() - best).norm() / best.norm()) < 1e-5
    assert bool((found[1].diff() <= 0).all())


def test_the_same_matrix_gives_the_same_bits() -> None:
    first, second = (leading_svd(matrix(600, 520), 4) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


def test_small_matrices_and_large_parts_are_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_lanczos", None)  # would fail if called
    assert leading_svd(matrix(20, 30), 5)[1].shape == (5,)
    assert leading_svd(matrix(20, 30).to_sparse(), 25)[1].shape == (20,)
    assert leading_svd(matrix(512, 512), 33)[1].shape == (33,)


def test_what_does_not_converge_is_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_lanczos", lambda matrix, rank: None)
    value = matrix(512, 512)
    assert torch.equal(leading_svd(value, 3)[1], torch.linalg.svd(value, full_matrices=False).S[:3])

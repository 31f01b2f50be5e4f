"""The leading part of a singular value decomposition, by Lanczos iteration where that is much cheaper."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlora.core.later import scipy

SMALLEST_SIDE = 512
"""Matrices with a smaller side are decomposed whole."""
SMALLEST_PART = 1 / 16
"""So are matrices of which a larger share of the singular values is wanted."""


def leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values of a matrix with their vectors: ``U_r S_r V_r^T`` is its best approximation.

    Large matrices use ``scipy.sparse.linalg.svds`` (ARPACK) from a fixed start vector, so that the same matrix gives
    the same bits; the product agrees with that of the full decomposition to 1e-5 of its norm. If the iteration does not
    converge, the matrix is decomposed whole.

    Args:
        matrix: ``(m, n)``, float32 or float64, dense or sparse (COO).
        rank: number of singular values; at most ``min(m, n)`` are returned.

    Returns:
        ``U: (m, r)``, ``S: (r,)`` in descending order and ``V^T: (r, n)``, in the matrix's format and on its device.
        Signs are arbitrary.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) >= SMALLEST_SIDE and rank <= SMALLEST_PART * min(matrix.shape):
        found = _lanczos(matrix, rank)
        if found is not None:
            return found
    whole = matrix.to_dense() if matrix.is_sparse else matrix
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _lanczos(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same by ARPACK; None if it does not converge."""
    start = np.random.Generator(np.random.PCG64(0)).standard_normal(min(matrix.shape))
    try:
        left, values, right = scipy.sparse.linalg.svds(_numpy(matrix), k=rank, v0=start, tol=1e-8)
    except scipy.sparse.linalg.ArpackError:
        return None
    order = np.argsort(-values, kind="stable")
    parts = (np.ascontiguousarray(left[:, order]), values[order], np.ascontiguousarray(right[order]))
    left_, values_, right_ = (torch.from_numpy(part).to(matrix.device, matrix.dtype) for part in parts)
    return left_, values_, right_


def _numpy(matrix: Tensor) -> np.ndarray:
    """The matrix for scipy, in float64, which nearly equal singular values need: an array, or compressed rows."""
    if not matrix.is_sparse:
        return matrix.detach().cpu().double().numpy()
    held = matrix.detach().cpu().coalesce()
    places = held.indices().numpy()
    rows = scipy.sparse.csr_array((held.values().double().numpy(), (places[0], places[1])), shape=tuple(matrix.shape))
    return rows  # type: ignore[no-any-return]

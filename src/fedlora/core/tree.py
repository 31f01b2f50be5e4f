"""Arithmetic on ``Tree = dict[str, Tensor]``: trained parameters by name, in float32 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

Tree = dict[str, Tensor]


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    """A tree of zeros with the names and shapes of ``tree``."""
    return {name: torch.zeros_like(value) for name, value in tree.items()}


def clone(tree: Mapping[str, Tensor]) -> Tree:
    """A copy that shares no memory with ``tree``."""
    return {name: value.detach().clone() for name, value in tree.items()}


def add(left: Mapping[str, Tensor], right: Mapping[str, Tensor], scale: float = 1.0) -> Tree:
    """``left + scale * right``, name by name, in ``left``'s order."""
    return _zip(left, torch._foreach_add(list(left.values()), _align(left, right), alpha=scale))


def subtract(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tree:
    """``left - right``, name by name, in ``left``'s order."""
    return _zip(left, torch._foreach_sub(list(left.values()), _align(left, right)))


def scale(tree: Mapping[str, Tensor], factor: float) -> Tree:
    """``factor * tree``."""
    return _zip(tree, torch._foreach_mul(list(tree.values()), factor)) if tree else {}


def add_(left: Tree, right: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """``left += scale * right`` in place."""
    if left:
        torch._foreach_add_(list(left.values()), _align(left, right), alpha=scale)


def scale_(tree: Tree, factor: float) -> None:
    """``tree *= factor`` in place."""
    if tree:
        torch._foreach_mul_(list(tree.values()), factor)


def have_same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two float32 trees are equal bit for bit; a negative zero differs from a positive one."""
    pairs = zip(left.values(), _align(left, right), strict=True)
    return all(torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in pairs)


def num_entries(tree: Mapping[str, Tensor]) -> int:
    """The number of entries in the tree."""
    return sum(map(Tensor.numel, tree.values()))


def norm(tree: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all entries together, summed in float64."""
    norms = torch._foreach_norm(list(tree.values()), 2, dtype=torch.float64) if tree else ()
    return math.sqrt(sum(float(value) ** 2 for value in norms))


def is_finite(tree: Mapping[str, Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(np.isfinite(value.numpy()).all()) for value in tree.values())  # far faster than torch's


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector, in the tree's order."""
    values = list(tree.values())
    if len(values) > 1:  # one call into torch; it does not copy one tensor
        return _flatten_dense_tensors(values)  # type: ignore[no-any-return, no-untyped-call]
    return values[0].reshape(-1).clone() if values else torch.zeros(0)


def as_vector(tree: Mapping[str, Tensor]) -> Tensor:
    """``flatten`` without a copy where the tensors lie one after the other in one vector, as those of ``unflatten``."""
    values = [value for value in tree.values() if value.numel()]
    if not values:
        return flatten(tree).detach()
    first = values[0]
    starts = accumulate([value.nbytes for value in values[:-1]], initial=first.data_ptr())
    if list(starts) != [value.data_ptr() for value in values]:
        return flatten(tree).detach()
    if {value.dtype for value in values} != {first.dtype} or not all(map(Tensor.is_contiguous, values)):
        return flatten(tree).detach()
    # between the first and the last of one memory, there is nothing of another
    if first.untyped_storage().data_ptr() != values[-1].untyped_storage().data_ptr():
        return flatten(tree).detach()
    return first.detach().as_strided((num_entries(tree),), (1,))


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tree:
    """The inverse of ``flatten``: views of ``vector`` with ``like``'s names and shapes."""
    values = list(like.values())
    if vector.numel() != num_entries(like):
        raise ValueError(f"a vector of {vector.numel()} entries does not fill a tree of {num_entries(like)}")
    # one call into torch; it loses the shape of empty tensors
    parts = _unflatten_dense_tensors(vector, values)  # type: ignore[no-untyped-call]
    return {
        name: part if part.numel() else part.view(value.shape)
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def _align(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[Tensor]:
    if left.keys() != right.keys():
        raise KeyError(f"trees differ in names: {sorted(left.keys() ^ right.keys())[:4]}")
    return [right[name] for name in left]


def _zip(like: Mapping[str, Tensor], values: list[Tensor] | tuple[Tensor, ...]) -> Tree:
    return dict(zip(like, values, strict=True))

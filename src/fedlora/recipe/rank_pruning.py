"""Rank self-pruning: clients drop ranks that they do not use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core import tree
from fedlora.core.component import MODEL_CONFIG, Fraction, NonNegative, dataclass
from fedlora.core.schema import Schema
from fedlora.core.tree import Tree


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class RankPruning:
    """Rank self-pruning (HetLoRA, arXiv 2401.06432, Sec. 3.2).

    A client of rank ``r`` adds ``weight sum_m ||B_m[:, t:r]|| ||A_m[t:r]||`` to its loss, with ``t = int(keep r)``. If
    the sum is smaller after local training than before, its rank is ``t`` from then on: neither the client nor the
    server sends the ranks beyond ``t``.

    Args:
        keep: gamma, the fraction of ranks that is kept.
        weight: lambda, the weight of the penalty in the loss.
    """

    keep: Fraction = 0.99
    weight: NonNegative = 1e-3
    reports: ClassVar[tuple[str, ...]] = ("rank",)
    """What clients report: their rank from then on."""

    def fewer(self, rank: int) -> int:
        """The rank that a client of ``rank`` may be reduced to; at least one."""
        return max(1, int(self.keep * rank))

    def tail(self, params: Mapping[str, Tensor], schema: Schema, rank: int) -> Tensor:
        """``sum_m ||B_m[:, t:r]|| ||A_m[t:r]||``, a scalar.

        Args:
            params: at least the factors of all adapters.
            schema: their leaves.
            rank: the client's rank.
        """
        first = self.fewer(rank)
        sizes = [
            torch.linalg.vector_norm(params[b][:, first:rank]) * torch.linalg.vector_norm(params[a][first:rank])
            for a, b, _ in schema.pairs
        ]
        return torch.stack(sizes).sum()

    def penalty(self, params: Mapping[str, Tensor], schema: Schema, rank: int) -> Tensor | float:
        """The penalty that a client adds to its loss."""
        return self.weight * self.tail(params, schema, rank)

    def after(self, before: Tree, now: Tree, schema: Schema, rank: int) -> int:
        """The client's rank after local training."""
        return (
            self.fewer(rank) if float(self.tail(now, schema, rank)) < float(self.tail(before, schema, rank)) else rank
        )

    def apply(self, delta: Tree, start: Tree, schema: Schema, rank: int) -> tuple[Tree, int]:
        """The part of ``delta`` that a client of ``rank`` sends, and its rank after local training."""
        left = self.after(start, tree.add(start, delta), schema, rank)
        return (self.keep_ranks(delta, schema, left) if left < rank else delta), left

    def keep_ranks(self, values: Tree, schema: Schema, rank: int) -> Tree:
        """``values`` of a client whose rank was reduced to ``rank``."""
        result = dict(values)
        for a, b, _ in schema.pairs:
            result[a], result[b] = values[a].clone(), values[b].clone()
            result[a][rank:] = 0.0
            result[b][:, rank:] = 0.0
        return result


class NoRankPruning:
    """The null counterpart of ``RankPruning``: clients keep their ranks."""

    reports: ClassVar[tuple[str, ...]] = ()

    def fewer(self, rank: int) -> int:
        """``rank`` itself."""
        return rank

    def penalty(self, params: Mapping[str, Tensor], schema: Schema, rank: int) -> float:
        """Zero."""
        return 0.0

    def apply(self, delta: Tree, start: Tree, schema: Schema, rank: int) -> tuple[Tree, int]:
        """``delta`` and ``rank`` themselves."""
        return delta, rank

    def keep_ranks(self, values: Tree, schema: Schema, rank: int) -> Tree:
        """``values`` themselves."""
        return values

"""Aggregators that work on the products ``B A`` of low-rank adapters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.core.component import MODEL_CONFIG, Count, Share, dataclass
from fedlora.core.schema import Pair, Schema
from fedlora.core.state import Change, Fold, Update
from fedlora.core.store import Store
from fedlora.core.svd import leading_svd
from fedlora.core.tree import Tree
from fedlora.server.aggregate.base import Accumulator, Aggregator, Needs, Weighted, WeightedMean, weight_by


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class SparsityWeighted(Aggregator):
    """Weights each client by the norm of its whole adapter, ``p_k ~ ||B_k A_k||_F`` (HetLoRA, arXiv 2401.06432).

    Clients with a low rank, or that learnt little, get less weight. The head uses the same weights.

    Args:
        padding: how ranks that a client lacks are filled: ``zero``, as published, which shrinks those ranks; or
            ``keep``, with the server's values.
    """

    kind: Literal["sparsity_weighted"] = "sparsity_weighted"
    padding: Literal["zero", "keep"] = "zero"
    needs_factors: ClassVar[bool] = True
    needs: ClassVar[Needs] = "update"

    @property
    def pads_with_zeros(self) -> bool:
        return self.padding == "zero"

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        pairs = schema.pairs
        weight_of = partial(_size_of_products, pairs=pairs)
        return WeightedMean(weight_of, partial(_padded, params=params, pairs=pairs if self.padding == "zero" else []))


def _padded(update: Update, params: Tree, pairs: Sequence[Pair]) -> Update:
    """The update with zeros instead of the server's values at ranks that the client lacks."""
    start, delta = dict(update.start), dict(update.delta)
    for a, b, _ in pairs:
        absent = ~(start[a].any(1) | start[b].any(0) | delta[a].any(1) | delta[b].any(0))
        if bool(absent.any()):
            for name, kept in ((a, ~absent[:, None]), (b, ~absent)):
                start[name] = torch.where(kept, start[name], params[name])
                delta[name] = torch.where(kept, delta[name], -params[name])
    return Update(start, delta, update.weight)


def _size_of_products(update: Update, pairs: Sequence[Pair]) -> float:
    """``sqrt(sum_m ||B_m A_m||_F^2)``, from the small matrices ``B^T B`` and ``A A^T``."""
    squares = 0.0
    for a, b, _ in pairs:
        now_a, now_b = (update.start[name].double() + update.delta[name].double() for name in (a, b))
        squares += float(((now_b.T @ now_b) * (now_a @ now_a.T)).sum())
    return math.sqrt(max(0.0, squares))


class OfProducts(Weighted):
    """An aggregator on the products ``B A`` that reads the factors of all clients."""

    needs_factors: ClassVar[bool] = True
    needs: ClassVar[Needs] = "factors"

    @abstractmethod
    def of(self, cohort: Factors, delta: Tree) -> Change:
        """The change, from a cohort's factors and from the mean ``delta``, which may be overwritten."""

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return Factors(self, params, schema)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class SvdRedistribute(OfProducts):
    """The best approximation, of the same rank, of the mean of the products (FlexLoRA, arXiv 2402.11505).

    ``sum_k p_k B_k A_k = U S V^T``; the new factors are ``B = U_r S_r``, ``A = V_r^T``, or get ``sqrt(S_r)`` each.
    The product is never formed: with ``[p_k B_k] = Q R`` and ``[A_k]^T = P T`` the SVD is computed from ``R T^T``, a
    square matrix of side clients times rank, in float64. Signs are fixed so that the largest entry of each row of ``A``
    is positive. The head is averaged.

    Args:
        weighting: as for ``mean``.
        split: ``left`` gives all of ``S`` to ``B``, so that ranks without energy keep learning; ``symmetric`` gives its
            square root to both, and such ranks are lost.
    """

    kind: Literal["svd_redistribute"] = "svd_redistribute"
    weighting: Literal["uniform", "examples"] = "uniform"
    split: Literal["left", "symmetric"] = "left"

    def of(self, cohort: Factors, delta: Tree) -> Change:
        params = cohort.params
        for a, b, _ in cohort.pairs:
            tall = torch.cat(
                [share * one.double() for share, one in zip(cohort.shares, cohort.of[b], strict=True)], dim=1
            )
            wide = torch.cat([one.double() for one in cohort.of[a]])
            new_b, new_a = truncated_product(tall, wide, params[a].shape[0], self.split)
            delta[a], delta[b] = new_a.float() - params[a], new_b.float() - params[b]
        return Change(delta, Fold())


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class ProductExact(OfProducts):
    """Averages the factors, and adds the residual of the mean product to frozen weights (FedEx-LoRA, 2410.09432).

    ``B = sum_k p_k B_k``, ``A = sum_k p_k A_k``, and ``W += scale (sum_k p_k B_k A_k - B A)``. As the weighted
    ``B_k - B`` sum to zero, the fold is ``sum_{k<n} p_k (B_k - B) (A_k - A_n)``, of rank ``(n - 1) r``. The head is
    averaged.

    Args:
        weighting: as for ``mean``.
        rank: rank of the approximation of the fold that is applied and sent; by default, the fold is exact.
        max_base_share: largest size of a round's fold, as a share of the model's parameters, above which a run is
            refused before training; a half if absent.
    """

    kind: Literal["product_exact"] = "product_exact"
    weighting: Literal["uniform", "examples"] = "uniform"
    rank: Count | None = None
    max_base_share: Share | None = None
    exact_for_products: ClassVar[bool] = True
    edits_base: ClassVar[bool] = True

    def fold_rank(self, ranks: Sequence[int], moving: str) -> int:
        """See ``Aggregator.fold_rank``; zero if one factor is frozen."""
        whole = (len(ranks) - 1) * max(ranks) if moving == "both" else 0
        return whole if self.rank is None else min(whole, self.rank)

    def of(self, cohort: Factors, delta: Tree) -> Change:
        params, shares = cohort.params, cohort.shares
        folded: dict[str, tuple[Tensor, Tensor]] = {}
        for a, b, module in cohort.pairs:
            ours = [(one.double(), other.double()) for one, other in zip(cohort.of[b], cohort.of[a], strict=True)]
            mean_b, mean_a = (
                torch.stack([share * pair[side] for share, pair in zip(shares, ours, strict=True)]).sum(0)
                for side in (0, 1)
            )
            delta[a], delta[b] = mean_a.float() - params[a], mean_b.float() - params[b]
            others = list(zip(shares, ours, strict=True))[:-1]
            if others:
                tall = torch.cat([share * (pair[0] - mean_b) for share, pair in others], dim=1)
                wide = torch.cat([pair[1] - ours[-1][1] for _, pair in others])
                if self.rank is not None and self.rank < len(wide):
                    tall, wide = truncated_product(tall, wide, self.rank, "symmetric")
                folded[module] = tall.float(), wide.float()
        widest = max((len(wide) for _, wide in folded.values()), default=0)
        folded = {module: _widened(tall, wide, widest) for module, (tall, wide) in folded.items()}
        moved = any(bool(b.any()) and bool(a.any()) for b, a in folded.values())
        return Change(delta, Fold(folded) if moved else Fold())


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Stack(OfProducts):
    """Adds all clients' products to frozen weights and reinitialises the adapters (FLoRA, arXiv 2409.05976, Eq. 6).

    ``W += scale sum_k p_k B_k A_k``, sent as the stacked factors; then ``B = 0``, and ``A`` is redrawn, the same for
    all clients. Ranks that a client lacks take no space. The head is averaged.

    Args:
        weighting: as for ``mean``; the paper uses ``examples``.
        max_base_share: as for ``product_exact``.
    """

    kind: Literal["stack"] = "stack"
    weighting: Literal["uniform", "examples"] = "uniform"
    max_base_share: Share | None = None
    exact_for_products: ClassVar[bool] = True
    edits_base: ClassVar[bool] = True
    reinitialises: ClassVar[bool] = True

    def fold_rank(self, ranks: Sequence[int], moving: str) -> int:
        return sum(ranks) if moving == "both" else max(ranks)

    def of(self, cohort: Factors, delta: Tree) -> Change:
        params = cohort.params
        widest = max(len(params[a]) for a, _, _ in cohort.pairs)
        stacked: dict[str, tuple[Tensor, Tensor]] = {}
        for a, b, module in cohort.pairs:
            tall = [share * one for share, one in zip(cohort.shares, cohort.of[b], strict=True)]
            wide = cohort.of[a]
            if cohort.same_a:  # if A is frozen, the sum of all B is enough
                tall, wide = [torch.stack(tall).sum(0)], wide[:1]
            parts = [_widened(*each, widest) for each in zip(tall, wide, strict=True)]
            stacked[module] = torch.cat([part for part, _ in parts], dim=1), torch.cat([part for _, part in parts])
            delta[a], delta[b] = torch.zeros_like(params[a]), -params[b]
        used = torch.stack([b.any(0) & a.any(1) for b, a in stacked.values()]).any(0)
        folded = {name: (b[:, used], a[used]) for name, (b, a) in stacked.items()}
        return Change(delta, Fold(folded) if bool(used.any()) else Fold())


class Factors(Accumulator):
    """Holds the factors of all updates by name, and the sum of everything else.

    Args:
        rule: the aggregator applied to the factors and to the mean of the deltas.
        params: the server's parameters.
        schema: the leaf of each of them.
    """

    def __init__(self, rule: OfProducts, params: Tree, schema: Schema) -> None:
        self._rule, self._weight_of = rule, weight_by(rule.weighting)
        self._mean = WeightedMean(self._weight_of)
        self._weights: list[float] = []
        self._first: Update | None = None
        self.params, self.pairs = params, schema.pairs
        self.of: dict[str, list[Tensor]] = {name: [] for a, b, _ in self.pairs for name in (a, b)}
        self.same_a = True

    @property
    def shares(self) -> list[float]:
        """Each client's share of the mean."""
        return [weight / sum(self._weights) for weight in self._weights]

    def add(self, update: Update) -> None:
        self._mean.add(update)
        self._weights.append(self._weight_of(update))
        for name, values in self.of.items():
            values.append(update.start[name] + update.delta[name])
        if self._first is None:  # the changes of A are kept too for one client
            start, delta = ({a: part[a] for a, _, _ in self.pairs} for part in (update.start, update.delta))
            self._first = Update(start, delta, 0.0)
        trees = ((self._first.delta, update.delta), (self._first.start, update.start))
        self.same_a &= all(torch.equal(first[a], own[a]) for first, own in trees for a, _, _ in self.pairs)

    def finish(self) -> Change:
        return self._rule.of(self, self._mean.finish().delta)


def _widened(tall: Tensor, wide: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors of a fold with zeros up to ``rank``, as one rank is announced for all modules."""
    lacking = rank - len(wide)
    return torch.nn.functional.pad(tall, (0, lacking)), torch.nn.functional.pad(wide, (0, 0, 0, lacking))


def truncated_product(tall: Tensor, wide: Tensor, rank: int, split: str) -> tuple[Tensor, Tensor]:
    """``B`` and ``A`` of ``rank`` with the product closest to ``tall @ wide``, which is never formed.

    Args:
        tall: ``(out, n)``, float64.
        wide: ``(n, in)``, float64.
        rank: rank of the result.
        split: where the singular values go, ``left`` or ``symmetric``.
    """
    q, r = torch.linalg.qr(tall)
    p, t = torch.linalg.qr(wide.T)
    u, s, vt = leading_svd(r @ t.T, rank)
    b, a = q @ u, vt @ p.T
    signs = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()
    a, b = a * signs, b * signs.T
    if split == "left":
        return b * s, a
    return b * s.sqrt(), a * s.sqrt()[:, None]

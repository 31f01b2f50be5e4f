"""Rules about the products ``B A`` of low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedlora.aggregate.base import Aggregator, Weighted, factors, shared_out, weighted_mean
from fedlora.component import STRICT
from fedlora.state import Change, Fold, Update
from fedlora.tree import Tree


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparsityWeighted(Aggregator):
    """Weighs each client by the size of its whole adapter, ``p_k ~ ||B_k A_k||_F`` (HetLoRA, arXiv 2401.06432).

    Clients of a low rank, or that learnt little, have less say. The head is weighed the same.

    Args:
        padding: what clients have at ranks that they do not have: ``zero``, as published, which shrinks those ranks; or
            ``keep``, what the server has.
    """

    kind: Literal["sparsity_weighted"] = "sparsity_weighted"
    padding: Literal["zero", "keep"] = "zero"
    needs_factors: ClassVar[bool] = True

    @property
    def pads_with_zeros(self) -> bool:
        """See ``Aggregator.pads_with_zeros``."""
        return self.padding == "zero"

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; no more than one update is in memory at a time."""
        padded = updates if self.padding == "keep" else (_padded(update, params) for update in updates)
        return Change(weighted_mean(padded, _size_of_products), Fold())


def _padded(update: Update, params: Tree) -> Update:
    """The update with zeros, instead of the server's values, where the client has no rank."""
    start, delta = dict(update.start), dict(update.delta)
    for a, b in factors(params):
        absent = ~(start[a].any(1) | start[b].any(0) | delta[a].any(1) | delta[b].any(0))
        if bool(absent.any()):
            for name, kept in ((a, ~absent[:, None]), (b, ~absent)):
                start[name] = torch.where(kept, start[name], params[name])
                delta[name] = torch.where(kept, delta[name], -params[name])
    return Update(start, delta, update.weight)


def _size_of_products(update: Update) -> float:
    """``sqrt(sum_m ||B_m A_m||_F^2)``, from the small matrices ``B^T B`` and ``A A^T``."""
    squares = 0.0
    for a, b in factors(update.delta):
        now_a, now_b = (update.start[name].double() + update.delta[name].double() for name in (a, b))
        squares += float(((now_b.T @ now_b) * (now_a @ now_a.T)).sum())
    return math.sqrt(max(0.0, squares))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SvdRedistribute(Weighted):
    """The best adapter of the same rank for the mean of the products (FlexLoRA, arXiv 2402.11505).

    ``sum_k p_k B_k A_k = U S V^T``; the new factors are ``B = U_r S_r``, ``A = V_r^T``, or have the root of ``S`` each.
    The product is never formed: with ``[p_k B_k] = Q R`` and ``[A_k]^T = P T`` the SVD is that of ``R T^T``, of side
    clients times rank, in float64. Of each row of ``A`` the largest entry is positive. The head is averaged.

    Args:
        weighting: as for ``mean``.
        split: ``left`` gives all of ``S`` to ``B``, so that ranks without energy can still learn; ``symmetric`` its
            root to both, and such ranks are lost.
    """

    kind: Literal["svd_redistribute"] = "svd_redistribute"
    weighting: Literal["uniform", "examples"] = "uniform"
    split: Literal["left", "symmetric"] = "left"
    needs_factors: ClassVar[bool] = True
    rebuilds_factors: ClassVar[bool] = True

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; the factors of all updates are in memory together."""
        cohort, shares, delta = shared_out(updates, self.weighting)
        for a, b in factors(params):
            tall = torch.cat(
                [share * (one.start[b] + one.delta[b]).double() for share, one in zip(shares, cohort, strict=True)],
                dim=1,
            )
            wide = torch.cat([(one.start[a] + one.delta[a]).double() for one in cohort])
            new_b, new_a = truncated_product(tall, wide, params[a].shape[0], self.split)
            delta[a], delta[b] = new_a.float() - params[a], new_b.float() - params[b]
        return Change(delta, Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProductExact(Weighted):
    """Factors are averaged, and frozen weights take what the mean of the products has beside (FedEx-LoRA, 2410.09432).

    ``B = sum_k p_k B_k``, ``A = sum_k p_k A_k``, and ``W += scale (sum_k p_k B_k A_k - B A)``. As the ``B_k - B`` add
    up to nothing, the fold is ``sum_{k<n} p_k (B_k - B) (A_k - A_n)``, of rank ``(n - 1) r``. The head is averaged.

    Args:
        weighting: as for ``mean``.
        rank: of the best approximation of the fold that is made and sent; all of it by default.
    """

    kind: Literal["product_exact"] = "product_exact"
    weighting: Literal["uniform", "examples"] = "uniform"
    rank: Annotated[int, Field(ge=1)] | None = None
    exact_for_products: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True
    rebuilds_factors: ClassVar[bool] = True
    edits_base: ClassVar[bool] = True

    def fold_rank(self, ranks: Sequence[int], moving: str) -> int:
        """See ``Aggregator.fold_rank``; nothing where one factor keeps still."""
        whole = (len(ranks) - 1) * max(ranks) if moving == "both" else 0
        return whole if self.rank is None else min(whole, self.rank)

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; the factors of all updates are in memory together."""
        cohort, shares, delta = shared_out(updates, self.weighting)
        folded: dict[str, tuple[Tensor, Tensor]] = {}
        for a, b in factors(params):
            ours = [((one.start[b] + one.delta[b]).double(), (one.start[a] + one.delta[a]).double()) for one in cohort]
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
                    # one rank for all modules; those that are too small for it have zeros beyond
                    lacking = self.rank - len(wide)
                    tall = torch.nn.functional.pad(tall, (0, lacking))
                    wide = torch.nn.functional.pad(wide, (0, 0, 0, lacking))
                folded[a.removesuffix(".lora_A")] = tall.float(), wide.float()
        moved = any(bool(b.any()) and bool(a.any()) for b, a in folded.values())
        return Change(delta, Fold(folded) if moved else Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stack(Weighted):
    """Frozen weights take all clients' products, and the adapters start anew (FLoRA, arXiv 2409.05976, Eq. 6).

    ``W += scale sum_k p_k B_k A_k``, told as the factors side by side; then ``B = 0`` and ``A`` is drawn anew, the same
    for all. Ranks that a client does not have take no place. The head is averaged.

    Args:
        weighting: as for ``mean``; FLoRA's own is by examples.
    """

    kind: Literal["stack"] = "stack"
    weighting: Literal["uniform", "examples"] = "uniform"
    exact_for_products: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True
    rebuilds_factors: ClassVar[bool] = True
    edits_base: ClassVar[bool] = True
    reinitialises: ClassVar[bool] = True

    def fold_rank(self, ranks: Sequence[int], moving: str) -> int:
        """See ``Aggregator.fold_rank``."""
        return sum(ranks) if moving == "both" else max(ranks)

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; the factors of all updates are in memory together."""
        cohort, shares, delta = shared_out(updates, self.weighting)
        stacked: dict[str, tuple[Tensor, Tensor]] = {}
        # where A keeps still, the sum of all B is enough
        same = all(torch.equal(cohort[0].delta[a], one.delta[a]) for a, _ in factors(params) for one in cohort[1:])
        same = same and all(torch.equal(cohort[0].start[a], one.start[a]) for a, _ in factors(params) for one in cohort)
        for a, b in factors(params):
            tall = [share * (one.start[b] + one.delta[b]) for share, one in zip(shares, cohort, strict=True)]
            wide = [one.start[a] + one.delta[a] for one in cohort]
            if same:
                tall, wide = [torch.stack(tall).sum(0)], wide[:1]
            stacked[a.removesuffix(".lora_A")] = torch.cat(tall, dim=1), torch.cat(wide)
            delta[a], delta[b] = torch.zeros_like(params[a]), -params[b]
        used = torch.stack([b.any(0) & a.any(1) for b, a in stacked.values()]).any(0)
        folded = {name: (b[:, used], a[used]) for name, (b, a) in stacked.items()}
        return Change(delta, Fold(folded) if bool(used.any()) else Fold())


def truncated_product(tall: Tensor, wide: Tensor, rank: int, split: str) -> tuple[Tensor, Tensor]:
    """``B`` and ``A`` of ``rank`` whose product is next to ``tall @ wide``, which is never formed.

    Args:
        tall: ``(out, n)``, float64.
        wide: ``(n, in)``, float64.
        rank: of the result.
        split: where the singular values go, ``left`` or ``symmetric``.
    """
    q, r = torch.linalg.qr(tall)
    p, t = torch.linalg.qr(wide.T)
    u, s, vt = torch.linalg.svd(r @ t.T, full_matrices=False)
    b, a = q @ u[:, :rank], vt[:rank] @ p.T
    s = s[:rank]
    signs = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()
    a, b = a * signs, b * signs.T
    if split == "left":
        return b * s, a
    return b * s.sqrt(), a * s.sqrt()[:, None]

"""How a cohort's updates become one change: means, rules about the products ``B A``, and robust ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedlora import tree
from fedlora.component import STRICT
from fedlora.errors import TrainingError
from fedlora.state import Change, Fold, Update
from fedlora.tree import Tree

_NOBODY = (
    "no client answered with an update; a round needs at least one client that has examples and is done before "
    "local.timeout_seconds"
)


class Aggregator(ABC):
    """Turns the updates of a cohort, in job order, into one change."""

    exact_for_products: ClassVar[bool]
    """Whether the mean of the products ``B @ A`` is what the result's product is, its fold included."""
    folds: ClassVar[bool] = False
    """Whether frozen weights are edited, which clients must get to know."""
    restarts: ClassVar[bool] = False
    """Whether the adapters start anew after each round."""

    def fold_rank(self, num_clients: int, rank: int, moving: str) -> int:
        """The rank of a round's fold.

        Args:
            num_clients: of the cohort.
            rank: of the adapters.
            moving: the factors that are trained: ``both``, ``B``, or ``alternate``.
        """
        return 0

    @abstractmethod
    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """Reads ``updates`` once, in order, and returns the change they ask for.

        Args:
            updates: the cohort's.
            params: the server's parameters, to which the change will be added.

        Raises:
            TrainingError: there are too few updates.
        """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mean(Aggregator):
    """Weighted mean of the deltas, ``sum_k p_k delta_k`` with ``sum_k p_k = 1`` (FedAvg, arXiv 1602.05629, Alg. 1).

    Args:
        weighting: ``uniform`` gives every client of the cohort the same say (FLASC's code, and what noise for privacy
            is calibrated for); ``examples`` gives a say by the examples the client trained on in this round.
    """

    kind: Literal["mean"] = "mean"
    weighting: Literal["uniform", "examples"] = "uniform"
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; no more than one update is in memory at a time."""
        return Change(_weighted(updates, lambda update: 1.0 if self.weighting == "uniform" else update.weight), Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparsityWeighted(Aggregator):
    """Weighs each client by the size of its whole adapter, ``p_k ~ ||B_k A_k||_F`` (HetLoRA, arXiv 2401.06432).

    Clients of a low rank, or that learnt little, have less say. The head is weighed the same. Changes are weighed, so
    that ranks which a client does not have stay where they are instead of shrinking.
    """

    kind: Literal["sparsity_weighted"] = "sparsity_weighted"
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; no more than one update is in memory at a time."""
        return Change(_weighted(updates, _size_of_products), Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SvdRedistribute(Aggregator):
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
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; the factors of all updates are in memory together."""
        cohort, shares, delta = _shared_out(updates, self.weighting)
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
class ProductExact(Aggregator):
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
    folds: ClassVar[bool] = True

    def fold_rank(self, num_clients: int, rank: int, moving: str) -> int:
        """See ``Aggregator.fold_rank``; nothing where one factor keeps still."""
        whole = (num_clients - 1) * rank if moving == "both" else 0
        return whole if self.rank is None else min(whole, self.rank)

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; the factors of all updates are in memory together."""
        cohort, shares, delta = _shared_out(updates, self.weighting)
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
                folded[a.removesuffix(".lora_A")] = tall.float(), wide.float()
        moved = any(bool(b.any()) and bool(a.any()) for b, a in folded.values())
        return Change(delta, Fold(folded) if moved else Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Stack(Aggregator):
    """Frozen weights take all clients' products, and the adapters start anew (FLoRA, arXiv 2409.05976, Eq. 6).

    ``W += scale sum_k p_k B_k A_k``, told as the factors side by side; then ``B = 0`` and ``A`` is drawn anew, the same
    for all. Ranks that a client does not have take no place. The head is averaged.

    Args:
        weighting: as for ``mean``; FLoRA's own is by examples.
    """

    kind: Literal["stack"] = "stack"
    weighting: Literal["uniform", "examples"] = "uniform"
    exact_for_products: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    restarts: ClassVar[bool] = True

    def fold_rank(self, num_clients: int, rank: int, moving: str) -> int:
        """See ``Aggregator.fold_rank``."""
        return num_clients * rank if moving == "both" else rank

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; the factors of all updates are in memory together."""
        cohort, shares, delta = _shared_out(updates, self.weighting)
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


def _shared_out(updates: Iterable[Update], weighting: str) -> tuple[list[Update], list[float], Tree]:
    """A cohort, the share that each client has in the mean, and the mean of their deltas."""
    cohort = list(updates)
    weights = [1.0 if weighting == "uniform" else update.weight for update in cohort]
    mean = _weighted(cohort, lambda update: 1.0 if weighting == "uniform" else update.weight)
    return cohort, [weight / sum(weights) for weight in weights], mean


def factors(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of ``A`` and ``B`` of every adapter."""
    found = list(names)
    return [(name, f"{name[:-1]}B") for name in found if name.endswith("lora_A") and f"{name[:-1]}B" in found]


def _weighted(updates: Iterable[Update], weight_of: Callable[[Update], float]) -> Tree:
    """``sum_k w_k delta_k / sum_k w_k``."""
    total: Tree | None = None
    weights = 0.0
    for update in updates:
        weight = weight_of(update)
        total = tree.zeros_like(update.delta) if total is None else total
        tree.add_(total, update.delta, weight)
        weights += weight
    if total is None or weights <= 0:
        raise TrainingError(_NOBODY)
    return tree.scale(total, 1.0 / weights)


def _size_of_products(update: Update) -> float:
    """``sqrt(sum_m ||B_m A_m||_F^2)``, from the small matrices ``B^T B`` and ``A A^T``."""
    squares = 0.0
    for a, b in factors(update.delta):
        now_a, now_b = (update.start[name].double() + update.delta[name].double() for name in (a, b))
        squares += float(((now_b.T @ now_b) * (now_a @ now_a.T)).sum())
    return math.sqrt(max(0.0, squares))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CoordinateMedian(Aggregator):
    """The median of each coordinate (arXiv 1803.01498, Def. 1); of an even number the mean of the middle two.

    It stands up to faulty clients as long as they are fewer than half, and loses what only a few clients learnt.
    """

    kind: Literal["median"] = "median"
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; all updates are in memory together."""
        like, stacked = _stacked(updates)
        ordered = stacked.sort(dim=0).values
        middle = (len(ordered) - 1) // 2
        return Change(tree.unflatten((ordered[middle] + ordered[len(ordered) // 2]) / 2, like), Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrimmedMean(Aggregator):
    """The mean of each coordinate without its ``int(trim * n)`` smallest and largest (arXiv 1803.01498, Def. 2).

    Args:
        trim: share left out at each end.
    """

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; all updates are in memory together."""
        like, stacked = _stacked(updates)
        left_out = int(self.trim * len(stacked))
        kept = stacked.sort(dim=0).values[left_out : len(stacked) - left_out]
        return Change(tree.unflatten(kept.mean(dim=0), like), Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Krum(Aggregator):
    """The mean of those updates that have the closest neighbours (arXiv 1703.02757).

    An update's score is the sum of the squared distances to its ``n - faulty - 2`` nearest others.

    Args:
        faulty: how many clients may be faulty.
        select: how many of the best are averaged; above 1 it is multi-Krum. A cohort must have
            ``2 * faulty + 2 + select`` clients at least.
    """

    kind: Literal["krum"] = "krum"
    faulty: Annotated[int, Field(ge=0)] = 1
    select: Annotated[int, Field(ge=1)] = 1
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; all updates are in memory together."""
        like, stacked = _stacked(updates)
        num = len(stacked)
        needed = max(2 * self.faulty + 3, 2 * self.faulty + 2 + self.select)
        if num < needed:
            raise TrainingError(
                f"krum with faulty = {self.faulty} and select = {self.select} needs {needed} clients in a round, and "
                f"{num} answered; raise clients.per_round"
            )
        distances = torch.cdist(stacked.double(), stacked.double()).square()
        nearest = distances.sort(dim=1).values[:, 1 : num - self.faulty - 1]
        best = nearest.sum(dim=1).sort(stable=True).indices[: self.select].sort().values
        return Change(tree.unflatten(stacked[best].mean(dim=0), like), Fold())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NormBound(Aggregator):
    """The mean of updates that are shortened to a norm (arXiv 1911.07963).

    Args:
        norm: the largest Euclidean norm that an update keeps.
    """

    kind: Literal["norm_bound"] = "norm_bound"
    norm: Annotated[float, Field(gt=0)]
    exact_for_products: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update], params: Tree) -> Change:
        """See ``Aggregator.combine``; no more than one update is in memory at a time."""
        bounded = (
            update._replace(delta=tree.scale(update.delta, 1.0 / max(1.0, tree.norm(update.delta) / self.norm)))
            for update in updates
        )
        return Change(_weighted(bounded, lambda update: 1.0), Fold())


def _stacked(updates: Iterable[Update]) -> tuple[Tree, Tensor]:
    """A tree for names and shapes, and all deltas as rows."""
    cohort = [update.delta for update in updates]
    if not cohort:
        raise TrainingError(_NOBODY)
    return cohort[0], torch.stack([tree.flatten(delta) for delta in cohort])


AnyAggregator = Annotated[
    Mean
    | SparsityWeighted
    | SvdRedistribute
    | ProductExact
    | Stack
    | CoordinateMedian
    | TrimmedMean
    | Krum
    | NormBound,
    Field(discriminator="kind"),
]
AGGREGATORS: dict[str, type[Aggregator]] = {cls.kind: cls for cls in get_args(get_args(AnyAggregator)[0])}

"""The ``Sparsifier`` slot and its values: which entries of a tree are sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedlora.core.component import MODEL_CONFIG, Count, Positive, Share, dataclass
from fedlora.core.errors import ConfigError, shown
from fedlora.core.schema import Leaf
from fedlora.core.slots import kind_of
from fedlora.core.tree import Tree, as_vector, flatten, unflatten
from fedlora.transport.magnitude import FEW, few_largest, largest
from fedlora.transport.positions import random_positions

_PIECE = 1 << 16  # entries that are dropped together, so that they stay in the cache


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Quota:
    """Separate densities for LoRA's factors and the head; a part set to None is treated with the rest.

    Args:
        A: density of all ``A`` together.
        B: density of all ``B`` together.
        head: density of the task head.
    """

    A: Share | None = None
    B: Share | None = None
    head: Share | None = None

    def shares(self) -> dict[str, float]:
        """The densities that are set."""
        return {name: share for name, share in (("A", self.A), ("B", self.B), ("head", self.head)) if share is not None}


class Facts(NamedTuple):
    """Properties of a sparsifier with its settings.

    Attributes:
        unbiased: the expectation of what is sent, over the sparsifier's random draws, is the input.
        reads_values: the choice of entries depends on the values, so positions differ between clients and leak
            information about their data.
        drops: entries may be dropped.
        slices_ranks: whole ranks of LoRA's factors are dropped, and nothing else.
    """

    unbiased: bool
    reads_values: bool
    drops: bool = True
    slices_ranks: bool = False


class Sparsifier(ABC):
    """Chooses the entries of a tree that are sent; all others arrive as zero.

    A sparsifier is a pure function: the same tree, round and seed give the same result, and the input is not modified.
    """

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Its properties."""

    @abstractmethod
    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        """The masks of kept entries, for the tensors that are not kept whole.

        Args:
            tree: float32 tensors of any shape.
            schema: the leaf of every name in ``tree``; read by quotas and by rank slices.
            round: 0-based number of the round.
            seed: used only by random sparsifiers.

        Returns:
            bool tensors with the shapes of ``tree``; tensors without a mask are kept whole.
        """

    def gain(self, kept: Tensor) -> float:
        """The factor that kept entries are multiplied by, for a tensor whose mask is ``kept``."""
        return 1.0

    def mask(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int = 0) -> dict[str, Tensor]:
        """``choose``, with an all-True mask for every tensor that is kept whole."""
        chosen = self.choose(tree, schema, round, seed)
        whole = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in tree.items() if name not in chosen}
        return {name: chosen[name] if name in chosen else whole[name] for name in tree}

    def __call__(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int = 0) -> Tree:
        """The tree with dropped entries set to zero; same names, shapes and dtypes; arguments are those of ``choose``.

        Returns:
            A new dict. Tensors that lose no entries may be those of ``tree`` itself.

        Raises:
            KeyError: the head has a quota and ``schema`` lacks a name of ``tree``.
            ConfigError: ``choose`` of a user's own class returned something else than masks of ``tree``.
        """
        if not self.facts.drops:
            return dict(tree)
        vector = flatten(tree).detach()
        thinned = unflatten(vector, tree)  # one vector, which `choose` and `pack` take as it is
        masks = self.choose(thinned, schema, round, seed)
        _check_masks(self, masks, tree)
        for name, kept in masks.items():
            if (gain := self.gain(kept)) != 1:
                thinned[name] *= gain
        bits = vector.view(torch.int32)  # not the floats: -1 * 0 is a negative zero, inf * 0 is NaN
        if masks and masks.keys() == tree.keys():
            together = as_vector({name: masks[name] for name in tree}).to(bits.device)
            for part, kept in zip(torch.split(bits, _PIECE), torch.split(together, _PIECE), strict=True):
                part *= kept  # the processor copies a mask to integers first
        else:
            parts = unflatten(bits, tree)
            for name, kept in masks.items():
                parts[name] *= kept.to(bits.device)
        return thinned


def _check_masks(sparsifier: Sparsifier, masks: Mapping[str, Tensor], tree: Tree) -> None:
    """Rejects what is no mask of the tensors; one of another shape would be broadcast, or read in another order."""
    if not isinstance(masks, Mapping):
        problem = f"returned {shown(masks)}"
    elif wrong := [n for n, m in masks.items() if n not in tree or not isinstance(m, Tensor) or m.dtype != torch.bool]:
        problem = f"returned for {wrong[0]!r} {shown(masks[wrong[0]])}"
    elif wrong := [name for name, mask in masks.items() if mask.shape != tree[name].shape]:
        name = wrong[0]
        problem = f"returned for {name!r} a mask of shape {tuple(masks[name].shape)}, not {tuple(tree[name].shape)}"
    else:
        return
    raise ConfigError(
        f"choose of the sparsifier {kind_of(sparsifier)!r} {problem}, but bool tensors with the names and shapes of "
        "the given ones were expected: correct its class"
    )


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Dense(Sparsifier):
    """Keeps everything.

    >>> Dense()({"a": torch.tensor([1.0, -2.0])}, {}, round=0)
    {'a': tensor([ 1., -2.])}
    """

    kind: Literal["dense"] = "dense"

    @property
    def facts(self) -> Facts:
        """Nothing is lost."""
        return Facts(unbiased=True, reads_values=False, drops=False)

    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        return {}


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class TopK(Sparsifier):
    """Keeps the entries of largest magnitude.

    Exactly ``k = int(P * density * decay ** (round // decay_every))`` of ``P`` entries are kept; ties go to the entry
    that comes first in the tree. ``P`` counts all entries together (``scope="global"``) or those of one tensor
    (``scope="tensor"``, where each tensor has its own ``k``, at least 1). Frozen factors do not count.

    FLASC uses one threshold over every ``A``, every ``B`` and the head. Its script for heterogeneous devices keeps the
    head whole on the downlink: ``quota=Quota(head=1)``. Entries under a quota are ranked among themselves, at the
    quota's density, which does not decay; ``P`` counts the rest.

    Args:
        density: fraction kept in round 0.
        scope: whether one threshold applies to all tensors, or each has its own.
        quota: separate densities for ``A``, ``B`` and ``head``.
        decay: factor by which the density is multiplied every ``decay_every`` rounds.
        decay_every: number of rounds between two decays.

    >>> TopK(density=0.5)({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([3.0, 2.0])}, {}, round=0)
    {'a': tensor([ 0., -4.]), 'b': tensor([3., 0.])}

    References:
        Kuo et al., "Federated LoRA with Sparse Communication" (FLASC), arXiv 2406.05233, and its official code.
    """

    kind: Literal["top_k"] = "top_k"
    density: Share
    scope: Literal["global", "tensor"] = "global"
    quota: Quota = Quota()
    decay: Share = 1.0
    decay_every: Count = 1

    @property
    def facts(self) -> Facts:
        """Only the largest entries are kept, so small ones never arrive."""
        return Facts(unbiased=False, reads_values=True)

    def density_at(self, round: int) -> float:
        """``density * decay ** (round // decay_every)``."""
        return float(self.density * self.decay ** (round // self.decay_every))

    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        chosen: dict[str, Tensor] = {}
        for density, names in _by_quota(tree, schema, self.quota, self.density_at(round)):
            bucket = {name: tree[name] for name in names}
            if density == 1.0:
                continue
            if self.scope == "global":
                vector = as_vector(bucket)
                chosen |= unflatten(largest(vector, int(len(vector) * density)), bucket)
            else:
                chosen |= {
                    name: largest(value.reshape(-1), max(1, int(value.numel() * density))).view(value.shape)
                    for name, value in bucket.items()
                    if value.numel()
                }
        return chosen

    def __call__(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int = 0) -> Tree:
        """That of every sparsifier, without masks where one threshold leaves few entries of the whole tree."""
        density = self.density_at(round)
        apart = self.quota.shares() or any(leaf.role == "frozen" for leaf in schema.values())
        if density < FEW and self.scope == "global" and not apart:
            vector = flatten(tree).detach()
            if (places := few_largest(vector, int(len(vector) * density))) is not None:
                bits = vector.view(torch.int32).numpy()
                kept = bits[places]
                bits.fill(0)
                bits[places] = kept
                return unflatten(vector, tree)
        return super().__call__(tree, schema, round, seed)


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Threshold(Sparsifier):
    """Keeps the entries whose magnitude is ``value`` or more.

    Their number depends on training, so the bytes of a round are not known in advance.

    Args:
        value: smallest magnitude that is sent.

    >>> Threshold(value=2)({"a": torch.tensor([1.0, -4.0, 2.0])}, {}, round=0)
    {'a': tensor([ 0., -4.,  2.])}
    """

    kind: Literal["threshold"] = "threshold"
    value: Positive

    @property
    def facts(self) -> Facts:
        """Small entries never arrive."""
        return Facts(unbiased=False, reads_values=True)

    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        """True where the magnitude is large enough or NaN, so that ``pack`` sees a NaN and refuses it."""
        return {name: ~(value.detach().abs() < self.value) for name, value in tree.items()}


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class RandomK(Sparsifier):
    """Keeps ``k = max(1, int(n * density))`` random entries of each tensor's ``n``, drawn from a shared seed.

    The seed is sent instead of the positions, so the support says nothing about the values. Every client uses a new
    seed in every round.

    Args:
        density: fraction kept of each tensor.
        quota: separate densities for ``A``, ``B`` and ``head``.
        rescale: whether kept entries are multiplied by ``n / k``, which makes the result unbiased; not for a
            downlink, whose entries are used as they arrive.

    >>> kept = RandomK(density=0.5)({"a": torch.ones(6)}, {}, round=0)["a"]
    >>> sorted(kept.tolist())
    [0.0, 0.0, 0.0, 2.0, 2.0, 2.0]

    References:
        Stich et al., "Sparsified SGD with Memory", arXiv 1809.07599, ``rand_k``.
    """

    kind: Literal["random_k"] = "random_k"
    density: Share
    quota: Quota = Quota()
    rescale: bool = True

    @property
    def facts(self) -> Facts:
        """Unbiased if rescaled."""
        return Facts(unbiased=self.rescale, reads_values=False)

    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        """True at the positions drawn from the seed and the tensor's name."""
        chosen: dict[str, Tensor] = {}
        for name, count in self.counts(tree, schema).items():
            kept = np.zeros(tree[name].numel(), np.bool_)
            kept[random_positions(seed, name, kept.size, count)] = True
            chosen[name] = torch.from_numpy(kept).view(tree[name].shape)
        return chosen

    def counts(self, tree: Tree, schema: Mapping[str, Leaf]) -> dict[str, int]:
        """The number of kept entries, for the tensors that are not kept whole."""
        counts = {}
        for density, names in _by_quota(tree, schema, self.quota, self.density):
            for name in names if density < 1 else ():
                size = tree[name].numel()
                counts[name] = min(size, max(1, int(size * density)))
        return counts

    def gain(self, kept: Tensor) -> float:
        """``n / k`` if rescaled."""
        return kept.numel() / int(torch.count_nonzero(kept)) if self.rescale and kept.numel() else 1.0


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class RankSlice(Sparsifier):
    """Keeps ``rank`` rows of every ``A`` and columns of every ``B``, and everything that is not a LoRA factor.

    A client whose ``A`` and ``B`` are zero beyond a rank stays at that rank: where both factors are zero, so are both
    gradients. FLASC's code and HetLoRA give weak devices a smaller adapter this way.

    Args:
        rank: number of rows of ``A`` and columns of ``B`` that are sent.
        by: ``order`` keeps the first ranks; ``norm`` keeps those of largest norm, of ``A`` and ``B`` separately, as
            FLASC's code does under the name ``rankl1``; ranks of which one factor is sent then keep learning.

    >>> from fedlora.core.schema import factor_leaf
    >>> factors = {"A": torch.ones(2, 3), "B": torch.ones(2, 2)}
    >>> kept = RankSlice(rank=1)(factors, {"A": factor_leaf("A"), "B": factor_leaf("B")}, round=0)
    >>> kept["A"].tolist(), kept["B"].tolist()
    ([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    """

    kind: Literal["rank_slice"] = "rank_slice"
    rank: Count
    by: Literal["order", "norm"] = "order"

    @property
    def facts(self) -> Facts:
        """With ``by="order"``, the same entries are always kept."""
        return Facts(unbiased=False, reads_values=self.by == "norm", slices_ranks=True)

    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        chosen: dict[str, Tensor] = {}
        for name, value in tree.items():
            axis = schema[name].rank_axis
            if axis is not None and value.ndim > 1:
                rows = value.transpose(0, axis)
                ranks = torch.arange(min(self.rank, len(rows)))
                if self.by == "norm":
                    ranks = rows.flatten(1).norm(dim=1).sort(descending=True, stable=True).indices[: self.rank]
                kept = torch.zeros(rows.shape, dtype=torch.bool)
                kept[ranks] = True
                chosen[name] = kept.transpose(0, axis)
        return chosen


def _by_quota(tree: Tree, schema: Mapping[str, Leaf], quota: Quota, density: float) -> list[tuple[float, list[str]]]:
    """Each quota's density, and ``density`` for the rest, with the names it applies to, in the tree's order.

    Frozen tensors are kept whole, outside every density: they do not change, and zeros cost nothing.
    """
    shares = quota.shares()
    buckets: dict[str, list[str]] = {}
    for name in tree:
        if name in schema and schema[name].role == "frozen":
            continue
        named = _quota_of(schema[name]) if shares else ""
        buckets.setdefault(named if named in shares else "", []).append(name)
    return [(shares.get(named, density), names) for named, names in buckets.items()]


def _quota_of(leaf: Leaf) -> str:
    """The quota that a tensor falls under."""
    return "head" if leaf.group == "head" else leaf.factor

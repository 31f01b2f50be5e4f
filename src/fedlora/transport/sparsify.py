"""Which entries of a tree travel: the ``Sparsifier`` slot and its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.component import MODEL_CONFIG, Count, Positive, Share, dataclass
from fedlora.core.schema import Leaf
from fedlora.core.tree import Tree, flatten, unflatten
from fedlora.transport.positions import random_positions


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Quota:
    """Densities of their own for LoRA's factors and the head; what is None counts with the rest.

    Args:
        A: of all ``A`` together.
        B: of all ``B`` together.
        head: of the task head.
    """

    A: Share | None = None
    B: Share | None = None
    head: Share | None = None

    def shares(self) -> dict[str, float]:
        """Those that are set."""
        return {name: share for name, share in (("A", self.A), ("B", self.B), ("head", self.head)) if share is not None}


class Facts(NamedTuple):
    """What is true of a sparsifier with its settings.

    Attributes:
        unbiased: the mean of what is sent, over its own random draws, is the input.
        reads_values: which entries are kept depends on the values, so positions differ between clients and reveal
            something about them.
        drops: entries may be left out.
        slices_ranks: what is left out are whole ranks of LoRA's factors.
    """

    unbiased: bool
    reads_values: bool
    drops: bool = True
    slices_ranks: bool = False


class Sparsifier(ABC):
    """What is kept of a tree before it is sent; everything else arrives as zero.

    A sparsifier is a pure function: the same tree, round and seed give the same result, and the input is not modified.
    """

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What is true of it."""

    @abstractmethod
    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        """Which entries are kept of those tensors that are not kept whole.

        Args:
            tree: float32 tensors of any shape.
            schema: what every name in ``tree`` is; read by quotas and by slices of ranks.
            round: 0-based number of the round.
            seed: read only by sparsifiers that draw.

        Returns:
            bool tensors in the shapes of ``tree``; names that are missing are kept whole.
        """

    def gain(self, kept: Tensor) -> float:
        """What the kept entries of a tensor are multiplied with, of which ``kept`` is the mask."""
        return 1.0

    def mask(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int = 0) -> dict[str, Tensor]:
        """``choose`` with a mask of True for every tensor that is kept whole."""
        chosen = self.choose(tree, schema, round, seed)
        whole = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in tree.items() if name not in chosen}
        return {name: chosen[name] if name in chosen else whole[name] for name in tree}

    def __call__(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int = 0) -> Tree:
        """The tree with zeros where nothing is kept: same names, shapes, dtypes; arguments are those of ``choose``.

        Returns:
            A new dict. Tensors of which nothing is dropped may be those of ``tree`` itself.

        Raises:
            KeyError: there is a quota of the head and ``schema`` lacks a name of ``tree``.
        """
        thinned = dict(tree)
        for name, kept in self.choose(tree, schema, round, seed).items():
            gain = self.gain(kept)
            value = tree[name].detach()
            # `where`, not a product: -1 * 0 is a negative zero, inf * 0 is NaN
            thinned[name] = torch.where(kept, value if gain == 1 else value * gain, 0.0)
        return thinned


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

    ``k = int(P * density * decay ** (round // decay_every))`` of ``P`` entries are kept, exactly; among equal
    magnitudes the first in the order of the tree. ``P`` counts all entries together (``scope="global"``) or those of
    one tensor (``scope="tensor"``, each tensor with its own ``k``).

    FLASC has one threshold over every ``A``, every ``B`` and the head. Its script for unequal devices keeps the head
    whole on the way down: ``quota=Quota(head=1)``. Entries that a quota names are ranked among themselves, at the
    quota's own density, which does not decay; ``P`` counts the rest.

    Args:
        density: fraction kept in round 0.
        scope: whether one threshold holds for all tensors, or each has its own.
        quota: densities of their own for ``A``, ``B`` and ``head``.
        decay: factor on the density every ``decay_every`` rounds.
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
        """The largest are kept, so small entries never arrive."""
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
                chosen |= unflatten(_largest(flatten(bucket), density), bucket)
            else:
                chosen |= {
                    name: _largest(value.reshape(-1), density).view(value.shape) for name, value in bucket.items()
                }
        return chosen


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Threshold(Sparsifier):
    """Keeps the entries whose magnitude is ``value`` or more.

    How many these are is for training to say, so the bytes of a round are not known before.

    Args:
        value: smallest magnitude that travels.

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
        """True where the magnitude is large enough, and where it is NaN, so that ``pack`` sees and refuses it."""
        return {name: ~(value.detach().abs() < self.value) for name, value in tree.items()}


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class RandomK(Sparsifier):
    """Keeps ``k = max(1, int(n * density))`` of each tensor's ``n`` entries, drawn from a seed that both ends share.

    The seed travels in place of the positions. Which entries are kept says nothing about the values. Each turn of a
    client has a seed of its own.

    Args:
        density: fraction kept of each tensor.
        quota: densities of their own for ``A``, ``B`` and ``head``.
        rescale: whether kept entries are multiplied with ``n / k``, so that the mean over all draws is the input; not
            for a downlink, whose entries are used as they arrive.

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
        """Unbiased where it is rescaled."""
        return Facts(unbiased=self.rescale, reads_values=False)

    def choose(self, tree: Tree, schema: Mapping[str, Leaf], round: int, seed: int) -> dict[str, Tensor]:
        """True at the places that the seed and a tensor's name draw."""
        chosen: dict[str, Tensor] = {}
        for name, count in self.counts(tree, schema).items():
            kept = np.zeros(tree[name].numel(), np.bool_)
            kept[random_positions(seed, name, kept.size, count)] = True
            chosen[name] = torch.from_numpy(kept).view(tree[name].shape)
        return chosen

    def counts(self, tree: Tree, schema: Mapping[str, Leaf]) -> dict[str, int]:
        """How many entries are kept of those tensors that are not kept whole."""
        counts = {}
        for density, names in _by_quota(tree, schema, self.quota, self.density):
            for name in names if density < 1 else ():
                size = tree[name].numel()
                counts[name] = min(size, max(1, int(size * density)))
        return counts

    def gain(self, kept: Tensor) -> float:
        """``n / k`` where it is rescaled."""
        return kept.numel() / int(torch.count_nonzero(kept)) if self.rescale and kept.numel() else 1.0


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class RankSlice(Sparsifier):
    """Keeps ``rank`` rows of every ``A`` and columns of every ``B``, and all that is no LoRA factor.

    A client that gets ``A`` and ``B`` with zeros beyond a rank stays at that rank: where both factors are zero, so are
    both gradients. FLASC's code and HetLoRA give weak devices a smaller adapter this way.

    Args:
        rank: rows of ``A`` and columns of ``B`` that travel.
        by: ``order`` keeps the first ones; ``norm`` the longest, of ``A`` and of ``B`` each for itself, as FLASC's code
            does under the name ``rankl1``. Then ranks of which one factor arrives go on learning.

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
        """By order the same entries are kept always."""
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
    """Densities and the names that they hold for: each quota's, and ``density`` for the rest; in the tree's order."""
    shares = quota.shares()
    buckets: dict[str, list[str]] = {}
    for name in tree:
        named = _quota_of(schema[name]) if shares else ""
        buckets.setdefault(named if named in shares else "", []).append(name)
    return [(shares.get(named, density), names) for named, names in buckets.items()]


def _quota_of(leaf: Leaf) -> str:
    """The quota that would name a tensor."""
    return "head" if leaf.group == "head" else leaf.factor


def _largest(vector: Tensor, density: float) -> Tensor:
    """A bool vector that is true for the ``int(P * density)`` largest magnitudes, the first among equals."""
    # without the sign, the bits of floats are ordered like their magnitudes, NaN above all; integers partition faster
    magnitude: NDArray[np.int32] = vector.detach().float().cpu().numpy().view(np.int32) & 0x7FFFFFFF
    total = magnitude.size
    k = int(total * density)
    if k == 0:
        return torch.zeros(total, dtype=torch.bool)
    threshold = np.partition(magnitude, total - k)[total - k]
    kept = magnitude > threshold
    missing = k - int(np.count_nonzero(kept))
    kept[np.flatnonzero(magnitude == threshold)[:missing]] = True
    return torch.from_numpy(kept)

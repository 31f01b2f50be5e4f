"""Which entries of a tree travel: the ``Sparsifier`` slot and its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedlora.component import STRICT
from fedlora.tree import Tree, flatten, unflatten


class Facts(NamedTuple):
    """What is true of a sparsifier whatever its settings.

    Attributes:
        unbiased: the mean of what is sent, over its own random draws, is the input.
        reads_values: which entries are kept depends on the values, so positions differ between clients and reveal
            something about them.
    """

    unbiased: bool
    reads_values: bool


class Sparsifier(ABC):
    """What is kept of a tree before it is sent; everything else arrives as zero.

    A sparsifier is a pure function: the same tree, round and generator state give the same result, and the input is
    not modified.
    """

    facts: ClassVar[Facts]

    @abstractmethod
    def density_at(self, round: int) -> float:
        """The fraction of entries that is kept in a round (0-based), of those that are considered at all."""

    @abstractmethod
    def mask(
        self, tree: Tree, groups: Mapping[str, str], round: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Which entries are kept: bool tensors with ``tree``'s names and shapes.

        Args:
            tree: float32 tensors of any shape.
            groups: the group (``adapter``, ``head``) of every name in ``tree``.
            round: 0-based number of the round.
            generator: the source of randomness, read only by sparsifiers that draw.
        """

    @abstractmethod
    def __call__(
        self, tree: Tree, groups: Mapping[str, str], round: int, generator: torch.Generator | None = None
    ) -> Tree:
        """The tree with zeros where nothing is kept: same names, shapes and dtypes.

        Args:
            tree: float32 tensors of any shape; not modified.
            groups: the group (``adapter``, ``head``) of every name in ``tree``.
            round: 0-based number of the round.
            generator: the source of randomness, read only by sparsifiers that draw.

        Returns:
            A new dict. Tensors of which nothing is dropped may be those of ``tree`` itself.
        """


@final
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dense(Sparsifier):
    """Keeps everything.

    >>> Dense()({"a": torch.tensor([1.0, -2.0])}, {"a": "adapter"}, round=0)
    {'a': tensor([ 1., -2.])}
    """

    kind: Literal["dense"] = "dense"
    facts: ClassVar[Facts] = Facts(unbiased=True, reads_values=False)

    def density_at(self, round: int) -> float:
        """Always 1."""
        return 1.0

    def mask(
        self, tree: Tree, groups: Mapping[str, str], round: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """True everywhere."""
        return {name: torch.ones(value.shape, dtype=torch.bool) for name, value in tree.items()}

    def __call__(
        self, tree: Tree, groups: Mapping[str, str], round: int, generator: torch.Generator | None = None
    ) -> Tree:
        """The tree itself, in a new dict."""
        return dict(tree)


@final
@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopK(Sparsifier):
    """Keeps the entries of largest magnitude.

    ``k = int(P * density * decay ** (round // decay_every))`` of ``P`` entries are kept, exactly; among equal
    magnitudes the first in the order of the tree. ``P`` counts all entries together (``scope="global"``) or those of
    one tensor (``scope="tensor"``, each tensor with its own ``k``).

    FLASC is ``scope="global", head="included"``: one threshold over every ``A``, every ``B`` and the head. Its script
    for unequal devices keeps the head whole on the way down: ``head="dense"``, where ``P`` counts the rest.

    Args:
        density: fraction kept in round 0.
        scope: whether one threshold holds for all tensors, or each has its own.
        head: whether entries of the group ``head`` compete with the others, or are all kept.
        decay: factor on the density every ``decay_every`` rounds.
        decay_every: number of rounds between two decays.

    >>> TopK(density=0.5)({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([3.0, 2.0])}, {}, round=0)
    {'a': tensor([ 0., -4.]), 'b': tensor([3., 0.])}

    References:
        Kuo et al., "Federated LoRA with Sparse Communication" (FLASC), arXiv 2406.05233, and its official code.
    """

    kind: Literal["top_k"] = "top_k"
    density: Annotated[float, Field(gt=0, le=1)]
    scope: Literal["global", "tensor"] = "global"
    head: Literal["included", "dense"] = "included"
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    decay_every: Annotated[int, Field(ge=1)] = 1
    facts: ClassVar[Facts] = Facts(unbiased=False, reads_values=True)

    def density_at(self, round: int) -> float:
        """``density * decay ** (round // decay_every)``."""
        return float(self.density * self.decay ** (round // self.decay_every))

    def mask(
        self, tree: Tree, groups: Mapping[str, str], round: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """True for the ``k`` largest magnitudes, and for all of the head where ``head="dense"``.

        Raises:
            KeyError: ``head="dense"`` and ``groups`` lacks a name of ``tree``.
        """
        chosen = self._choose(tree, groups, round)
        whole = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in tree.items() if name not in chosen}
        return {name: chosen[name] if name in chosen else whole[name] for name in tree}

    def __call__(
        self, tree: Tree, groups: Mapping[str, str], round: int, generator: torch.Generator | None = None
    ) -> Tree:
        """The tree with zeros outside ``mask``.

        Raises:
            KeyError: ``head="dense"`` and ``groups`` lacks a name of ``tree``.
        """
        chosen = self._choose(tree, groups, round)
        # `where`, not a product: -1 * 0 is a negative zero, inf * 0 is NaN
        return {
            name: torch.where(chosen[name], value.detach(), 0.0) if name in chosen else value
            for name, value in tree.items()
        }

    def _choose(self, tree: Tree, groups: Mapping[str, str], round: int) -> dict[str, Tensor]:
        """The masks of those tensors that are not kept whole."""
        density = self.density_at(round)
        if density == 1.0:
            return {}
        rest = {name: value for name, value in tree.items() if self.head == "included" or groups[name] != "head"}
        if self.scope == "global":
            return unflatten(_largest(flatten(rest), density), rest) if rest else {}
        return {name: _largest(value.reshape(-1), density).view(value.shape) for name, value in rest.items()}


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

"""Permanent pruning: the baselines that FLASC is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from fedlora.core.component import MODEL_CONFIG, Count, Share, dataclass
from fedlora.core.schema import Schema
from fedlora.core.tree import Tree
from fedlora.transport import Quota, TopK


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Prune:
    """The server permanently sets all but the largest parameters to zero, and clients train the remaining ones.

    After ``first`` rounds, the ``int(P * density)`` entries of largest magnitude out of ``P`` trained ones are kept,
    and then ``decay`` times as many every ``every`` rounds. Zeros cost almost no communication, in either direction.

    Args:
        density: share kept at the first pruning.
        first: number of dense rounds before the first pruning; at least one, since ``B`` starts at zero.
        every: rounds between two prunings; None prunes once.
        decay: factor by which the density is multiplied at each later pruning.
        scope: whether one threshold applies to all tensors, or each has its own. After few rounds ``B`` is far smaller
            than ``A``, so that ``global`` prunes all of it, and nothing can be learnt.
        quota: separate densities for ``A``, ``B`` and the head, which do not decay.
    """

    density: Share
    first: Count = 1
    every: Count | None = None
    decay: Share = 1.0
    scope: Literal["global", "tensor"] = "tensor"
    quota: Quota = Quota()

    def density_after(self, steps: int) -> float | None:
        """The density kept after ``steps`` rounds; None if nothing is pruned at that point."""
        if steps == self.first:
            return self.density
        if self.every and steps > self.first and (steps - self.first) % self.every == 0:
            return float(self.density * self.decay ** ((steps - self.first) // self.every))
        return None

    def kept(self, params: Tree, steps: int) -> Tree:
        """Masks of the remaining entries of a round's parameters; empty before the first pruning."""
        return {name: value != 0 for name, value in params.items()} if steps >= self.first else {}

    def apply(
        self, params: Tree, slots: Mapping[str, Tree], schema: Schema, steps: int
    ) -> tuple[Tree, Mapping[str, Tree]]:
        """Parameters and the server optimiser's state, pruned if this round is due for pruning."""
        density = self.density_after(steps)
        if density is None:
            return params, slots
        kept = TopK(density=density, scope=self.scope, quota=self.quota).mask(params, schema, 0)
        return _masked(params, kept), {slot: _masked(state, kept) for slot, state in slots.items()}


NO_PRUNE = Prune(density=1.0, first=2**62)
"""Pruning that never takes place."""


def _masked(values: Tree, kept: Tree) -> Tree:
    return {name: torch.where(kept[name], value, 0.0) for name, value in values.items()}

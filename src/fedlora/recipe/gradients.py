"""Where the gradients of a client's steps come from, and what a penalty adds to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fedlora.core.schema import Schema
from fedlora.core.state import generator, named_seed
from fedlora.core.tree import Tree
from fedlora.privacy.examples import ExampleNoise

if TYPE_CHECKING:
    from fedlora.tasks.base import Positions


@dataclass(frozen=True)
class Backward:
    """Plain gradients of batches, in passes over all examples.

    Args:
        shuffle: whether each pass takes the examples in a new order.
    """

    shuffle: bool = True
    hides_examples: ClassVar[bool] = False
    """Whether gradients hide what a single example adds, so that nothing else may tell of it."""
    repeatable: ClassVar[bool] = True
    """Whether the same turn can be taken again, draw for draw."""

    def draws(self, turn: int) -> torch.Generator | None:
        """The generator of a turn by its seed; None for the operating system's secure source."""
        return generator(named_seed(turn, "shuffle"))

    def batches(
        self, rows: Positions, num_steps: int, batch_size: int, draws: torch.Generator | None
    ) -> list[Positions]:
        """The examples of each of ``num_steps`` steps; the last batch of a pass may be smaller."""
        batches: list[Positions] = []
        while len(batches) < num_steps:
            passed = rows[torch.randperm(len(rows), generator=draws).numpy()] if self.shuffle else rows
            batches += [passed[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        return batches[:num_steps]

    def gradients(
        self,
        loss_of: Callable[[Positions], Tensor],
        values: list[nn.Parameter],
        chosen: Positions,
        batch_size: int,
        draws: torch.Generator | None,
        penalty: Callable[[], Tensor | float] = float,
    ) -> Tensor:
        """Puts the gradient of a step into ``values``.

        Args:
            loss_of: the mean loss of some examples.
            values: the parameters, without gradients.
            chosen: the batch.
            batch_size: what the configuration says of its size.
            draws: the turn's generator.
            penalty: what is added to the loss; zero under noise, which it would pass by.

        Returns:
            The mean loss, without the penalty.
        """
        loss = loss_of(chosen)
        torch.autograd.backward(loss + penalty())
        return loss.detach()

    def kept(self, start: Tree, schema: Schema) -> Tree:
        """Masks of what may move of the parameters, by name, broadcast to their shapes; empty if all may."""
        return {}


GradientSource = Backward | ExampleNoise
"""Draws the batches of a client's turn, and puts the gradient of each into the parameters; see ``Backward``."""


class Proximal(NamedTuple):
    """FedProx's penalty ``weight / 2 ||x - anchor||^2`` (arXiv 1812.06127, Eq. 2), by its gradient."""

    weight: float
    anchors: list[Tensor]

    def add_to(self, values: list[nn.Parameter]) -> None:
        """Adds the penalty's gradient to those that ``values`` have."""
        with torch.no_grad():
            for value, anchor in zip(values, self.anchors, strict=False):
                if value.grad is not None:
                    value.grad.add_(value - anchor, alpha=self.weight)

"""The source of the gradients in a client's steps, and the penalty added to them."""

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
    """Whether gradients hide the contribution of a single example, so that nothing else may reveal it."""
    repeatable: ClassVar[bool] = True
    """Whether the same local training can be repeated with identical random draws."""

    def draws(self, turn: int) -> torch.Generator | None:
        """The generator for a client's turn, from its seed; None for the operating system's secure source."""
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

    def passes(self, chosen: Positions) -> list[Positions]:
        """The examples of each forward pass of a step over ``chosen``, in their order."""
        return [chosen]

    def gradients(
        self,
        loss_of: Callable[[Positions], Tensor],
        values: list[nn.Parameter],
        chosen: Positions,
        batch_size: int,
        draws: torch.Generator | None,
        penalty: Callable[[], Tensor | float] = float,
    ) -> Tensor:
        """Computes the gradient of a step and stores it in ``values``.

        Args:
            loss_of: computes the mean loss of some examples.
            values: the parameters, without gradients.
            chosen: the batch.
            batch_size: the batch size in the configuration.
            draws: the turn's generator.
            penalty: a term added to the loss; zero under noise, which would not cover it.

        Returns:
            The mean loss, without the penalty.
        """
        loss = loss_of(chosen)
        torch.autograd.backward(loss + penalty())
        return loss.detach()

    def kept(self, start: Tree, schema: Schema) -> Tree:
        """Masks of the trainable entries by parameter name, broadcast to their shapes; empty if all are trainable."""
        return {}


GradientSource = Backward | ExampleNoise
"""Draws the batches of a client's turn and stores the gradient of each in the parameters; see ``Backward``."""


class Proximal(NamedTuple):
    """FedProx's penalty ``weight / 2 ||x - anchor||^2`` (arXiv 1812.06127, Eq. 2), applied through its gradient."""

    weight: float
    anchors: list[Tensor]

    def add_to(self, values: list[nn.Parameter]) -> None:
        """Adds the penalty's gradient to the gradients of ``values``."""
        with torch.no_grad():
            for value, anchor in zip(values, self.anchors, strict=False):
                if value.grad is not None:
                    value.grad.add_(value - anchor, alpha=self.weight)

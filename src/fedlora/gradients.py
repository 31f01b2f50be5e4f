"""Where the gradients of a client's steps come from: the batch, or each of its examples with clip and noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fedlora.schema import Schema
from fedlora.state import generator, named_seed
from fedlora.tree import Tree

if TYPE_CHECKING:
    from fedlora.tasks.base import Rows


class GradientSource(ABC):
    """Draws the batches of a client's turn, and puts the gradient of each into the parameters."""

    hides_examples: ClassVar[bool] = False
    """Whether gradients hide what a single example adds, so that nothing else may tell of it."""

    @property
    def repeatable(self) -> bool:
        """Whether the same turn can be taken again, draw for draw."""
        return True

    @abstractmethod
    def draws(self, turn: int) -> torch.Generator | None:
        """The generator of a turn by its seed; None for the operating system's secure source."""

    @abstractmethod
    def batches(self, rows: Rows, num_steps: int, batch_size: int, draws: torch.Generator | None) -> list[Rows]:
        """The examples of each of ``num_steps`` steps."""

    @abstractmethod
    def gradients(
        self,
        loss_of: Callable[[Rows], Tensor],
        values: list[nn.Parameter],
        chosen: Rows,
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

    def kept(self, start: Tree, schema: Schema) -> Tree:
        """Masks of what may move of the parameters, by name, broadcast to their shapes; empty if all may."""
        return {}


@dataclass(frozen=True)
class Backward(GradientSource):
    """Plain gradients, in passes over all examples.

    Args:
        shuffle: whether each pass takes the examples in a new order.
    """

    shuffle: bool = True

    def draws(self, turn: int) -> torch.Generator:
        """See ``GradientSource.draws``."""
        return generator(named_seed(turn, "shuffle"))

    def batches(self, rows: Rows, num_steps: int, batch_size: int, draws: torch.Generator | None) -> list[Rows]:
        """See ``GradientSource.batches``; the last batch of a pass may be smaller."""
        batches: list[Rows] = []
        while len(batches) < num_steps:
            passed = rows[torch.randperm(len(rows), generator=draws).numpy()] if self.shuffle else rows
            batches += [passed[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        return batches[:num_steps]

    def gradients(
        self,
        loss_of: Callable[[Rows], Tensor],
        values: list[nn.Parameter],
        chosen: Rows,
        batch_size: int,
        draws: torch.Generator | None,
        penalty: Callable[[], Tensor | float] = float,
    ) -> Tensor:
        """See ``GradientSource.gradients``."""
        loss = loss_of(chosen)
        torch.autograd.backward(loss + penalty())
        return loss.detach()


class Proximal(NamedTuple):
    """FedProx's penalty ``weight / 2 ||x - x_start||^2`` (arXiv 1812.06127, Eq. 2), by its gradient.

    Args:
        weight: mu.
        anchors: ``x_start``, one for each parameter; none where the weight is zero.
    """

    weight: float
    anchors: list[Tensor]

    @classmethod
    def of(cls, weight: float, start: Tree, parameters: Mapping[str, nn.Parameter]) -> Proximal:
        """The penalty on leaving ``start``."""
        return cls(weight, [start[name].to(value.device) for name, value in parameters.items() if weight])

    def add_to(self, values: list[nn.Parameter]) -> None:
        """Adds the penalty's gradient to those that ``values`` have."""
        with torch.no_grad():
            for value, anchor in zip(values, self.anchors, strict=False):
                if value.grad is not None:
                    value.grad.add_(value - anchor, alpha=self.weight)

"""The source of the gradients in a client's steps, and the penalty added to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fedlora.core.errors import TrainingError
from fedlora.core.schema import Schema
from fedlora.core.state import generator, named_seed
from fedlora.core.tree import Tree
from fedlora.privacy.examples import ExampleNoise

if TYPE_CHECKING:
    from fedlora.tasks.base import Batch, Positions


class Losses:
    """Computes the mean losses of successive batches.

    Args:
        loss: the mean loss of a batch.
        num_terms: the number of terms of that mean.
        batches: the batches, in the order in which a gradient source passes them.
    """

    def __init__(
        self, loss: Callable[[Batch], Tensor], num_terms: Callable[[Batch], int], batches: Iterator[Batch]
    ) -> None:
        self._loss, self._num_terms, self._batches = loss, num_terms, batches
        self._latest: Batch = {}

    @property
    def terms(self) -> int:
        """The number of terms of the latest mean."""
        return self._num_terms(self._latest)

    def __call__(self, chosen: Positions) -> Tensor:
        """The mean loss of the next batch, that of the examples ``chosen``."""
        self._latest = next(self._batches)
        return self._loss(self._latest)


@dataclass(frozen=True)
class Passes(ABC):
    """Plain gradients of batches, which are drawn in passes over all examples.

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

    @abstractmethod
    def passes(self, chosen: Positions) -> list[Positions]:
        """The examples of each forward pass of a step over ``chosen``, in their order."""

    @abstractmethod
    def gradients(
        self,
        loss_of: Losses,
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

    def kept(self, start: Tree, schema: Schema) -> Tree:
        """Masks of the trainable entries by parameter name, broadcast to their shapes; empty if all are trainable."""
        return {}


@dataclass(frozen=True)
class Backward(Passes):
    """The gradient of a whole batch at once."""

    def passes(self, chosen: Positions) -> list[Positions]:
        return [chosen]

    def gradients(
        self,
        loss_of: Losses,
        values: list[nn.Parameter],
        chosen: Positions,
        batch_size: int,
        draws: torch.Generator | None,
        penalty: Callable[[], Tensor | float] = float,
    ) -> Tensor:
        loss = loss_of(chosen)
        torch.autograd.backward(loss + penalty())
        return loss.detach()


@dataclass(frozen=True)
class Accumulated(Passes):
    """Gradients of batches in several passes, each over a part of the batch, whose activations alone are in memory.

    The sum of a part's losses is differentiated, and the gradients of all parts are divided by the number of terms of
    the whole batch (examples, tokens), so that they are those of its mean loss whatever the parts' sizes.

    Args:
        parts: the number of passes over a batch of ``size`` examples.
        size: the batch size in the configuration.
    """

    parts: int = 1
    size: int = 1

    def passes(self, chosen: Positions) -> list[Positions]:
        most = -(-self.size // self.parts)
        return [chosen[first : first + most] for first in range(0, len(chosen), most)]

    def gradients(
        self,
        loss_of: Losses,
        values: list[nn.Parameter],
        chosen: Positions,
        batch_size: int,
        draws: torch.Generator | None,
        penalty: Callable[[], Tensor | float] = float,
    ) -> Tensor:
        """See ``Passes.gradients``.

        Raises:
            TrainingError: every label of the batch is masked.
        """
        sums: list[Tensor] = []
        terms, masked = 0, None
        for part in self.passes(chosen):
            try:
                loss = loss_of(part)
            except TrainingError as error:  # every label of this part is masked, perhaps none of another
                masked = error
                continue
            count = loss_of.terms
            torch.autograd.backward(loss * count)
            sums.append(loss.detach() * count)
            terms += count
        if masked and not terms:
            raise masked
        for value in values:
            if value.grad is not None:
                value.grad.div_(terms)
        added = penalty()
        if isinstance(added, Tensor):
            torch.autograd.backward(added)
        return torch.stack(sums).sum() / terms


GradientSource = Passes | ExampleNoise
"""Draws the batches of a client's turn and stores the gradient of each in the parameters; see ``Passes``."""


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

"""DP-SGD on clients: example-level privacy against everyone who sees what the client sends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.core.component import MODEL_CONFIG, Fraction, NonNegative, Positive, Whole, dataclass
from fedlora.core.errors import TrainingError
from fedlora.core.schema import Schema
from fedlora.core.state import generator, named_seed
from fedlora.core.tree import Tree
from fedlora.privacy.central import normal, uniform

if TYPE_CHECKING:
    from fedlora.tasks.base import Positions


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class ExampleNoise:
    """A client's steps by DP-SGD (Abadi et al., arXiv 1607.00133, Alg. 1).

    The number of a client's examples is public; their contents are protected. In a step each example takes part with
    probability ``q = batch_size / n``, and the gradient is
    ``(sum_i g_i / max(1, ||g_i|| / C) + N(0, (z C)^2)) / batch_size``. The optimiser's step and the message are
    post-processing and cost no further privacy.

    Here per-example gradients are computed one example at a time: exact for every task, tuning and layer. Where a
    whole batch gives the same, ``client.together`` computes them in one pass.

    Args:
        clip_norm: C, the largest Euclidean norm of an example's gradient.
        noise_multiplier: z.
        delta: the probability that the epsilon bound fails.
        seed: seed of reproducible noise, for tests; without one, noise comes from the operating system's secure source.
    """

    clip_norm: Positive
    noise_multiplier: NonNegative
    delta: Fraction = 1e-5
    seed: Whole | None = None
    hides_examples: ClassVar[bool] = True

    @property
    def repeatable(self) -> bool:
        """See ``Passes.repeatable``."""
        return self.seed is not None

    def draws(self, turn: int) -> torch.Generator | None:
        """See ``Passes.draws``."""
        return None if self.seed is None else generator(named_seed(self.seed, "examples", turn))

    def batches(
        self, rows: Positions, num_steps: int, batch_size: int, draws: torch.Generator | None
    ) -> list[Positions]:
        """A Poisson sample of ``rows`` for each step; it may be empty."""
        chance = min(1.0, batch_size / max(1, len(rows)))
        return [rows[uniform(len(rows), draws) < chance] for _ in range(num_steps)]

    def passes(self, chosen: Positions) -> list[Positions]:
        """See ``Passes.passes``: one example each."""
        return [np.array([row]) for row in chosen]

    def gradients(
        self,
        loss_of: Callable[[Positions], Tensor],
        values: list[nn.Parameter],
        chosen: Positions,
        batch_size: int,
        draws: torch.Generator | None,
        penalty: Callable[[], Tensor | float] = float,
    ) -> Tensor:
        """See ``Passes.gradients``; the loss stays on the client."""
        moving = [value for value in values if value.requires_grad]
        sums, losses = self.clipped(loss_of, moving, chosen)
        self.add_noise(moving, sums, batch_size, draws)
        return torch.stack(losses).mean() if losses else torch.zeros((), device=values[0].device)

    def clipped(
        self, loss_of: Callable[[Positions], Tensor], moving: list[nn.Parameter], chosen: Positions
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The sum of clipped gradients, one example at a time, and the loss of each.

        Args:
            loss_of: as for ``gradients``.
            moving: the parameters that are trained.
            chosen: the examples.
        """
        sums = [torch.zeros_like(value) for value in moving]
        losses = []
        for part in self.passes(chosen):
            try:
                loss = loss_of(part)
            except TrainingError:  # nothing can be learnt of this example; a stop would disclose it
                losses.append(torch.zeros((), device=moving[0].device))
                continue
            found = gradients_of(loss, moving)
            squares = [each.double().square().sum() for each in found if each is not None]
            norm = (
                math.sqrt(sum(torch.stack(squares).cpu().tolist())) if squares else 0.0
            )  # a device is waited for once
            for total, each in zip(sums, found, strict=True):
                # a gradient without a finite norm cannot be clipped
                if each is not None and math.isfinite(norm):
                    total.add_(each, alpha=1.0 / max(1.0, norm / self.clip_norm))
            losses.append(loss.detach())
        return sums, losses

    def clipped_rows(self, found: list[Tensor]) -> list[Tensor]:
        """The sum of clipped gradients, from those of all examples.

        Args:
            found: ``(examples, *shape)`` of each parameter.
        """
        flat = [each.flatten(1) for each in found]
        norms = torch.stack([torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in flat]).norm(dim=0)
        # a gradient without a finite norm cannot be clipped
        finite = norms.isfinite()
        factors = (1.0 / (norms[finite] / self.clip_norm).clamp(min=1.0)).float()
        kept = flat if bool(finite.all()) else [each[finite] for each in flat]
        return [(factors @ each).view(value.shape[1:]) for each, value in zip(kept, found, strict=True)]

    def add_noise(
        self, moving: list[nn.Parameter], sums: list[Tensor], batch_size: int, draws: torch.Generator | None
    ) -> None:
        """Stores the sums of clipped gradients in the parameters, with noise, over the batch size."""
        for value, total in zip(moving, sums, strict=True):
            noise = self.noise_multiplier * self.clip_norm * normal(total.cpu(), draws).to(total.device)
            value.grad = (total + noise) / batch_size

    def kept(self, start: Tree, schema: Schema) -> Tree:
        """See ``Passes.kept``: ranks of which the client received neither factor have no gradient, only noise."""
        masks = {name: torch.ones((), dtype=torch.bool) for name in start}
        for a, b, _ in schema.pairs:
            sent = start[a].any(1) | start[b].any(0)
            masks[a], masks[b] = sent[:, None], sent
        return masks


def gradients_of(loss: Tensor, moving: list[nn.Parameter]) -> list[Tensor | None]:
    """The gradient by each of ``moving``, where there is one; an unlabelled example may have none.

    Gradients pass through the parameters, since hooks on dense weights pass on those of packed values.
    """
    torch.autograd.backward(loss)
    found = [value.grad for value in moving]
    for value in moving:
        value.grad = None
    return found

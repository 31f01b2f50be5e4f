"""Per-example gradients of a whole batch in one pass, where they are those of single examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.client.workspace import Workspace
from fedlora.core.errors import TrainingError
from fedlora.core.schema import Schema
from fedlora.core.state import generator, named_seed
from fedlora.core.tree import Tree
from fedlora.privacy.examples import ExampleNoise, gradients_of
from fedlora.privacy.rows import NoRule, RowGradients
from fedlora.recipe.gradients import GradientSource
from fedlora.recipe.local import Local
from fedlora.tasks.base import Positions
from fedlora.tasks.models.modes import evaluation_mode

AT_ONCE = 32
"""The most examples in one pass, if the batch size is larger."""
MOST_ENTRIES = 2**26
"""The most entries in the gradients of all examples of a pass; they are in memory together."""
PROBED = 4
"""How many examples are compared with single passes before a model's batches are trusted."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "auto": 0.1}
"""How far the gradients of the compared examples may be off, relative to their norm, by number format."""


class Together(NamedTuple):
    """``ExampleNoise`` that computes the gradients of several examples in one pass.

    Args:
        noise: clips and adds noise.
        workspace: the model and its task.
        compute: the number format of forward passes.
        size: the most examples in one pass.
    """

    noise: ExampleNoise
    workspace: Workspace
    compute: str
    size: int

    def passes(self, chosen: Positions) -> list[Positions]:
        """See ``Backward.passes``."""
        return np.array_split(chosen, -(-len(chosen) // self.size)) if len(chosen) else []

    def gradients(
        self,
        loss_of: Callable[[Positions], Tensor],
        values: list[nn.Parameter],
        chosen: Positions,
        batch_size: int,
        draws: torch.Generator | None,
        penalty: Callable[[], Tensor | float] = float,
    ) -> Tensor:
        """See ``Backward.gradients``; the loss stays on the client."""
        moving = [value for value in values if value.requires_grad]
        sums, losses = [torch.zeros_like(value) for value in moving], []
        for part in self.passes(chosen):
            try:
                found, loss = self.by_example(loss_of, moving, part)
                added = self.noise.clipped_rows(found)
            except NoRule:  # its batch is lost, and the others are still to come
                added, single = self.noise.clipped(self.loss_of_one, moving, part)
                loss = torch.stack(single).mean()
            torch._foreach_add_(sums, added)
            losses.append(loss * len(part))
        self.noise.add_noise(moving, sums, batch_size, draws)
        return torch.stack(losses).sum() / len(chosen) if losses else torch.zeros((), device=values[0].device)

    def kept(self, start: Tree, schema: Schema) -> Tree:
        """See ``Backward.kept``."""
        return self.noise.kept(start, schema)

    def loss_of_one(self, chosen: Positions) -> Tensor:
        """The mean loss of examples, whose batch was not prepared ahead."""
        task, model, device = self.workspace.task, self.workspace.model, self.workspace.device
        with self.workspace.autocast(self.compute):
            return task.loss(model, task.batch(chosen, device))

    def by_example(
        self, loss_of: Callable[[Positions], Tensor], moving: list[nn.Parameter], chosen: Positions
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient of each example's mean loss, ``(examples, *shape)`` by parameter, and the mean loss.

        Raises:
            NoRule: a parameter is used in a way for which there is no gradient by rows.
        """
        device = self.workspace.device
        known = self.workspace.task.shares(chosen, device)
        if known is None:
            raise NoRule("the task does not state how a batch's loss divides among examples")
        rows = RowGradients(self.workspace.model, moving)
        try:
            with rows.noted():
                loss = loss_of(chosen)
                torch.autograd.backward(loss)
            found = rows.by_row()
        except TrainingError:  # nothing can be learnt of these examples; a stop would disclose it
            return [value.new_zeros((len(chosen), *value.shape)) for value in moving], torch.zeros((), device=device)
        finally:
            for value in moving:
                value.grad = None
        if len(found[0]) != len(known.owners):
            raise NoRule(f"{len(found[0])} rows passed through the model, and the task states {len(known.owners)}")
        owners = torch.from_numpy(known.owners).to(device)
        scales = torch.from_numpy(known.shares).to(device, torch.float32)
        scales = torch.where(scales > 0, 1.0 / scales, 0.0)
        return [_of_examples(each, owners, scales) for each in found], loss.detach()


def _of_examples(rows: Tensor, owners: Tensor, scales: Tensor) -> Tensor:
    """Sums the gradients of each example's rows, in float32, and scales them."""
    if len(owners) == len(scales):
        result = torch.empty_like(rows)
        result[owners] = rows
    else:
        # one of an infinite row is infinite, and no other is
        result = torch.stack([rows[owners == number].sum(0) for number in range(len(scales))])
    return result.mul_(scales.view(-1, *(1,) * (rows.dim() - 1)))


def together(workspace: Workspace, source: GradientSource, rows: Positions, local: Local) -> GradientSource | Together:
    """``source``, with several examples in a pass where that gives the gradients of single passes.

    A tuning whose parameters have no gradient by rows (see ``RowGradients``), a task that does not state the shares of
    examples in a loss, and a model that mixes rows are found by comparing a few examples with single passes, once for
    each model in memory. The verdict is about the model's structure, so it does not depend on whose examples they are.

    Args:
        workspace: the model, with the parameters that the turn starts from.
        source: of the turn's gradients.
        rows: the client's examples.
        local: its number format, and the batch size: no more examples than a part of that are in memory together.
    """
    if not isinstance(source, ExampleNoise) or len(rows) < 2:
        return source
    moving = {name: value for name, value in workspace.installed.parameters.items() if value.requires_grad}
    most = -(-local.batch_size // local.accumulate)
    size = min(most, AT_ONCE, MOST_ENTRIES // max(1, sum(value.numel() for value in moving.values())))
    if size < 2 or any(getattr(module, "gradient_checkpointing", False) for module in workspace.model.modules()):
        return source
    found = Together(source, workspace, local.compute, size)
    verdicts = workspace.batches_examples
    if frozenset(moving) not in verdicts:
        verdicts[frozenset(moving)] = _agrees(found, moving, rows[: min(size, PROBED)])
    return found if verdicts[frozenset(moving)] else source


def _agrees(source: Together, moving: Mapping[str, nn.Parameter], probed: Positions) -> bool:
    """Whether a batch gives the gradients of single examples, at moved parameters: at zero many gradients are zero."""
    values, model = list(moving.values()), source.workspace.model
    before = [value.detach().clone() for value in values]
    draws = generator(named_seed(0, "probe"))
    try:
        with torch.random.fork_rng(devices=[]), evaluation_mode(model):
            for value in values:
                value.data.add_(0.02 * torch.randn(value.shape, generator=draws).to(value.device))
            source.workspace.installed.refresh()
            found, _ = source.by_example(source.loss_of_one, values, probed)
            single = [_single(source, values, np.array([row])) for row in probed]
    except NoRule:
        return False
    finally:
        torch._foreach_copy_([value.data for value in values], before)
        source.workspace.installed.refresh()
    whole = torch.stack([torch.cat([each[row].flatten() for each in found]) for row in range(len(probed))]).double()
    expected = torch.stack(single).double()
    apart = (whole - expected).nan_to_num(0.0, 0.0, 0.0)  # one that is infinite is infinite in both
    return bool(apart.norm() <= TOLERANCE[source.compute] * expected.nan_to_num(0.0, 0.0, 0.0).norm())


def _single(source: Together, values: list[nn.Parameter], row: Positions) -> Tensor:
    """The gradient of one example, flat; zeros if nothing can be learnt of it."""
    try:
        found = gradients_of(source.loss_of_one(row), values)
    except TrainingError:
        found = [None] * len(values)
    parts = (torch.zeros_like(value) if each is None else each for value, each in zip(values, found, strict=True))
    return torch.cat([part.flatten() for part in parts])

"""Per-example gradients of a batch in one pass: equal to those of single passes, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.toy import LOCAL
from torch import nn

from fedlora.client.together import Together, together
from fedlora.client.workspace import Workspace
from fedlora.core.state import generator
from fedlora.privacy.examples import ExampleNoise
from fedlora.privacy.rows import NoRule, RowGradients
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.rounds.phases import open_phase
from fedlora.tasks.base import Prepared
from fedlora.testing import toy_task
from fedlora.tuning import BitFit, Bottleneck, Full, HeadOnly, LoRA, SparseMask, Tuning

CPU = torch.device("cpu")
NOISE = ExampleNoise(clip_norm=0.3, noise_multiplier=0.0, seed=0)


def opened(task: Prepared, tuning: Tuning) -> Workspace:
    """A model with a tuning, all of whose values have moved."""
    workspace, recipe = Workspace(task, 0, CPU), Recipe(tuning=tuning)
    state, _ = open_phase(workspace, 0, recipe, 0, 0, None)
    workspace.apply_setup(0, recipe, state.setup)
    draws = generator(1)
    for value in workspace.installed.parameters.values():
        value.data.add_(0.05 * torch.randn(value.shape, generator=draws))
    workspace.installed.refresh()
    workspace.model.eval()
    return workspace


def step(workspace: Workspace, source: Any, rows: Any) -> dict[str, torch.Tensor]:
    """The gradients of a step."""
    ahead = workspace.task.batches(source.passes(rows), CPU)
    values = list(workspace.installed.parameters.values())
    source.gradients(lambda _: workspace.task.loss(workspace.model, next(ahead)), values, rows, 8, None)
    found = {name: value.grad for name, value in workspace.installed.parameters.items() if value.grad is not None}
    for value in values:
        value.grad = None
    return found


def check_equal(workspace: Workspace, rows: Any, clip_norm: float = 0.3) -> None:
    """A batch is trusted, and its clipped sum is that of single passes, to 1e-5 of its norm."""
    noise = ExampleNoise(clip_norm=clip_norm, noise_multiplier=0.0, seed=0)
    source = together(workspace, noise, np.arange(6), Local(batch_size=8))
    assert isinstance(source, Together)
    single, whole = step(workspace, noise, rows), step(workspace, source, rows)
    assert single.keys() == whole.keys()
    apart = sum(float((single[name] - whole[name]).double().square().sum()) for name in single) ** 0.5
    assert apart <= 1e-5 * sum(float(value.double().square().sum()) for value in single.values()) ** 0.5


BATCHED = [
    ("bert", LoRA(rank=2)),
    ("bert", LoRA(rank=2, train="B")),
    ("bert", BitFit()),
    ("bert", HeadOnly()),
    ("bert", Bottleneck(width=4)),
    ("gpt2", LoRA(rank=2)),
    ("gpt2", BitFit()),
    ("t5", LoRA(rank=2)),
    ("vit", LoRA(rank=2)),
    ("llama", LoRA(rank=2)),
]
SINGLE = [("bert", Full()), ("t5", Full()), ("bert", SparseMask(density=0.1)), ("mobilenet_v2", LoRA(rank=2))]


@pytest.mark.parametrize(("family", "tuning"), BATCHED, ids=lambda value: str(getattr(value, "kind", value)))
def test_a_batch_gives_the_gradients_of_single_examples(family: str, tuning: Tuning) -> None:
    workspace = opened(toy_task(family), tuning)
    check_equal(workspace, np.array([3, 1, 4, 15, 9, 2, 6]))
    check_equal(workspace, np.arange(19), clip_norm=1e9)


@pytest.mark.parametrize(("family", "tuning"), SINGLE, ids=lambda value: str(getattr(value, "kind", value)))
def test_what_has_no_rule_is_computed_one_example_at_a_time(family: str, tuning: Tuning) -> None:
    workspace = opened(toy_task(family), tuning)
    before = workspace.installed.read()
    assert together(workspace, NOISE, np.arange(6), LOCAL) is NOISE
    assert all(torch.equal(value, before[name]) for name, value in workspace.installed.read().items())

"""Gradient accumulation: a step in several passes is the step of the whole batch, with fewer activations in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny_language import language_world, model_of, prepare
from fixtures.toy import LOCAL, Federation
from torch import Tensor, nn

from fedlora.config import Experiment, digest, parse, resolved
from fedlora.core.errors import TrainingError
from fedlora.methods import fedavg
from fedlora.population.tiers import Tier
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.gradients import Accumulated, Backward, Losses
from fedlora.recipe.local import Local, Sgd
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.testing import toy_task
from fedlora.tuning import Full, LoRA, SparseMask, Tuning

world = pytest.fixture(scope="module")(language_world)
CPU = torch.device("cpu")
ROWS = np.arange(8)


def trained(tuning: Tuning, local: Local, **slots: Any) -> Federation:
    federation = Federation(fedavg(rounds=2, tuning=tuning, local=local, **slots), 24)
    federation.state = federation.go_on(federation.start(), 2)  # type: ignore[attr-defined]
    return federation


@pytest.mark.parametrize("tuning", [LoRA(rank=2), LoRA(rank=2, dora=True), Full(), SparseMask(density=0.2)], ids=str)
def test_a_run_in_parts_is_that_in_whole_batches(tuning: Tuning) -> None:
    # clients of 8 examples have batches of 5 and 3 in each pass, in parts of 2, 2, 1 and 2, 1
    local = replace(LOCAL, optimizer=Sgd(lr=0.1, momentum=0.9), batch_size=5)
    whole, parts = trained(tuning, local), trained(tuning, replace(local, accumulate=3))
    for name, value in whole.state.params.items():  # type: ignore[attr-defined]
        torch.testing.assert_close(parts.state.params[name], value, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert (one.steps, one.examples, one.up_bytes) == (other.steps, other.examples, other.up_bytes)
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


def test_the_penalty_of_rank_pruning_counts_once() -> None:
    local = replace(LOCAL, optimizer=Sgd(lr=0.1), batch_size=8)
    pruning = RankPruning(keep=0.5, weight=0.5)
    whole = trained(LoRA(rank=4), local, shrink=pruning)
    parts = trained(LoRA(rank=4), replace(local, accumulate=4), shrink=pruning)
    for name, value in whole.state.params.items():  # type: ignore[attr-defined]
        torch.testing.assert_close(parts.state.params[name], value, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


def gradients(task: Any, model: nn.Module, source: Backward) -> tuple[float, list[Tensor]]:
    values = [value for value in model.parameters() if value.requires_grad]
    model.zero_grad()
    batches = task.batches(source.passes(ROWS), CPU)
    losses = Losses(lambda batch: task.loss(model, batch), task.num_terms, batches)
    loss = float(source.gradients(losses, values, ROWS, len(ROWS), None))
    return loss, [torch.zeros_like(value) if value.grad is None else value.grad.clone() for value in values]


def test_tokens_weigh_the_same_in_parts_of_different_lengths(world: Path) -> None:
    task = prepare(world, block_size=6)
    model = model_of(task)
    terms = [task.num_terms(task.batch(part, CPU)) for part in Accumulated(True, 4, 8).passes(ROWS)]
    assert len(set(terms)) > 1
    assert sum(terms) == task.num_terms(task.batch(ROWS, CPU))
    loss, whole = gradients(task, model, Backward())
    same, parts = gradients(task, model, Accumulated(True, 4, 8))
    assert same == pytest.approx(loss, abs=1e-5)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # the mean of the parts' means is another gradient
    means = [gradients_of(task, model, part) for part in Accumulated(True, 4, 8).passes(ROWS)]
    of_means = [torch.stack(each).mean(0) for each in zip(*means, strict=True)]
    assert max(float((one - other).abs().max()) for one, other in zip(of_means, whole, strict=True)) > 1e-3


def gradients_of(task: Any, model: nn.Module, rows: Any) -> list[Tensor]:
    values = [value for value in model.parameters() if value.requires_grad]
    return list(torch.autograd.grad(task.loss(model, task.batch(rows, CPU)), values))


def test_a_part_without_labels_is_passed_over_and_a_batch_of_such_parts_is_refused() -> None:
    value = nn.Parameter(torch.tensor(2.0))

    def losses(*batches: list[float]) -> Losses:
        def mean(batch: Any) -> Tensor:
            if not len(batch["x"]):
                raise TrainingError("every label is masked")
            return (value * batch["x"]).mean()

        return Losses(mean, lambda batch: len(batch["x"]), iter({"x": torch.tensor(each)} for each in batches))

    source = Accumulated(True, 3, 3)
    loss = source.gradients(losses([1.0, 2.0], [], [6.0]), [value], np.arange(3), 3, None)
    assert value.grad is not None
    assert (float(value.grad), float(loss)) == (3.0, 6.0)
    with pytest.raises(TrainingError, match="every label is masked"):
        source.gradients(losses([], [], []), [value], np.arange(3), 3, None)


def stored_bytes(step: Callable[[], object]) -> int:
    """The most bytes of tensors that are stored for a backward pass at one time."""
    now = most = 0

    class Held:
        def __init__(self, value: Tensor) -> None:
            nonlocal now, most
            self.value = value
            now += value.nbytes
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.value.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.value):
        step()
    return most


def test_fewer_activations_are_in_memory() -> None:
    task = toy_task(num_examples=8)
    model = task.load_model(0, "fp32", CPU)[0].eval()
    whole = stored_bytes(lambda: gradients(task, model, Backward()))
    parts = stored_bytes(lambda: gradients(task, model, Accumulated(True, 4, 8)))
    frozen = stored_bytes(lambda: gradients_of(task, model, ROWS[:1]))  # weights are stored too
    assert frozen <= parts < 0.6 * whole


def test_under_noise_for_examples_a_step_is_the_same() -> None:
    noise = ExampleNoise(clip_norm=0.5, noise_multiplier=0.5, seed=3)
    local = replace(LOCAL, batch_size=4, example_privacy=noise)
    whole, parts = trained(LoRA(rank=2), local), trained(LoRA(rank=2), replace(local, accumulate=2))
    state, other = whole.state, parts.state  # type: ignore[attr-defined]
    for name, value in state.params.items():
        torch.testing.assert_close(other.params[name], value, rtol=1e-5, atol=1e-5)


def test_parts_of_a_batch_that_is_smaller_than_their_number_have_one_example() -> None:
    source = Tier(name="weak", batch_size=2).applied(Recipe(local=Local(accumulate=4))).local.gradient_source
    assert isinstance(source, Accumulated)
    assert [part.tolist() for part in source.passes(np.arange(2))] == [[0], [1]]


def test_a_configuration_without_it_has_its_old_digest() -> None:
    plain, one = Experiment(), parse({"method": {"kind": "fedavg", "local": {"accumulate": 1}}, "label": "run"})
    assert "accumulate" not in resolved(one)["phases"][0]["recipe"]["local"]
    other = Experiment(phases=(Phase(recipe=Recipe(local=Local(accumulate=2))),))
    assert digest(other) != digest(plain)
    assert parse(resolved(other)) == other

"""Copies of the model in memory during a round of full fine-tuning, counted by tensors and arrays, not by the clock."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fixtures.toy import CPU
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fedlora.client.workspace import Workspace
from fedlora.core import tree
from fedlora.engines import Serial
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import AdamW, ClientOptimizer, Local, Sgd
from fedlora.rounds import round
from fedlora.rounds.phases import close_phase, open_phase, without_start
from fedlora.tasks.models.loading import head_names
from fedlora.testing import equal_population, toy_task
from fedlora.testing.models import TensorTask, tiny_model
from fedlora.transport import Link, wire
from fedlora.tuning import Full


class Wide(nn.Module):
    """Two matrices of ``size`` rows and columns."""

    def __init__(self, size: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Buffer(torch.randn(64, size))
            self.inner, self.outer = (nn.Linear(size, size) for _ in range(2))
            self.classifier = nn.Linear(size, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        states = self.table[input_ids].mean(1)
        return SequenceClassifierOutput(logits=self.classifier(self.outer(self.inner(states).tanh()).tanh()))


class Memory:
    """The memory of the tensors that exist, less that of NumPy, which ``tracemalloc`` counts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._numpy: set[int] = set()
        self._wrap = torch.from_numpy
        patch.setattr(torch, "from_numpy", self._wrapped)

    def _wrapped(self, array: np.ndarray[Any, Any]) -> Tensor:
        self._numpy.add(array.ctypes.data)
        weakref.finalize(array, self._numpy.discard, array.ctypes.data)
        return self._wrap(array)

    def owned(self) -> int:
        """Bytes of PyTorch's own memory."""
        found = {}
        for each in gc.get_objects():
            if type(each) in (Tensor, nn.Parameter) and each.untyped_storage().data_ptr() not in self._numpy:
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        return sum(found.values())


def most_copies(
    monkeypatch: pytest.MonkeyPatch, optimizer: ClientOptimizer, size: int, trace: bool
) -> dict[str, float]:
    """The most copies while messages are made, read and added up, and when a step is done, in two rounds."""
    tokens = torch.randint(1, 64, (24, 8), generator=torch.Generator().manual_seed(0))
    workspace = Workspace(TensorTask(lambda: Wide(size), tokens, torch.arange(24) % 3), 0, CPU)
    recipe = Recipe(tuning=Full(), local=Local(optimizer=optimizer, batch_size=8, max_steps=1))
    gc.collect()
    gc.freeze()  # what exists is not looked through
    if trace:
        tracemalloc.start()
    state, _ = open_phase(workspace, 0, recipe, 0, 0, None)
    one = sum(value.nbytes for value in state.params.values())
    engine, peaks = Serial(workspace, equal_population(24, 3)), {}

    with monkeypatch.context() as patch:
        memory = Memory(patch)

        def looking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def looked(*given: Any, **named: Any) -> Any:
                tracemalloc.reset_peak()
                here = memory.owned()
                result = function(*given, **named)
                now = (max(here, memory.owned()) + tracemalloc.get_traced_memory()[1]) / one
                peaks[name] = max(peaks.get(name, 0.0), now)
                return result

            return looked

        places = (
            (wire, "pack"),
            (wire, "receive"),
            (torch.optim.Optimizer, "zero_grad"),
            (tree, "add_"),
            (tree, "scale_"),
            (round, "take_step"),
        )
        for place, name in places:
            patch.setattr(place, name, looking(name, getattr(place, name)))
        gc.disable()
        try:
            for _ in range(2):
                state, _ = round.run_round(recipe, state, (0, 1, 2), engine, seed=0, rounds=2)
                state = without_start(state, [Phase(recipe=recipe, rounds=2)])
        finally:
            gc.enable()
            gc.unfreeze()
            tracemalloc.stop()
    return peaks


@pytest.mark.parametrize(
    ("optimizer", "most"),
    [(Sgd(lr=0.1), 5.75), (AdamW(), 6.5), (Sgd(lr=0.001), 7.5)],
    ids=["sgd", "adamw", "update with zeros"],
)
def test_a_round_holds_few_copies_of_the_model(
    monkeypatch: pytest.MonkeyPatch, optimizer: ClientOptimizer, most: float
) -> None:
    """The model, the server's parameters and the sum of updates; at a step also the gradient and the moments, and then
    the update and its message, in either direction. Without care there were 14 and 15. An update with
    zeros is copied once more, by pieces that weigh more here than in a large model."""
    most_copies(monkeypatch, optimizer, 8, trace=False)  # what is imported on the way does not count
    assert max(most_copies(monkeypatch, optimizer, 400, trace=True).values()) <= most


@pytest.mark.parametrize(
    ("recipe", "moved", "rounds", "dropped"),
    [
        (Recipe(tuning=Full()), True, (1,), True),
        (Recipe(tuning=Full()), False, (1,), False),  # a round in which nothing moves is still an error
        (Recipe(tuning=Full()), True, (1, 1), False),  # the next phase starts from the change
        (Recipe(tuning=Full(), down=Link(reference="init")), True, (1,), False),
        (Recipe(), True, (1,), False),  # an export of an adapter may read it, and it is small
    ],
    ids=["last phase", "unmoved", "next phase", "reference", "adapter"],
)
def test_the_start_of_a_phase_is_held_while_it_is_read(
    recipe: Recipe, moved: bool, rounds: tuple[int, ...], dropped: bool
) -> None:
    workspace = Workspace(toy_task(num_examples=8), 0, CPU)
    state, _ = open_phase(workspace, 0, recipe, 0, 0, None)
    phases = [Phase(recipe=recipe, rounds=each) for each in rounds]
    assert without_start(state, phases) is state
    if moved:
        state = replace(state, params={name: value + 1 for name, value in state.params.items()})
    assert (without_start(state, phases).init == {}) is dropped


def test_a_start_that_was_dropped_is_drawn_again_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's task may draw more than the head from the seed of its model."""
    task, recipe = toy_task(num_examples=8), Recipe(tuning=Full())

    def drawn(seed: int, base: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        model = tiny_model("bert", seed % 1000, 3)
        return model, head_names(model, set())

    monkeypatch.setattr(task, "load_model", drawn)
    workspace = Workspace(task, 3, CPU)
    state, _ = open_phase(workspace, 0, recipe, 3, 0, None)
    state = replace(state, params={name: value + 1 for name, value in state.params.items()})
    dropped = without_start(state, [Phase(recipe=recipe, rounds=1)])
    assert not dropped.init
    assert all((change - 1).abs().max() < 1e-6 for change in close_phase(workspace, recipe, dropped).delta.values())


@pytest.mark.parametrize(("recipe", "times"), [(Recipe(), 0), (Recipe(tuning=Full()), 1)], ids=["lora", "full"])
def test_the_pretrained_model_is_read_again_only_if_its_weights_were_trained(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, times: int
) -> None:
    """At the end of a second phase, whose start has the changes of the first."""
    task = toy_task(num_examples=8)
    workspace = Workspace(task, 0, CPU)
    state, _ = open_phase(workspace, 1, recipe, 0, 0, None)
    load = Mock(side_effect=task.load_model)
    monkeypatch.setattr(task, "load_model", load)
    close_phase(workspace, recipe, state)
    assert load.call_count == times

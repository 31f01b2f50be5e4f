"""What models bring along: running statistics, quantised weights, activations computed twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError
from fedlora.core.state import ServerState
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.rounds.round import run_round
from fedlora.server.aggregate import ProductExact, Stack
from fedlora.testing import FAMILIES, TensorTask, equal_population, toy_task
from fedlora.tuning import (
    BitFit,
    Bottleneck,
    Full,
    HeadOnly,
    Kaiming,
    LoRA,
    LoRAInit,
    Orthogonal,
    SparseMask,
    SvdOfDelta,
    SvdOfWeight,
    Tuning,
)
from fedlora.tuning.export import save_lora
from fedlora.tuning.lora import lora_layers

# peft reads a name that transformers 5 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
TASKS = {"t5": "TOKEN_CLS"}
LOCAL = Local(optimizer=Sgd(lr=0.3), batch_size=4, dropout=False)


def opened(task: TensorTask, tuning: Tuning, local: Local = LOCAL) -> tuple[Workspace, Recipe, ServerState]:
    workspace, recipe = Workspace(task, 0, CPU), Recipe(tuning=tuning, local=local)
    return workspace, recipe, open_phase(workspace, 0, recipe, seed=3, rounds_done=0, carry=None)[0]


def turn(
    workspace: Workspace, recipe: Recipe, state: ServerState, cohort: tuple[int, ...] = (0, 1), rounds: int = 1
) -> ServerState:
    for _ in range(rounds):
        state, _ = run_round(recipe, state, cohort, Serial(workspace, equal_population(16, 2)), seed=3, rounds=rounds)
    workspace.installed.load(state.params)
    return state


def logits(task: TensorTask, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return task.logits(model.eval(), task.batch(np.arange(16), CPU))


# ---- running statistics


@pytest.mark.parametrize("tuning", [LoRA(rank=3), Full(), BitFit()], ids=str)
@pytest.mark.parametrize("dropout", [True, False])
def test_no_statistic_of_a_client_s_batches_stays_in_the_model(tuning: Tuning, dropout: bool) -> None:
    local = Local(optimizer=Sgd(lr=0.05), batch_size=4, dropout=dropout)
    workspace, recipe, state = opened(toy_task("mobilenet_v1", num_examples=16), tuning, local)
    before = {name: value.clone() for name, value in workspace.model.named_buffers()}
    assert any("running_var" in name for name in before)
    turn(workspace, recipe, state)
    assert all(torch.equal(before[name], value) for name, value in workspace.model.named_buffers())


def test_the_order_of_clients_does_not_matter_to_a_model_with_statistics() -> None:
    local = Local(optimizer=Sgd(lr=0.05), batch_size=4)
    results = []
    for cohort in ((0, 1), (1, 0)):
        workspace, recipe, state = opened(toy_task("mobilenet_v1", num_examples=16), LoRA(rank=3), local)
        results.append(turn(workspace, recipe, state, cohort, rounds=2).params)
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


# ---- quantised weights


class Packed(nn.Linear):
    """A linear layer that keeps bytes in a column and a scale for each row, as quantised ones do."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features, bias=old.bias is not None)
        self.bias = old.bias
        steps = old.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (old.weight.detach() / steps).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        self.register_buffer("steps", steps)

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features).to(inputs.dtype) * self.steps
        return functional.linear(inputs, weight, self.bias)


def packed_task(family: str = "bert") -> TensorTask:
    task = toy_task(family, num_examples=16)
    plain = task.make_model

    def make() -> nn.Module:
        model = plain()
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and "classifier" not in name:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Packed(module))
        return model

    task.make_model = make
    return task


@pytest.mark.parametrize("init", [Kaiming(), Orthogonal(), SvdOfDelta()], ids=str)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_lora_trains_beside_quantised_weights(family: str, init: LoRAInit, tmp_path: Path) -> None:
    task = packed_task(family)
    tuning = LoRA(rank=3, alpha=6.0, init=init)  # type: ignore[arg-type]
    workspace, recipe, state = opened(task, tuning)
    workspace.installed.load(state.params)
    torch.testing.assert_close(logits(task, workspace.model), logits(task, task.make_model()), atol=1e-5, rtol=0)
    codes = {n: v.clone() for n, v in workspace.model.named_parameters() if v.dtype == torch.int8}
    assert codes.keys() >= {f"{name}.weight" for name in lora_layers(workspace.model)}
    after = turn(workspace, recipe, state)
    says = logits(task, workspace.model)
    assert float((says - logits(task, task.make_model())).abs().max()) > 1e-3
    now = dict(workspace.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in codes.items())
    save_lora(tuning, workspace.installed, state.init, after.params, "base", tmp_path, TASKS.get(family, "SEQ_CLS"))
    theirs = peft.PeftModel.from_pretrained(task.make_model(), tmp_path)
    torch.testing.assert_close(logits(task, theirs), says, atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", [SvdOfWeight(), SvdOfDelta(fold="rest")], ids=str)
def test_a_start_that_edits_the_weights_is_refused_where_they_are_quantised(init: LoRAInit) -> None:
    with pytest.raises(ConfigError, match=r"edits the values of bert\..*query, which are stored quantised; .*kaiming"):
        opened(packed_task(), LoRA(rank=3, init=init))  # type: ignore[arg-type]


@pytest.mark.parametrize("aggregator", [ProductExact(), Stack()], ids=str)
def test_rounds_that_edit_the_weights_are_refused_where_they_are_quantised(aggregator: Any) -> None:
    workspace = Workspace(packed_task(), 0, CPU)
    with pytest.raises(ConfigError, match=r"edits the values of bert\..*query, which are stored quantised"):
        workspace.open(0, Recipe(tuning=LoRA(rank=3), aggregator=aggregator))


@pytest.mark.parametrize("tuning", [Full(), SparseMask()], ids=str)
def test_quantised_weights_themselves_are_not_trained(tuning: Tuning) -> None:
    with pytest.raises(ConfigError, match=r"is stored quantised \(int8\) and cannot be trained; use `lora`"):
        opened(packed_task(), tuning)


@pytest.mark.parametrize("tuning", [BitFit(), HeadOnly(), Bottleneck(width=2)], ids=str)
def test_tunings_that_leave_the_matrices_alone_work_on_quantised_models(tuning: Tuning) -> None:
    task = packed_task()
    workspace, recipe, state = opened(task, tuning)
    torch.testing.assert_close(logits(task, workspace.model), logits(task, task.make_model()), atol=1e-5, rtol=0)
    after = turn(workspace, recipe, state)
    assert any(not torch.equal(after.params[name], value) for name, value in state.params.items())


def test_what_was_learnt_beside_quantised_weights_is_not_merged_into_them() -> None:
    workspace, recipe, state = opened(packed_task(), LoRA(rank=3))
    with pytest.raises(ConfigError, match="cannot be added to its weight, which is stored quantised; export"):
        close_phase(workspace, recipe, state)


# ---- gradient checkpointing


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", [*(family for family in FAMILIES if family != "albert"), "vit", "dinov2"])
def test_gradients_are_the_same_when_activations_are_computed_twice(family: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    enable: Callable[[Any], None]
    for enable in (lambda model: None, lambda model: model.gradient_checkpointing_enable()):
        task = toy_task(family, num_examples=16)
        workspace, _, state = opened(task, LoRA(rank=3, dropout=0.3, init=SvdOfWeight()))
        workspace.installed.load(state.params)
        enable(workspace.model)
        torch.manual_seed(0)
        task.loss(workspace.model.train(), task.batch(np.arange(8), CPU)).backward()  # type: ignore[no-untyped-call]
        gradients.append({n: p.grad for n, p in workspace.installed.parameters.items() if p.grad is not None})
    assert workspace.model.is_gradient_checkpointing
    assert gradients[0].keys() == gradients[1].keys() == workspace.installed.parameters.keys()
    for name, gradient in gradients[0].items():
        assert bool(gradient.any())
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)

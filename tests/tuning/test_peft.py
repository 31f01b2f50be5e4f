"""The library ``peft``: our LoRA and FeDeRA equal its own, and its other tunings run as they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError
from fedlora.core.state import ServerState
from fedlora.core.tree import Tree
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.ledger import RoundRecord
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.testing import equal_population, tiny_model, toy_task
from fedlora.transport import pack
from fedlora.tuning import LoRA, Peft, SvdOfWeight, Tuning, from_peft, to_peft
from fedlora.tuning.lora import lora_layers
from fedlora.tuning.targets import saved_modules

# peft reads a name that transformers 5 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "albert": ["query", "value"], "qwen3": ["q_proj", "v_proj"]}
HEADS = {"bert": "classifier", "gpt2": "score", "albert": "classifier", "qwen3": "score"}
LOCAL = Local(optimizer=Sgd(lr=0.05), batch_size=4, dropout=False)


def theirs(family: str, **settings: Any) -> nn.Module:
    """PEFT's model with factors that are not zero."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS[family], **settings}
    config = peft.LoraConfig(modules_to_save=[HEADS[family]], fan_in_fan_out=family == "gpt2", **fields)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(toy_task(family).make_model(), config)
        if "init_lora_weights" not in settings:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    return model  # type: ignore[no-any-return]


def factors(model: nn.Module) -> Tree:
    return from_peft(peft.get_peft_model_state_dict(model))


def opened(tuning: Tuning, family: str = "bert") -> tuple[Workspace, Recipe, ServerState]:
    workspace, recipe = Workspace(toy_task(family, num_examples=16), 0, CPU), Recipe(tuning=tuning, local=LOCAL)
    state, _ = open_phase(workspace, 0, recipe, seed=0, rounds_done=0, carry=None)
    return workspace, recipe, state


def turn(workspace: Workspace, recipe: Recipe, state: ServerState) -> tuple[ServerState, RoundRecord]:
    return run_round(recipe, state, (0, 1), Serial(workspace, equal_population(16, 2)), seed=0, rounds=1)


def loss(model: nn.Module) -> Tensor:
    task = toy_task("bert")
    return task.loss(model.eval(), task.batch(np.arange(12), CPU))


def logits(model: nn.Module) -> Tensor:
    batch = toy_task("bert").batch(np.arange(12), CPU)
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits  # type: ignore[no-any-return]


# ---- LoRA


def test_installing_names_no_gpu_that_the_run_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of which PyTorch would initialise each, and warn
    opened(Peft(config={"peft_type": "LORA", "r": 2, "target_modules": ["query"]}))


@pytest.mark.parametrize("family", TARGETS)
def test_our_lora_computes_what_theirs_does(family: str) -> None:
    reference = theirs(family)
    workspace, _, _ = opened(LoRA(rank=4, alpha=12.0), family)
    workspace.installed.load(factors(reference))
    ours = logits(workspace.model)
    torch.testing.assert_close(ours, logits(reference), atol=1e-5, rtol=1e-5)
    assert float((ours - logits(toy_task(family).make_model())).abs().max()) > 1e-3


@pytest.mark.parametrize("family", TARGETS)
def test_our_gradients_are_theirs(family: str) -> None:
    reference = theirs(family)
    workspace, _, _ = opened(LoRA(rank=4, alpha=12.0), family)
    workspace.installed.load(factors(reference))
    for model in (reference, workspace.model):
        loss(model).backward()  # type: ignore[no-untyped-call]
    named = dict(reference.named_parameters())
    grads = {name: named[name].grad for name in named if named[name].requires_grad}
    expected = from_peft({name: value for name, value in grads.items() if value is not None})
    assert set(expected) == set(workspace.installed.parameters)
    for name, parameter in workspace.installed.parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_dropout_falls_on_the_adapter_s_input_alone() -> None:
    workspace, _, state = opened(LoRA(rank=4, dropout=0.5))
    layer = next(iter(lora_layers(workspace.model).values()))
    workspace.installed.load({name: value + 0.1 for name, value in state.params.items()})
    inputs = torch.ones(64, 32)
    torch.manual_seed(0)
    layer.train()
    frozen = nn.functional.linear(inputs, layer.matrix(), layer.bias)  # type: ignore[arg-type]
    heard = [(layer(inputs) - frozen).detach() for _ in range(2)]
    assert not torch.equal(*heard)
    layer.eval()
    clean = (layer(inputs) - frozen).detach()
    # E[dropout(x)] = x: 64 rows of 32 inputs
    assert float((heard[0].mean(0) - clean.mean(0)).norm() / clean.mean(0).norm()) < 0.2


def test_names_go_to_peft_and_back() -> None:
    params = opened(LoRA(rank=4))[2].params
    named = to_peft(params)
    assert set(named) == set(peft.get_peft_model_state_dict(theirs("bert")))
    assert {name: id(value) for name, value in from_peft(named).items()} == {n: id(v) for n, v in params.items()}


def test_a_foreign_state_dict_is_refused() -> None:
    with pytest.raises(ConfigError, match="should start with"):
        from_peft({"bert.query.lora_A.weight": torch.zeros(1)})


# ---- FeDeRA is PiSSA


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_given_their_factors_the_residual_and_the_function_are_those_of_pissa(family: str) -> None:
    reference = theirs(family, init_lora_weights="pissa")
    received = factors(reference)
    tuning = LoRA(rank=4, alpha=12.0, init=SvdOfWeight())
    workspace = Workspace(toy_task(family, num_examples=16), 0, CPU)
    adapters = {name: value for name, value in received.items() if ".lora_" in name}
    _, recipe, state = opened(tuning, family)
    ordered = {name: adapters[name] for name in state.params if name in adapters}
    workspace.apply_setup(0, recipe, pack({"init": ordered}, {}).raw)
    workspace.installed.load({name: received[name] for name in state.params})
    for name, layer in lora_layers(workspace.model).items():
        theirs_residual = reference.get_submodule(f"base_model.model.{name}.base_layer").weight
        torch.testing.assert_close(layer.weight, theirs_residual, atol=1e-5, rtol=1e-5, check_dtype=True)
    torch.testing.assert_close(logits(workspace.model), logits(reference), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_our_own_factors_are_those_of_pissa_up_to_signs(family: str) -> None:
    received = factors(theirs(family, init_lora_weights="pissa"))
    _, _, state = opened(LoRA(rank=4, alpha=12.0, init=SvdOfWeight()), family)
    for name in [name.removesuffix(".lora_A") for name in state.params if name.endswith(".lora_A")]:
        a, b = (state.params[f"{name}.lora_{factor}"] for factor in "AB")
        their_a, their_b = (received[f"{name}.lora_{factor}"] for factor in "AB")
        torch.testing.assert_close(b @ a, their_b @ their_a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.abs(), their_a.abs(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b.abs(), their_b.abs(), atol=1e-4, rtol=1e-4)


def test_our_gradients_at_the_start_are_those_of_pissa() -> None:
    reference = theirs("bert", init_lora_weights="pissa")
    workspace, _, state = opened(LoRA(rank=4, alpha=12.0, init=SvdOfWeight()))
    workspace.installed.load(state.params)
    for model in (reference, workspace.model):
        loss(model).backward()  # type: ignore[no-untyped-call]
    named = dict(reference.named_parameters())
    for name, parameter in workspace.installed.parameters.items():
        if ".lora_" in name:
            their_grad = named[f"base_model.model.{name}.default.weight"].grad
            assert their_grad is not None
            assert parameter.grad is not None
            # signs of singular vectors are free, so magnitudes
            torch.testing.assert_close(parameter.grad.abs(), their_grad.abs(), atol=1e-5, rtol=1e-3)


# ---- any tuning of peft

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "target_modules": ["query", "value"]},
    "dora": {"peft_type": "LORA", "r": 4, "use_dora": True, "target_modules": ["query", "value"]},
    "ia3": {
        "peft_type": "IA3",
        "target_modules": ["query", "value", "intermediate.dense"],
        "feedforward_modules": ["intermediate.dense"],
    },
    "loha": {"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": ["query", "value"]},
    "vera": {"peft_type": "VERA", "r": 4, "target_modules": ["query", "value"]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_round_moves_adapter_and_head(config: dict[str, Any]) -> None:
    workspace, recipe, state = opened(Peft(config=config))
    frozen = {n: v.detach().clone() for n, v in workspace.model.named_parameters() if not v.requires_grad}
    torch.testing.assert_close(logits(workspace.model), logits(toy_task().make_model()), atol=1e-4, rtol=0)
    after, row = turn(workspace, recipe, state)
    assert math.isfinite(row.loss)
    assert min(*row.up_bytes.values(), *row.down_bytes.values()) > 0
    for group in ("adapter", "head"):
        names = [name for name, its in state.schema.groups.items() if its == group]
        assert any(not torch.equal(after.params[name], state.params[name]) for name in names)
    now = dict(workspace.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_two_processes_install_the_same_model_and_leave_the_generator_alone(config: dict[str, Any]) -> None:
    states = []
    for process in range(2):
        with torch.random.fork_rng(devices=[]):
            before = torch.manual_seed(process).get_state()
            states.append(opened(Peft(config=config))[0].model.state_dict())
            assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_round_of_peft_s_lora_is_a_round_of_ours() -> None:
    ours, recipe_ours, start = opened(LoRA(rank=4, alpha=8.0))
    foreign, recipe_foreign, state = opened(Peft(config={**CONFIGS["lora"], "lora_alpha": 8}))

    rename = {name: name.replace(".modules_to_save", "") for name in state.params}
    rename = {n: s.removesuffix(".weight") if ".lora_" in s else s for n, s in rename.items()}
    assert set(rename.values()) == set(start.params)
    params = {name: start.params[short] for name, short in rename.items()}
    after, row = turn(foreign, recipe_foreign, state.__class__(**{**vars(state), "params": params, "init": params}))
    expected, row_ours = turn(ours, recipe_ours, start)
    assert row.loss == pytest.approx(row_ours.loss, abs=1e-6)
    assert row.down_bytes == row_ours.down_bytes
    for name, short in rename.items():
        torch.testing.assert_close(after.params[name], expected.params[short], atol=1e-6, rtol=1e-5)


def test_a_config_object_gives_the_same_tuning() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.1)
    built = Peft.of(config).build(["classifier"])
    assert (built.r, built.lora_alpha, built.lora_dropout) == (4, 8, 0.1)
    assert set(built.target_modules) == {"query", "value"}
    workspace, recipe, state = opened(Peft.of(config))
    assert turn(workspace, recipe, state)[1].update_norm > 0


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "eva", "mica", "lora_ga"]
)
def test_starts_that_each_client_would_decompose_by_itself_are_refused(init: str) -> None:
    with pytest.raises(ConfigError, match="use the tuning `lora`"):
        opened(Peft(config={**CONFIGS["lora"], "init_lora_weights": init}))


@pytest.mark.parametrize("kind", ["PSOFT", "OSF", "TINYLORA"])
def test_types_that_each_client_would_decompose_by_itself_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="decompose the weights by itself"):
        opened(Peft(config={"peft_type": kind}))


@pytest.mark.parametrize("config", [{}, {"peft_type": "NOTHING"}, {"peft_type": "LORA", "rank": 4}], ids=str)
def test_what_peft_refuses_is_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="peft refuses"):
        opened(Peft(config=config))


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="peft cannot put"):
        opened(Peft(config={**CONFIGS["lora"], "target_modules": ["nothing"]}))


def test_a_head_inside_the_backbone_does_not_make_the_backbone_train() -> None:
    """A checkpoint without a pooler: it is drawn anew and belongs to the head."""
    model = tiny_model("bert")
    head = frozenset(n for n, _ in model.named_parameters() if n.startswith(("classifier", "bert.pooler")))
    assert saved_modules(model, head) == ["bert.pooler.dense", "classifier"]
    groups = Peft(config=CONFIGS["lora"]).install(model, head, 0).schema.groups
    assert sum(group == "head" for group in groups.values()) == 4
    assert sum(group == "adapter" for group in groups.values()) == 8


def test_a_peft_tuning_hands_nothing_over() -> None:
    workspace, recipe, state = opened(Peft(config=CONFIGS["ia3"]))
    with pytest.raises(ConfigError, match="use `lora`"):
        recipe.tuning.changes(workspace.installed, state.init, state.params)

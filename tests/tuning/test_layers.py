"""Modules that carry an adapter: convolutions, embeddings, quantised matrices; and weights that are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError
from fedlora.core.state import PhaseHandover, ServerState
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.rounds.round import run_round
from fedlora.testing import Head, TensorTask, equal_population, tiny_model, toy_task
from fedlora.tuning import (
    Full,
    HeadOnly,
    Kaiming,
    LoRA,
    LoRAInit,
    Orthogonal,
    Peft,
    SparseMask,
    SvdOfDelta,
    SvdOfWeight,
    Tuning,
    from_peft,
    to_peft,
)
from fedlora.tuning.export import save_lora
from fedlora.tuning.lora import lora_layers
from fedlora.tuning.lora_layer import LoRALayer, lora_layer
from fedlora.tuning.targets import find

# peft reads a name that transformers 5 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
LOCAL = Local(optimizer=Sgd(lr=0.3), batch_size=4, dropout=False)
INITS: list[LoRAInit] = [Kaiming(), Orthogonal(), SvdOfWeight(), SvdOfDelta()]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def with_head(family: str, head: Head) -> TensorTask:
    task = toy_task(family, num_examples=16)
    task.make_model = lambda: tiny_model(family, head=head)
    return task


def filled(layer: LoRALayer) -> LoRALayer:
    """An adapter whose factors are not zero."""
    with torch.no_grad():
        layer.lora_A.copy_(random(*layer.lora_A.shape, seed=1))
        layer.lora_B.copy_(random(*layer.lora_B.shape, seed=2))
    return layer


def settled(
    task: TensorTask, targets: str | tuple[str, ...], init: LoRAInit, local: Local = LOCAL
) -> tuple[LoRA, Workspace, ServerState]:
    """A LoRA after a round, started from a change if its start wants one."""
    tuning = LoRA(rank=3, alpha=6.0, targets=targets, init=init)  # type: ignore[arg-type]
    carry = None
    if isinstance(init, SvdOfDelta):
        found = find(task.make_model(), targets, frozenset())
        carry = PhaseHandover({f"{n}.weight": 0.02 * random(*m.weight.shape) for n, m in found.items()}, {})
    workspace, recipe = Workspace(task, 0, CPU), Recipe(tuning=tuning, local=local)
    state, _ = open_phase(workspace, 0, recipe, seed=3, rounds_done=0, carry=carry)
    return tuning, workspace, turn(workspace, recipe, state)


# ---- convolutions

SHAPES: dict[str, dict[str, Any]] = {
    "pixel": {"kernel_size": 1},
    "plain": {"kernel_size": 3},
    "oblong": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same", "dilation": (1, 2)},
    "patches": {"kernel_size": 4, "stride": 4},
}


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_a_convolution_s_adapter_is_a_change_of_its_kernel(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    old = nn.Conv2d(3, 5, **settings)
    layer, images = filled(lora_layer(old, 2, 0.5, 0.0)), random(2, 3, 8, 8)
    kernel = old.weight + 0.5 * (layer.lora_B @ layer.lora_A).view(old.weight.shape)
    expected = functional.conv2d(images, kernel, old.bias, old.stride, old.padding, old.dilation)
    torch.testing.assert_close(layer(images), expected, atol=1e-5, rtol=1e-5)
    assert layer.lora_A.shape == (2, old.weight[0].numel())
    assert torch.equal(layer.as_weight(layer.matrix()), old.weight)


def test_dropout_falls_on_what_a_convolution_s_adapter_hears() -> None:
    old, images = nn.Conv2d(2, 3, 1), torch.ones(1, 2, 4, 4)
    layer = filled(lora_layer(old, 2, 1.0, 0.5)).train()
    assert not torch.equal(layer(images), layer(images))
    assert torch.equal(layer.eval()(images), layer(images))


def test_a_replaced_module_shows_what_models_read_off_it() -> None:
    conv = lora_layer(nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=2), 2, 1.0, 0.0)
    assert (conv.in_channels, conv.out_channels, conv.groups) == (3, 5, 1)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 2), (2, 2), (1, 1), (2, 2))
    embedding = lora_layer(nn.Embedding(7, 4, padding_idx=2), 2, 1.0, 0.0)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (7, 4, 2)
    linear = lora_layer(nn.Linear(3, 5), 2, 1.0, 0.0)
    assert (linear.in_features, linear.out_features) == (3, 5)


def test_grouped_convolutions_are_passed_over_unless_they_are_named() -> None:
    model = tiny_model("mobilenet_v1")
    for targets in ("default", "all-linear"):
        found = find(model, targets, frozenset()).values()
        assert {module.groups for module in found if isinstance(module, nn.Conv2d)} == {1}
    with pytest.raises(ConfigError, match=r"layer\.0\.convolution cannot be a target: it is a convolution in 4 groups"):
        find(model, r".*\.layer\.\d+\.convolution", frozenset())


class Odd(nn.Conv2d):
    """A convolution with a forward pass of its own."""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "pads with 'reflect'"),
        (Odd(2, 2, 3), "its class Odd computes in a way of its own"),
        (nn.Embedding(4, 2, max_norm=1.0), "rescales its rows"),
        (nn.MultiheadAttention(4, 2).out_proj, "reads its weight without calling it"),
    ],
    ids=["padding", "subclass", "max_norm", "attention"],
)
def test_what_an_adapter_would_compute_wrongly_is_refused_by_name_and_else_passed_over(
    module: nn.Module, reason: str
) -> None:
    model = nn.ModuleDict({"odd": module, "fine": nn.Linear(2, 2)})
    assert list(find(model, "all-linear", frozenset())) == ["fine"]
    with pytest.raises(ConfigError, match=f"odd cannot be a target: .*{reason}.*; leave it out of `targets`"):
        find(model, ("odd",), frozenset())


def test_a_dilated_convolution_is_not_written_as_an_adapter_that_peft_would_misread(tmp_path: Path) -> None:
    task = toy_task("mobilenet_v1", num_examples=16)
    tuning = LoRA(rank=3, targets=("conv_stem.convolution",))
    workspace, _, state = opened(task, tuning)
    layer = lora_layers(workspace.model)["mobilenet_v1.conv_stem.convolution"]
    layer.dilation = (2, 2)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="is a dilated convolution, beside which `peft` has no adapter"):
        save_lora(tuning, workspace.installed, state.init, state.params, "base", tmp_path)


# ---- embeddings


@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding_s_adapter_is_a_change_of_its_rows(padding: int | None) -> None:
    torch.manual_seed(0)
    old, ids = nn.Embedding(6, 4, padding_idx=padding), torch.tensor([[0, 3, 5], [3, 3, 1]])
    layer = filled(lora_layer(old, 2, 0.5, 0.9)).train()
    rows = old.weight + 0.5 * (layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(ids), rows[ids], atol=1e-6, rtol=1e-5)
    layer(ids).sum().backward()
    assert layer.lora_A.grad is not None
    # as in nn.Embedding, the padding's own column does not learn
    assert [bool(column.any()) for column in layer.lora_A.grad.T] == [True, True, False, padding is None, False, True]


EMBEDDINGS = {
    "bert": ("word_embeddings", "query"),
    "gemma3": ("embed_tokens",),
    "gpt2": ("wte", "c_attn"),
    "t5": ("relative_attention_bias", "v"),
    "vit": ("projection", "v_proj"),
}
TASKS = {"vit": None, "t5": "TOKEN_CLS"}


@pytest.mark.parametrize("init", INITS, ids=str)
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_adapters_on_modules_of_all_kinds_are_those_of_peft(family: str, init: LoRAInit, tmp_path: Path) -> None:
    task = toy_task(family, num_examples=16)
    tuning, workspace, state = settled(task, EMBEDDINGS[family], init)
    says = logits(task, workspace.model)
    save_lora(tuning, workspace.installed, state.init, state.params, "base", tmp_path, TASKS.get(family, "SEQ_CLS"))
    theirs = peft.PeftModel.from_pretrained(task.make_model(), tmp_path)
    assert float((says - logits(task, task.make_model())).abs().max()) > 1e-3
    torch.testing.assert_close(logits(task, theirs), says, atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", INITS, ids=str)
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_what_was_learnt_added_to_the_weights_is_the_same_model(family: str, init: LoRAInit) -> None:
    task = toy_task(family, num_examples=16)
    tuning, workspace, state = settled(task, EMBEDDINGS[family], init)
    carry = close_phase(workspace, Recipe(tuning=tuning, local=LOCAL), state)
    merged = task.make_model()
    named = dict(merged.named_parameters())
    with torch.no_grad():
        for name, change in carry.delta.items():
            assert change.shape == named[name].shape
            # the start from a change is on the base as it was, so that all of the product is new
            named[name].add_(change)
        for name, value in carry.head.items():
            named[name].copy_(value)
    torch.testing.assert_close(logits(task, merged), logits(task, workspace.model), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("bert", ["word_embeddings", "query"]), ("vit", ["projection"]), ("gpt2", ["wte", "c_attn"])],
)
def test_names_and_shapes_go_to_peft_and_back(family: str, targets: list[str]) -> None:
    task = toy_task(family, num_examples=16)
    workspace, _, state = opened(task, LoRA(rank=3, targets=tuple(targets)))
    head = {"gpt2": "score"}.get(family, "classifier")
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=[head], fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(task.make_model(), config), save_embedding_layers=False)
    ours = to_peft(state.params, workspace.model)
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}
    back = from_peft(ours)
    assert back.keys() == state.params.keys()
    assert all(torch.equal(back[name], value) for name, value in state.params.items())
    assert from_peft(theirs).keys() == state.params.keys()


@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_an_embedding_is_found_only_by_name(targets: str) -> None:
    found = find(tiny_model("bert"), targets, frozenset())
    assert not any(isinstance(module, nn.Embedding) for module in found.values())
    assert list(find(tiny_model("bert"), ("word_embeddings",), frozenset())) == ["bert.embeddings.word_embeddings"]


@pytest.mark.parametrize("family", ["bert", "vit", "mobilenet_v1"])
def test_a_sparse_mask_reaches_kernels_and_embeddings(family: str) -> None:
    targets = {"bert": ("word_embeddings",), "vit": ("projection",)}.get(family, "all-linear")
    task = toy_task(family, num_examples=16)
    workspace, recipe, state = opened(task, SparseMask(density=0.3, targets=targets))
    after = turn(workspace, recipe, state)
    changes = recipe.tuning.changes(workspace.installed, state.init, after.params)
    before, now = dict(task.make_model().named_parameters()), dict(workspace.model.named_parameters())
    for name, change in changes.items():
        torch.testing.assert_close(before[name] + change, now[name], atol=1e-6, rtol=0)
    assert any(bool(change.any()) for change in changes.values())


# ---- weights with two places, and models without a head


@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma3"])
def test_a_tied_weight_is_trained_counted_and_sent_once(family: str) -> None:
    workspace, recipe, state = opened(with_head(family, "CausalLM"), Full())
    model = workspace.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore[operator]
    assert embedding is head
    assert sum(value.numel() for value in state.params.values()) == model.num_parameters()  # type: ignore[operator]
    assert set(state.schema.groups.values()) == {"adapter"}
    after, row = run_round(recipe, state, (0,), Serial(workspace, equal_population(16, 1)), seed=3, rounds=1)
    assert row.down_bytes["adapter"] <= 4 * model.num_parameters() + 8  # type: ignore[operator]
    workspace.installed.load(after.params)
    name = next(name for name, value in workspace.installed.parameters.items() if value is embedding)
    assert not torch.equal(after.params[name], state.params[name])
    assert torch.equal(head, after.params[name])


@pytest.mark.parametrize("tuning", [LoRA(rank=2, targets=("wte",)), SparseMask(targets=("lm_head",))], ids=str)
def test_a_tied_weight_is_no_target_because_its_other_use_would_change_too(tuning: Tuning) -> None:
    with pytest.raises(ConfigError, match=r"its weight is that of (lm_head|transformer\.wte) too"):
        opened(with_head("gpt2", "CausalLM"), tuning)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_linear_leaves_the_output_embedding_of_a_language_model_alone(family: str) -> None:
    model = tiny_model(family, head="CausalLM")
    assert "lm_head" not in find(model, "all-linear", frozenset())
    assert "lm_head" not in find(model, "default", frozenset())
    if family == "llama":
        assert list(find(model, ("lm_head",), frozenset())) == ["lm_head"]


def test_head_only_on_a_language_model_says_that_there_is_no_head() -> None:
    with pytest.raises(ConfigError, match="head_only would train nothing: GPT2LMHeadModel has no task head of its own"):
        opened(with_head("gpt2", "CausalLM"), HeadOnly())


HEADS: list[tuple[str, Head, str]] = [
    ("gpt2", "CausalLM", "CAUSAL_LM"),
    ("gemma3", "CausalLM", "CAUSAL_LM"),
    ("qwen3", "TokenClassification", "TOKEN_CLS"),
    ("bert", "TokenClassification", "TOKEN_CLS"),
    ("bert", "QuestionAnswering", "QUESTION_ANS"),
]


@pytest.mark.parametrize(("family", "head", "task_type"), HEADS)
def test_the_task_is_written_and_a_model_without_a_head_saves_none(
    family: str, head: Head, task_type: str, tmp_path: Path
) -> None:
    task = with_head(family, head)
    if head == "QuestionAnswering":
        task.logits = lambda model, batch: (
            model(  # type: ignore[method-assign]
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).start_logits
        )
    tuning, workspace, state = settled(task, "default", Kaiming())
    save_lora(tuning, workspace.installed, state.init, state.params, "base", tmp_path, task_type)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task_type
    assert (config["modules_to_save"] is None) == (head == "CausalLM")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(".lora_" not in name for name in stored) == (0 if head == "CausalLM" else 2)
    says, theirs = logits(task, workspace.model), peft.PeftModel.from_pretrained(task.make_model(), tmp_path)
    assert float((says - logits(task, task.make_model())).abs().max()) > 1e-3
    torch.testing.assert_close(logits(task, theirs), says, atol=1e-4, rtol=0)


def test_peft_s_tunings_take_a_model_without_a_head() -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    workspace, recipe, state = opened(with_head("gpt2", "CausalLM"), Peft(config=config))
    after = turn(workspace, recipe, state)
    assert set(state.schema.groups.values()) == {"adapter"}
    assert any(not torch.equal(after.params[name], value) for name, value in state.params.items())

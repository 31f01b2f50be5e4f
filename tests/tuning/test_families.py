"""Every family of models with every tuning: the start, the gradients, a round with bytes, and the adapter in PEFT."""

from __future__ import annotations

import functools
import math
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures.more import some_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError
from fedlora.core.state import PhaseHandover, ServerState
from fedlora.engines import Serial
from fedlora.methods import METHODS
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.downlink import view
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.rounds.round import run_round
from fedlora.testing import FAMILIES, IMAGE_FAMILIES, TensorTask, default_head, equal_population, toy_task
from fedlora.tuning import (
    BitFit,
    Bottleneck,
    Full,
    HeadOnly,
    LoRA,
    Orthogonal,
    Peft,
    SparseMask,
    SvdOfDelta,
    SvdOfWeight,
    Tuning,
)
from fedlora.tuning.export import save_lora, save_peft
from fedlora.tuning.lora import lora_layers
from fedlora.tuning.targets import find, replace_module

# peft reads a name that transformers 5 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TUNINGS: dict[str, Tuning] = {
    "lora": LoRA(rank=4, alpha=12.0),
    "federa": LoRA(rank=4, alpha=12.0, init=SvdOfWeight()),
    "sparse_mask": SparseMask(density=0.1, biases=True),
    "bitfit": BitFit(),
    "pfeiffer": Bottleneck(width=4, style="pfeiffer"),
    "houlsby": Bottleneck(width=4, style="houlsby"),
    "full": Full(),
    "head_only": HeadOnly(),
}
EVERY = FAMILIES + IMAGE_FAMILIES
WITHOUT_BIASES = ("llama", "qwen3", "gemma", "gemma3", "modernbert", "t5")
CONVOLUTIONAL = ("mobilenet_v1", "mobilenet_v2")
WITH_BLOCKS = [family for family in EVERY if family not in CONVOLUTIONAL]
WITHOUT = {"bitfit": WITHOUT_BIASES, "pfeiffer": CONVOLUTIONAL, "houlsby": CONVOLUTIONAL}
PAIRS = [(f, t) for f in EVERY for t in TUNINGS if f not in WITHOUT.get(t, ())]
PEFT_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "ImageClassification": None}
CPU = torch.device("cpu")
LOCAL = Local(batch_size=4, dropout=False)


def make_task(family: str) -> TensorTask:
    """A toy task whose biases and norms are not the ones and zeros of a fresh model."""
    task = toy_task(family, num_examples=16)
    fresh = task.make_model

    def noisy() -> nn.Module:
        model, generator = fresh(), torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    task.make_model = noisy
    return task


def opened(family: str, tuning: Tuning) -> tuple[Workspace, Recipe, ServerState]:
    workspace, recipe = Workspace(make_task(family), 0, CPU), Recipe(tuning=tuning, local=LOCAL)
    state, _ = open_phase(workspace, 0, recipe, seed=3, rounds_done=0, carry=None)
    return workspace, recipe, state


def logits(task: TensorTask, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return task.logits(model.eval(), task.batch(task.labels * 0 + range(16), CPU))


def gradients(workspace: Workspace) -> None:
    batch = workspace.task.batch(workspace.task.labels * 0 + range(16), CPU)  # type: ignore[attr-defined]
    workspace.task.loss(workspace.model.eval(), batch).backward()  # type: ignore[no-untyped-call]


@functools.cache
def base_logits(family: str) -> Tensor:
    """What the pre-trained model says."""
    task = make_task(family)
    return logits(task, task.make_model())


@functools.cache
def dense_gradients(family: str) -> dict[str, Tensor]:
    workspace, _, _ = opened(family, Full())
    gradients(workspace)
    return {name: value.grad for name, value in workspace.installed.parameters.items() if value.grad is not None}


@pytest.mark.parametrize(("family", "tuning"), PAIRS)
def test_the_start_is_the_pre_trained_function_and_a_round_moves_what_is_trained_alone(
    family: str, tuning: str
) -> None:
    workspace, recipe, state = opened(family, TUNINGS[tuning])
    workspace.installed.load(view(recipe, state, 0))
    task = workspace.task
    assert isinstance(task, TensorTask)
    torch.testing.assert_close(logits(task, workspace.model), base_logits(family), atol=1e-4, rtol=0)
    trained = set(workspace.installed.parameters)
    touched = {*trained, *workspace.installed.places}
    frozen = {n: v.detach().clone() for n, v in workspace.model.named_parameters() if n not in touched}
    engine = Serial(workspace, equal_population(16, 2))
    after, row = run_round(recipe, state, (0, 1), engine, seed=3, rounds=1)
    assert math.isfinite(row.loss)
    assert (row.steps, row.examples) == (4, 16)
    assert all(size > 0 for size in (*row.down_bytes.values(), *row.up_bytes.values()))
    for group in set(state.schema.groups.values()):
        assert any(
            not torch.equal(after.params[n], v) for n, v in state.params.items() if state.schema[n].group == group
        )
    now = dict(workspace.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("family", WITHOUT_BIASES)
def test_bitfit_refuses_a_model_without_biases(family: str) -> None:
    with pytest.raises(ConfigError, match="bias"):
        opened(family, BitFit())


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("init", ["lora", "federa"])
def test_gradients_of_the_factors_are_those_of_the_matrix_projected(family: str, init: str) -> None:
    """``dL/dB = scale (dL/dW) A^T`` and ``dL/dA = scale B^T (dL/dW)``, over all uses of a shared matrix."""
    expected = dense_gradients(family)
    workspace, recipe, state = opened(family, TUNINGS[init])
    workspace.installed.load(view(recipe, state, 0))
    gradients(workspace)
    for name, layer in lora_layers(workspace.model).items():
        whole = layer.as_matrix(expected[f"{name}.weight"])
        projected = {"lora_B": 3.0 * whole @ layer.lora_A.T, "lora_A": 3.0 * layer.lora_B.T @ whole}
        for leaf, gradient in projected.items():
            tolerance = 1e-4 * max(1.0, float(gradient.detach().abs().max()))
            torch.testing.assert_close(getattr(layer, leaf).grad, gradient, atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("family", EVERY)
def test_gradients_of_packed_values_are_those_of_the_matrix_at_their_places(family: str) -> None:
    expected = dense_gradients(family)
    workspace, recipe, state = opened(family, TUNINGS["sparse_mask"])
    workspace.installed.load(view(recipe, state, 0))
    gradients(workspace)
    for name, index in workspace.installed.places.items():
        packed = workspace.installed.parameters[name].grad
        torch.testing.assert_close(packed, expected[name].reshape(-1)[index], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "federa"])
def test_albert_has_one_adapter_per_shared_matrix(tuning: str) -> None:
    workspace, _, state = opened("albert", TUNINGS[tuning])
    assert workspace.model.config.num_hidden_layers == 2  # type: ignore[union-attr]
    endings = sorted(".".join(n.split(".")[-2:]) for n, g in state.schema.groups.items() if g == "adapter")
    assert endings == ["query.lora_A", "query.lora_B", "value.lora_A", "value.lora_B"]


def test_albert_has_one_mask_per_shared_matrix() -> None:
    workspace, _, _ = opened("albert", SparseMask(density=0.1, targets=("query", "ffn")))
    assert sorted(name.split(".")[-2] for name in workspace.installed.places) == ["ffn", "query"]


def test_gpt2_factors_have_the_orientation_of_the_product() -> None:
    workspace, _, state = opened("gpt2", TUNINGS["lora"])
    layer = workspace.model.get_submodule("transformer.h.0.attn.c_attn")
    assert tuple(layer.weight.shape) == (32, 96)  # type: ignore[union-attr, operator]
    assert state.params["transformer.h.0.attn.c_attn.lora_A"].shape == (4, 32)
    assert state.params["transformer.h.0.attn.c_attn.lora_B"].shape == (96, 4)


@pytest.mark.parametrize("family", WITH_BLOCKS)
def test_default_targets_are_one_kind_of_matrix_in_every_layer(family: str) -> None:
    model = make_task(family).make_model()
    found = find(model, "default", frozenset())
    layers = 1 if family == "albert" else 2
    assert len(found) == layers * len({name.rsplit(".", 1)[1] for name in found})


@pytest.mark.parametrize("family", EVERY)
def test_all_linear_finds_every_matrix_but_the_head(family: str) -> None:
    task = make_task(family)
    model, head = task.load_model(0, "fp32", CPU)
    heads = {name.rsplit(".", 1)[0] for name in head}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    whole = {name for name, module in convolutions(model).items() if module.groups == 1}
    assert set(find(model, "all-linear", head)) == (linear | whole) - heads


@pytest.mark.parametrize(("family", "number"), [("mobilenet_v1", 14), ("mobilenet_v2", 35)])
def test_the_default_of_a_convolutional_family_is_every_convolution_in_one_group(family: str, number: int) -> None:
    model, head = make_task(family).load_model(0, "fp32", CPU)
    whole = {name for name, module in convolutions(model).items() if module.groups == 1}
    assert set(find(model, "default", head)) == whole
    assert len(whole) == number < len(convolutions(model))


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query",), ["query"]),
        (("attention.output.dense",), ["dense"]),
        ("query", ["query"]),
        ("attention.output.dense", ["dense"]),
        ("word_embeddings", ["word_embeddings"]),
        (("word_embeddings",), ["word_embeddings"]),
        (r".*\.layer\.1\.attention\.self\.(key|value)", ["key", "value"]),
    ],
)
def test_targets_are_endings_or_a_whole_match(targets: str | tuple[str, ...], expected: list[str]) -> None:
    found = find(make_task("bert").make_model(), targets, frozenset())
    assert sorted({name.rsplit(".", 1)[1] for name in found}) == expected


def test_an_ending_matches_whole_words_only() -> None:
    with pytest.raises(ConfigError, match="matches nothing"):
        find(make_task("bert").make_model(), ("uery",), frozenset())


def test_targets_of_the_head_alone_are_refused() -> None:
    model, head = make_task("bert").load_model(0, "fp32", CPU)
    for targets in ("classifier", ("classifier",), "class.*"):
        with pytest.raises(ConfigError, match="selects classifier alone, of the head, which is trained whole"):
            find(model, targets, head)


@pytest.mark.parametrize("targets", [("nothing",), "nothing"])
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(targets: str | tuple[str, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"matches nothing in BertFor.*whole name or the end of names, a list has ends.*query, token"
    ):
        opened("bert", LoRA(rank=2, targets=targets))


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        opened("bert", LoRA(rank=2, targets="(query"))


def test_a_rank_above_the_smaller_side_may_be_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError, match="choose a rank up to 32"):
        opened("bert", LoRA(rank=33, strict_rank=True))


def test_bottleneck_in_an_unknown_family_asks_for_targets() -> None:
    model = make_task("bert").make_model()
    model.config.model_type = "unheard-of"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="give `targets`"):
        Bottleneck().install(model, frozenset(), 0)


def test_bottleneck_takes_targets_for_unknown_families() -> None:
    model = make_task("bert").make_model()
    model.config.model_type = "unheard-of"  # type: ignore[union-attr]
    installed = Bottleneck(width=2, targets=r".*\.layer\.\d+\.output\.dense").install(model, frozenset(), 0)
    assert len(installed.parameters) == 2 * 4


@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_bottleneck_refuses_a_family_without_linear_layers(family: str) -> None:
    with pytest.raises(ConfigError, match="has none outside its head; use `lora`"):
        opened(family, Bottleneck())


def test_bottleneck_refuses_a_convolution_by_name() -> None:
    with pytest.raises(ConfigError, match=r"follow linear layers, and .*\.projection is Conv2d"):
        opened("vit", Bottleneck(targets=r".*\.projection"))


@pytest.mark.parametrize(("style", "places"), [("pfeiffer", 1), ("houlsby", 2)])
@pytest.mark.parametrize("family", WITH_BLOCKS)
def test_bottlenecks_sit_once_or_twice_in_a_layer(family: str, style: str, places: int) -> None:
    _, _, state = opened(family, TUNINGS[style])
    layers = 1 if family == "albert" else 2
    assert sum(name.endswith("adapter_down") for name in state.params) == places * layers


def test_a_bottleneck_computes_its_formula() -> None:
    workspace, _, _ = opened("bert", Bottleneck(width=2))
    module = workspace.model.get_submodule("bert.encoder.layer.0.output.dense")
    with torch.no_grad():
        for leaf in ("down", "down_bias", "up", "up_bias"):
            getattr(module, f"adapter_{leaf}").normal_(generator=torch.Generator().manual_seed(len(leaf)))
    inputs = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    h = inputs @ module.weight.T + module.bias  # type: ignore[operator, union-attr]
    narrow = (h @ module.adapter_down.T + module.adapter_down_bias).clamp(min=0)  # type: ignore[operator, union-attr]
    expected = h + narrow @ module.adapter_up.T + module.adapter_up_bias  # type: ignore[operator, union-attr]
    torch.testing.assert_close(module(inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_module_in_two_places_of_one_list_is_replaced_in_both() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    replace_module(model, "0", nn.Identity())
    assert isinstance(model[0], nn.Identity)
    assert model[0] is model[2]


# ---- the adapter in PEFT

STARTS: dict[str, LoRA] = {
    "kaiming": LoRA(rank=3, alpha=6.0),
    "orthogonal": LoRA(rank=3, alpha=6.0, init=Orthogonal()),
    "svd_of_weight": LoRA(rank=3, alpha=6.0, init=SvdOfWeight()),
    "svd_of_delta": LoRA(rank=3, alpha=6.0, init=SvdOfDelta()),
}
OF_EACH_KIND = ("albert", "gpt2", "vit", "mobilenet_v2")
EXPORTS = [(f, i) for f in EVERY for i in STARTS if f in OF_EACH_KIND or i in ("kaiming", "svd_of_weight")]
LIVELY = Local(optimizer=Sgd(lr=0.3), batch_size=4, dropout=False)


def trained(family: str, tuning: Tuning, carry: PhaseHandover | None = None) -> tuple[Workspace, ServerState, Tensor]:
    """After a round with bytes: the model holds what was learnt, and says this."""
    workspace, recipe = Workspace(make_task(family), 0, CPU), Recipe(tuning=tuning, local=LIVELY)
    state, _ = open_phase(workspace, 0, recipe, seed=3, rounds_done=0, carry=carry)
    state, row = run_round(recipe, state, (0, 1), Serial(workspace, equal_population(16, 2)), seed=3, rounds=1)
    assert min(*row.down_bytes.values(), *row.up_bytes.values()) > 0
    workspace.installed.load(state.params)
    return workspace, state, logits(make_task(family), workspace.model)


def loaded(family: str, folder: Path) -> Tensor:
    """What the adapter says on a fresh base, by PEFT alone."""
    task = make_task(family)
    model = peft.PeftModel.from_pretrained(task.make_model(), folder)
    # their padding reads the stride off a convolution, which peft's module hides
    return logits(task, model.merge_and_unload() if family in CONVOLUTIONAL else model)


def changed(family: str, says: Tensor) -> bool:
    return float((says - base_logits(family)).abs().max()) > 5e-3


@pytest.mark.parametrize(("family", "start"), EXPORTS)
def test_peft_computes_what_was_trained(family: str, start: str, tmp_path: Path) -> None:
    tuning, carry = STARTS[start], None
    if start == "svd_of_delta":
        before = make_task(family).make_model()
        noise = torch.Generator().manual_seed(1)
        found = {f"{name}.weight": module.weight for name, module in find(before, "default", frozenset()).items()}
        carry = PhaseHandover({n: 0.02 * torch.randn(w.shape, generator=noise) for n, w in found.items()}, {})
    workspace, state, says = trained(family, tuning, carry)
    save_lora(tuning, workspace.installed, state.init, state.params, "base", tmp_path, PEFT_TASKS[default_head(family)])
    assert changed(family, says)
    torch.testing.assert_close(loaded(family, tmp_path), says, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", EVERY)
def test_peft_s_own_lora_trains_and_comes_back(family: str, tmp_path: Path) -> None:
    names = sorted(find(make_task(family).make_model(), "default", frozenset({"classifier.weight"})))
    config = {"peft_type": "LORA", "r": 3, "target_modules": names, "fan_in_fan_out": family == "gpt2"}
    workspace, _, says = trained(family, Peft(config=config))
    save_peft(workspace.installed, "base", tmp_path)
    assert changed(family, says)
    torch.testing.assert_close(loaded(family, tmp_path), says, atol=1e-4, rtol=0)


# ---- whole methods

SMALL: dict[str, dict[str, Any]] = {
    **{method: {"rank": 3} for method in METHODS if method not in ("fedavg", "full")},
    **{method: {"rank": 3, "warm_rounds": 1, "warm_local": LOCAL} for method in ("slora", "primed_lora")},
    "fedavg": {"tuning": LoRA(rank=3)},
}


# every method in two families, and the rest with the slow tests
KINDS = ("gemma3", "t5", "vit", "mobilenet_v2")
TWICE = {(f, m) for i, f in enumerate(KINDS) for j, m in enumerate(METHODS) if (i + j) % 2 == 0}


@pytest.mark.parametrize(("family", "method"), some_of(product(KINDS, METHODS), TWICE))
def test_every_method_trains_in_families_of_each_kind(family: str, method: str) -> None:
    phases = METHODS[method](rounds=2, local=LOCAL, **SMALL.get(method, {}))
    workspace, carry, done = Workspace(make_task(family), 0, CPU), None, 0
    for number, phase in enumerate(phases):
        start, _ = open_phase(workspace, number, phase.recipe, seed=3, rounds_done=done, carry=carry)
        engine, state = Serial(workspace, equal_population(16, 2)), start
        for _ in range(phase.rounds):
            state, row = run_round(phase.recipe, state, (0, 1), engine, seed=3, rounds=2)
            assert math.isfinite(row.loss)
            assert row.update_norm > 0
        moved = [name for name, value in state.params.items() if not torch.equal(value, start.params[name])]
        assert {state.schema[name].group for name in moved} == {"adapter", "head"}
        carry, done = close_phase(workspace, phase.recipe, state), state.round
    assert done == 2

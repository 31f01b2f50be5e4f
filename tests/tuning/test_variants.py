"""rsLoRA, DoRA, ranks and alphas by module, and some layers only: the formulas, the start, and what ``peft`` loads."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_families import PEFT_TASKS, base_logits, changed, loaded, logits, make_task, opened, trained
from torch import Tensor, nn

from fedlora.config import Experiment, digest, parse, resolved
from fedlora.core.errors import ConfigError
from fedlora.core.state import PhaseHandover
from fedlora.engines import Serial
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.rounds.round import run_round
from fedlora.testing import default_head, equal_population
from fedlora.tuning import LoRA, Orthogonal, SvdOfDelta, SvdOfWeight
from fedlora.tuning.dora import MAGNITUDE, DoRALinear
from fedlora.tuning.export import save_lora
from fedlora.tuning.lora import lora_layers
from fedlora.tuning.targets import find, in_layers, of_ending

# peft reads a name that transformers 5 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANKS: dict[str, Any] = {
    "rank_pattern": {"value": 5, "layer.1.attention.self.value": 2},
    "alpha_pattern": {"query": 9.0},
}
VARIANTS: dict[str, tuple[str, LoRA]] = {
    "rslora": ("bert", LoRA(rank=3, alpha=6.0, rslora=True)),
    "rslora from svd": ("bert", LoRA(rank=3, alpha=6.0, rslora=True, init=SvdOfWeight())),
    "ranks": ("bert", LoRA(rank=3, alpha=6.0, **RANKS)),
    "ranks from svd": ("bert", LoRA(rank=3, alpha=6.0, init=SvdOfWeight(split="left"), **RANKS)),
    "ranks with rslora from svd": ("bert", LoRA(rank=3, alpha=6.0, rslora=True, init=SvdOfWeight(), **RANKS)),
    "ranks of rows and columns": ("gpt2", LoRA(rank=3, rank_pattern={"c_fc": 1}, targets=("c_attn", "c_fc"))),
    "layers": ("bert", LoRA(rank=3, alpha=6.0, layers_to_transform=(1,))),
    "a rank above a side": ("mobilenet_v2", LoRA(rank=12, alpha=24.0)),
    "a rank above a side from svd": ("mobilenet_v2", LoRA(rank=12, alpha=24.0, init=SvdOfWeight())),
    "dora": ("bert", LoRA(rank=3, alpha=6.0, dora=True)),
    "dora without biases": ("llama", LoRA(rank=3, alpha=6.0, dora=True, targets="all-linear")),
    "dora, transposed": ("gpt2", LoRA(rank=3, alpha=6.0, dora=True)),
    "dora of shared matrices": ("albert", LoRA(rank=3, alpha=6.0, dora=True)),
    "dora, orthogonal": ("bert", LoRA(rank=3, alpha=6.0, dora=True, init=Orthogonal())),
    "dora from svd": ("bert", LoRA(rank=3, alpha=6.0, dora=True, init=SvdOfWeight())),
    "dora, ranks with rslora": ("bert", LoRA(rank=3, alpha=6.0, dora=True, rslora=True, **RANKS)),
    "dora in a layer": ("bert", LoRA(rank=3, alpha=6.0, dora=True, layers_to_transform=(0,))),
}


def matrices(tuning: LoRA, family: str) -> dict[str, nn.Module]:
    model = make_task(family).make_model()
    return dict(in_layers(find(model, tuning.targets, frozenset()), tuning.layers_to_transform))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_start_is_the_pre_trained_function(name: str) -> None:
    family, tuning = VARIANTS[name]
    workspace, _, state = opened(family, tuning)
    workspace.installed.load(state.params)
    task = make_task(family)
    torch.testing.assert_close(logits(task, workspace.model), base_logits(family), atol=1e-4, rtol=0)
    shapes = {name: layer.lora_A.shape[0] for name, layer in lora_layers(workspace.model).items()}
    sides = {name: min(layer.rows, layer.columns) for name, layer in lora_layers(workspace.model).items()}
    assert shapes == {n: min(of_ending(n, tuning.rank_pattern, tuning.rank), sides[n]) for n in shapes}


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_peft_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    family, tuning = VARIANTS[name]
    workspace, state, says = trained(family, tuning)
    save_lora(tuning, workspace.installed, state.init, state.params, "base", tmp_path, PEFT_TASKS[default_head(family)])
    assert changed(family, says)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The following (rank|alpha)_pattern keys did not match")
        torch.testing.assert_close(loaded(family, tmp_path), says, atol=1e-4, rtol=0)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["use_rslora"], settings["use_dora"]) == (tuning.rslora, tuning.dora)
    assert settings["layers_to_transform"] == (list(tuning.layers_to_transform) or None)
    times = 2 if tuning.residual else 1
    assert settings["r"] == times * tuning.rank
    ranks = {layer.lora_A.shape[0] for layer in lora_layers(workspace.model).values()}
    assert set(settings["rank_pattern"].values()) == {times * rank for rank in ranks - {tuning.rank}}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_learnt_added_to_the_weights_is_the_same_model(name: str) -> None:
    family, tuning = VARIANTS[name]
    workspace, state, says = trained(family, tuning)
    learnt = close_phase(workspace, Recipe(tuning=tuning), state)
    model = make_task(family).make_model()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in learnt.delta.items():
            named[key].add_(value)
        for key, value in learnt.head.items():
            named[key].copy_(value)
    torch.testing.assert_close(logits(make_task(family), model), says, atol=1e-4, rtol=0)


def test_scales_are_alpha_by_rank_or_by_its_root() -> None:
    assert LoRA(alpha=8.0, rank=4).scale_of("query", 4) == 2.0
    assert LoRA(alpha=8.0, rank=4, rslora=True).scale_of("query", 4) == 4.0
    patterns = LoRA(alpha=8.0, alpha_pattern={"query": 2.0, "1.query": 6.0})
    assert [patterns.scale_of(name, 2) for name in ("layer.0.query", "layer.1.query", "a.key")] == [1.0, 3.0, 4.0]
    assert patterns.scale_of("layer.11.query", 2) == 1.0  # 1.query is no end of its name


@pytest.mark.parametrize("rslora", [False, True])
def test_an_svd_start_is_the_best_approximation_under_the_scale_of_its_layer(rslora: bool) -> None:
    tuning = LoRA(rank=3, alpha=6.0, rslora=rslora, init=SvdOfWeight(), **RANKS)
    workspace, _, state = opened("bert", tuning)
    base = make_task("bert").make_model()
    for name, layer in lora_layers(workspace.model).items():
        weight = base.get_submodule(name).weight.detach()
        left, values, right = torch.linalg.svd(weight)
        rank = layer.lora_A.shape[0]
        product = layer.scale * state.params[f"{name}.lora_B"] @ state.params[f"{name}.lora_A"]
        best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
        torch.testing.assert_close(product, best, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.weight + product, weight, atol=1e-6, rtol=0)
        alpha = 9.0 if name.endswith("query") else 6.0
        assert layer.scale == pytest.approx(alpha / (math.sqrt(rank) if rslora else rank))


# ---- DoRA


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_peft(dropout: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, inputs = Two(), torch.randn(7, 3, 6)
    theirs = Two()
    theirs.load_state_dict(ours.state_dict())
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, use_dora=True, lora_dropout=dropout, target_modules=["first", "second"]
    )
    wrapped = peft.get_peft_model(theirs, settings)  # type: ignore[arg-type]
    pairs = []
    for name in ("first", "second"):
        layer, other = (
            DoRALinear(getattr(ours, name), 2, 3.0, dropout),
            wrapped.get_submodule(f"base_model.model.{name}"),
        )
        with torch.no_grad():
            other.lora_A["default"].weight.normal_()
            other.lora_B["default"].weight.normal_()
            other.lora_magnitude_vector["default"].weight.mul_(1.0 + torch.rand(layer.rows))
            layer.lora_A.copy_(other.lora_A["default"].weight)
            layer.lora_B.copy_(other.lora_B["default"].weight)
            layer.lora_magnitude_vector.copy_(other.lora_magnitude_vector["default"].weight)
        setattr(ours, name, layer)
        pairs += [
            (layer.lora_A, other.lora_A["default"].weight),
            (layer.lora_B, other.lora_B["default"].weight),
            (layer.lora_magnitude_vector, other.lora_magnitude_vector["default"].weight),
        ]
    results = []
    for model in (ours, wrapped):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results.append(model.train()(inputs))
        (results[-1].float() * torch.arange(4)).sum().backward()
    exact = dtype == torch.float32
    atol = 1e-5 if exact else 0.05 * float(results[1].detach().abs().max())
    torch.testing.assert_close(results[0], results[1].to(results[0].dtype), atol=atol, rtol=1e-5)
    for mine, its in pairs:
        atol = 1e-4 if exact else 0.1 * float(its.grad.abs().max())
        torch.testing.assert_close(mine.grad, its.grad, atol=atol, rtol=1e-4)


def test_rows_start_with_their_length_wherever_the_factors_start() -> None:
    for init in (SvdOfWeight(), Orthogonal(), SvdOfDelta()):
        workspace, _, state = opened("bert", LoRA(rank=2, dora=True, init=init))
        for name in lora_layers(workspace.model):
            weight = make_task("bert").make_model().get_submodule(name).weight.detach()
            torch.testing.assert_close(state.params[f"{name}.{MAGNITUDE}"], weight.norm(dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fold", ["none", "rest"])
def test_dora_goes_on_from_the_change_of_an_earlier_phase(fold: Any, tmp_path: Path) -> None:
    before = make_task("gpt2").make_model()
    noise = torch.Generator().manual_seed(1)
    found = {f"{name}.weight": module.weight for name, module in find(before, "default", frozenset()).items()}
    delta = {name: 0.05 * torch.randn(weight.shape, generator=noise) for name, weight in found.items()}
    tuning = LoRA(rank=32, alpha=64.0, dora=True, init=SvdOfDelta(fold=fold))
    recipe = Recipe(tuning=tuning, local=Local(optimizer=Sgd(lr=0.3), batch_size=4))
    workspace, state, says = trained("gpt2", tuning, PhaseHandover(delta, {}))
    start, _ = open_phase(workspace, 0, recipe, 3, 0, PhaseHandover(delta, {}))
    workspace.installed.load(start.params)
    with torch.no_grad():
        for name, change in delta.items():
            dict(before.named_parameters())[name].add_(change)
    # the smaller side is 32, so that nothing of the change is cut off
    torch.testing.assert_close(
        logits(make_task("gpt2"), workspace.model), logits(make_task("gpt2"), before), atol=1e-4, rtol=0
    )
    if fold == "none":
        save_lora(tuning, workspace.installed, state.init, state.params, "base", tmp_path, "SEQ_CLS")
        torch.testing.assert_close(loaded("gpt2", tmp_path), says, atol=1e-4, rtol=0)


def test_dora_needs_linear_layers_with_values() -> None:
    with pytest.raises(
        ConfigError, match=r"dora = true needs linear layers, and .* is Conv2d; leave it out of `targets`"
    ):
        opened("mobilenet_v2", LoRA(rank=1, dora=True))
    with pytest.raises(ConfigError, match=r"dora = true needs linear layers, and .*word_embeddings is Embedding"):
        opened("bert", LoRA(rank=1, dora=True, targets=("word_embeddings",)))

    class Codes(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.weight = nn.Parameter(torch.empty(12, 1, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(ConfigError, match="dora = true needs the values of 0, which are stored quantised"):
        LoRA(rank=1, dora=True, targets=("0",)).install(nn.Sequential(Codes()), frozenset(), 0)


def test_dora_trains_in_bfloat16_near_float32() -> None:
    found = []
    for compute in ("fp32", "bf16"):
        local = Local(optimizer=Sgd(lr=0.1), batch_size=8, compute=compute)  # type: ignore[arg-type]
        workspace, _, _ = opened("bert", LoRA(rank=2, dora=True))
        recipe = Recipe(tuning=LoRA(rank=2, dora=True), local=local)
        state, _ = open_phase(workspace, 0, recipe, 3, 0, None)
        state, row = run_round(recipe, state, (0, 1), Serial(workspace, equal_population(16, 2)), seed=3, rounds=1)
        found.append((state.params, row.loss))
    (exact, loss), (rounded, other) = found
    assert other == pytest.approx(loss, abs=0.02)
    for name, value in exact.items():
        torch.testing.assert_close(rounded[name], value, atol=0.02, rtol=0.05)


# ---- names of modules and layers


def test_layers_are_the_first_number_of_a_name() -> None:
    names = ["enc.layers.0.blocks.1.query", "enc.layers.1.blocks.0.query", "enc.query"]
    every: Any = dict.fromkeys(names, nn.Linear(1, 1))
    assert list(in_layers(every, (0,))) == names[:1]
    assert list(in_layers(every, ())) == names
    with pytest.raises(ConfigError, match=r"layers_to_transform has 2, but the targets are in the layers 0, 1 alone"):
        in_layers(every, (0, 2))
    with pytest.raises(ConfigError, match="in no numbered layer"):
        in_layers({"query": nn.Linear(1, 1)}, (0,))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_has_ends_of_names_and_no_regular_expressions(key: str) -> None:
    for wrong in (".*query", "^query", "query$", "(a+)+", "", "a..b", "query\n"):
        with pytest.raises(ConfigError, match=f"{key} has .*, which is no name"):
            LoRA(**{key: {wrong: 2}})  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=f"{key} has 'quer', in which the name of no adapted module ends; .*: query, value"
    ):
        opened("bert", LoRA(rank=2, **{key: {"quer": 2}}))  # type: ignore[arg-type]


def test_a_rank_above_a_side_is_lowered_with_a_note_or_refused() -> None:
    workspace, _, _ = opened("mobilenet_v2", LoRA(rank=12))
    (note,) = workspace.installed.notes
    layers = lora_layers(workspace.model)
    lowered = [layer for layer in layers.values() if min(layer.rows, layer.columns) < 12]
    assert note.startswith(f"the rank of {len(lowered)} of {len(layers)} adapters is the smaller side of their matrix")
    assert all(layer.scale == 16.0 / layer.lora_A.shape[0] for layer in layers.values())
    assert opened("bert", LoRA(rank=2))[0].installed.notes == ()
    with pytest.raises(ConfigError, match=r"rank = 12 is above the smaller side of .* \(\d+\); choose a rank up to"):
        opened("mobilenet_v2", LoRA(rank=12, strict_rank=True))
    with pytest.raises(ConfigError, match=r"rank = 99 is above the smaller side of .*value \(32\)"):
        opened("bert", LoRA(rank=2, rank_pattern={"value": 99}, strict_rank=True))


# ---- configuration


def test_configurations_without_the_settings_keep_their_digest() -> None:
    plain, spelled = Experiment(), parse({"label": "run", "method": {"kind": "fedavg", "local": {"accumulate": 1}}})
    tuning = resolved(plain)["phases"][0]["recipe"]["tuning"]
    assert set(tuning) == {"kind", "rank", "alpha", "targets", "init", "dropout", "train"}
    default = LoRA(
        rslora=False, dora=False, rank_pattern={}, alpha_pattern={}, layers_to_transform=(), strict_rank=False
    )
    assert digest(Experiment(phases=(Phase(recipe=Recipe(tuning=default)),))) == digest(plain)
    assert "accumulate" not in resolved(spelled)["phases"][0]["recipe"]["local"]


def test_a_value_with_patterns_can_be_a_key() -> None:
    assert len({LoRA(rank_pattern={"query": 2}), LoRA(rank_pattern={"query": 2}), LoRA(rank_pattern={"query": 3})}) == 2


@pytest.mark.parametrize(
    "settings",
    [{"rslora": True}, {"dora": True}, RANKS, {"layers_to_transform": [0, 2]}, {"strict_rank": True}],
    ids=lambda settings: " ".join(settings),
)
def test_a_configuration_has_them_by_any_method(settings: dict[str, Any]) -> None:
    found = parse({"method": {"kind": "flasc", "tuning": settings}})
    tuning = found.phases[0].recipe.tuning
    assert isinstance(tuning, LoRA)
    assert resolved(found)["phases"][0]["recipe"]["tuning"].items() >= settings.items()
    assert parse(resolved(found)) == found
    assert digest(found) != digest(parse({"method": {"kind": "flasc"}}))

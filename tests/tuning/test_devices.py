"""Nothing that a tuning, a client or an evaluation makes stays behind on the CPU; checked without a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.more import some_of
from fixtures.simulated import DEVICE, Remote, simulated_device
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from fedlora.client.workspace import Workspace
from fedlora.core.state import PhaseHandover
from fedlora.core.tree import Tree
from fedlora.engines import Serial
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.rounds.round import run_round
from fedlora.server.aggregate import ProductExact, SparsityWeighted, Stack
from fedlora.server.pruning import Prune
from fedlora.show import describe
from fedlora.tasks.models.loading import head_names
from fedlora.testing import equal_population, tiny_model, toy_task
from fedlora.tuning import Bottleneck, Full, LoRA, Orthogonal, Peft, SparseMask, SvdOfDelta, SvdOfWeight, Tuning
from fedlora.tuning.bottleneck import BottleneckLinear
from fedlora.tuning.dora import DoRALinear
from fedlora.tuning.lora_layer import lora_layer

# peft reads a name that transformers 5 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "targets": "all-linear"},
    "bottleneck": {"width": 2},
    "sparse_mask": {"density": 0.1, "biases": True},
    "peft": {"config": {"peft_type": "LORA", "r": 3, "target_modules": ["query", "q"]}},
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "transposed": (lambda: Conv1D(4, 6), (2, 3, 6)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
    "embedding": (lambda: nn.Embedding(10, 4), (2, 3)),
}


# ---- installation


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("kind", describe.SLOTS["tuning"])
def test_every_parameter_of_an_installed_model_is_where_the_model_is(kind: str, family: str) -> None:
    if (kind, family) in {("bitfit", "t5"), ("peft", "gpt2")}:
        pytest.skip("there are no biases, or no matrices of these names")
    model = tiny_model(family).to("meta")
    tuning: Tuning = describe.SLOTS["tuning"][kind](**SETTINGS.get(kind, {}))
    installed = tuning.install(model, head_names(model, set()), 0)
    assert installed.parameters
    assert {parameter.device.type for parameter in installed.parameters.values()} == {"meta"}
    assert {parameter.device.type for parameter in installed.model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", ["vit", "mobilenet_v1"])
def test_adapters_of_image_models_are_where_the_model_is(family: str) -> None:
    model = tiny_model(family).to("meta")
    installed = LoRA(rank=1, targets="all-linear").install(model, head_names(model, set()), 0)
    assert {parameter.device.type for parameter in installed.model.parameters()} == {"meta"}


# ---- layers


class Codes(nn.Linear):
    """A linear layer whose weight is stored as bytes in one column, as quantised ones are."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.weight = nn.Parameter(torch.empty(12, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.narrow(-1, 0, 4)


def elsewhere(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer on a device that need not exist, and the shape of its inputs."""
    make, shape = {**LAYERS, "quantised": (Codes, (2, 3, 6))}[kind]
    layer = make()
    for name, value in list(layer.named_parameters()):
        moved = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        setattr(layer, name, nn.Parameter(moved, requires_grad=False))
    return layer, shape


@pytest.mark.parametrize("kind", [*(kind for kind in LAYERS if kind != "convolution"), "quantised"])
def test_an_adapter_computes_where_its_matrix_is(kind: str) -> None:
    # PyTorch without CUDA has no gradients of such tensors, and no indexing
    with FakeTensorMode(), torch.no_grad():
        old, shape = elsewhere(kind)
        inputs = torch.empty(shape, dtype=torch.int64 if kind == "embedding" else torch.float32, device="cuda")
        layer = lora_layer(old, 2, 0.5, 0.1).train()
        assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float32, torch.float32)
        assert layer(inputs).device.type == "cuda"
        if kind in ("linear", "transposed"):
            dora = DoRALinear(old, 2, 0.5, 0.1).train()
            assert dora.lora_magnitude_vector.device.type == dora(inputs).device.type == "cuda"


@pytest.mark.parametrize("kind", ["linear", "transposed", "quantised"])
def test_a_bottleneck_computes_where_its_matrix_is(kind: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        old, shape = elsewhere(kind)
        assert BottleneckLinear(old, 2)(torch.empty(shape, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_an_adapter_are_where_its_matrix_is(kind: str) -> None:
    with simulated_device() as device:
        make, shape = LAYERS[kind]
        inputs = torch.zeros(shape, dtype=torch.int64 if kind == "embedding" else torch.float32, device=device)
        layer = lora_layer(make().to(device), 2, 0.5, 0.1).train()
        layer(inputs).sum().backward()
        assert isinstance(layer.lora_A.grad, Remote)
        assert isinstance(layer.lora_B.grad, Remote)


# ---- a phase, from installation to what it hands on

LORA = LoRA(rank=3)
PHASES: dict[str, dict[str, Any]] = {
    "lora": {"tuning": LoRA(rank=3, targets="all-linear", dropout=0.2)},
    "alternate": {"tuning": LoRA(rank=3, init=Orthogonal(), train="alternate")},
    "svd": {"tuning": LoRA(rank=3, init=SvdOfWeight())},
    "dora": {"tuning": LoRA(rank=3, init=SvdOfWeight(), dora=True, dropout=0.2)},
    "ranks": {"tuning": LoRA(rank=3, rank_pattern={"value": 2}, alpha_pattern={"query": 8.0}, rslora=True)},
    "rest": {"tuning": LoRA(rank=3, init=SvdOfDelta(fold="rest"))},
    "fedex": {"tuning": LORA, "aggregator": ProductExact()},
    "flora": {"tuning": LORA, "aggregator": Stack()},
    "shrunk": {"tuning": LORA, "aggregator": SparsityWeighted(), "shrink": RankPruning(keep=0.5)},
    "parts": {"tuning": LORA, "local": {"accumulate": 3}},
    "pruned": {"tuning": LORA, "prune": Prune(density=0.5)},
    "bottleneck": {"tuning": Bottleneck(width=2)},
    "full": {"tuning": Full()},
    "sparse_mask": {"tuning": SparseMask(density=0.1, biases=True)},
    "peft": {"tuning": Peft(config={"peft_type": "LORA", "r": 3, "target_modules": ["query"]})},
    "optimiser": {
        "tuning": LORA,
        "local": {"proximal": 0.1, "clip_norm": 1.0, "keep_optimizer": True},
        "memory": "last_round",
    },
    "private": {
        "tuning": LORA,
        "local": {"example_privacy": ExampleNoise(clip_norm=1.0, noise_multiplier=1.0, seed=1)},
    },
}

# every kind of tensor once; what the rest would send elsewhere lies on the same lines
SOME = [(name, "bert") for name in ("svd", "dora", "rest", "fedex", "shrunk", "parts", "full", "optimiser", "private")]
SOME += [("bottleneck", "bert"), ("peft", "bert"), ("sparse_mask", "gpt2"), ("lora", "vit")]


def phase(device: torch.device, family: str, settings: dict[str, Any]) -> tuple[Tree, dict[str, float]]:
    """Two rounds of two clients, an evaluation and a hand-over."""
    # fused optimisers know the devices that they work on
    local = Local(optimizer=Sgd(lr=0.1), batch_size=8, **settings.get("local", {}))
    recipe = Recipe(**{**settings, "local": local})
    workspace = Workspace(toy_task(family, num_examples=16), 0, device)
    before = PhaseHandover({"bert.encoder.layer.0.attention.self.query.weight": 0.01 * torch.eye(32)}, {})
    rest = isinstance(recipe.tuning, LoRA) and recipe.tuning.folds == "rest"
    state, _ = open_phase(workspace, 0, recipe, 3, 0, before if rest else None)
    for _ in range(2):
        engine = Serial(workspace, equal_population(16, 2))
        state, _ = run_round(recipe, state, (0, 1), engine, seed=3, rounds=2)
    workspace.load(recipe, state.params, state.folds)
    metrics = workspace.evaluate(np.arange(16), "train", "fp32").metrics
    if not isinstance(recipe.tuning, Bottleneck | Peft):  # their change is no edit of weights
        assert {value.device for value in close_phase(workspace, recipe, state).delta.values()} == {CPU}
    return state.params, metrics


@pytest.mark.parametrize(
    ("name", "family"),
    some_of(
        [
            *((name, "bert") for name in PHASES),
            *((name, "gpt2") for name in ("lora", "dora", "sparse_mask")),
            *((name, "vit") for name in ("lora", "full")),
        ],
        SOME,
    ),
)
def test_a_phase_on_a_device_is_that_on_the_cpu(name: str, family: str) -> None:
    params, metrics = phase(CPU, family, PHASES[name])
    with simulated_device() as device:
        there, seen = phase(device, family, PHASES[name])
    for key, value in params.items():
        assert there[key].device == CPU
        torch.testing.assert_close(there[key], value, atol=1e-6, rtol=0, msg=key)
    assert seen == pytest.approx(metrics, abs=1e-5)


def test_the_simulated_device_refuses_tensors_of_the_cpu() -> None:
    with simulated_device() as device:
        there = torch.ones(2, device=device)
        assert there.device == DEVICE
        assert torch.equal((there + 1.0).to("cpu"), torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match="tensors on two devices in aten::add"):
            there + torch.ones(2)
        with pytest.raises(RuntimeError, match="tensors on two devices in aten::mul_"):
            torch.ones(2).mul_(there)

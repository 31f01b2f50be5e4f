"""Names of devices, what they compute in, and kernels that give the same bits; no GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import document, experiment, tiny_world
from torch import Tensor

import fedlora
from fedlora import config
from fedlora.client.workspace import Workspace
from fedlora.config import federated_data
from fedlora.config.federated_data import in_mode, manifest, prepare
from fedlora.core.devices import compute_on, deterministic_kernels, pick_device
from fedlora.core.errors import ConfigError
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.population.skew import Classes, classes_by
from fedlora.runs.folder import RunFolder
from fedlora.tasks.text import PreparedText

CUDA = torch.device("cuda")
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# ---- names


@pytest.mark.usefixtures("two_gpus")
def test_a_device_is_one_of_several() -> None:
    assert [str(pick_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ConfigError, match=r"'cuda:2' but this PyTorch sees 2 GPU\(s\), numbered from 0; use 'cuda:1'"):
        pick_device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1", "cpu"])
def test_the_workspace_is_fixed_before_the_first_product_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    pick_device(name)  # loading a language model multiplies, outside of all blocks of deterministic kernels
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (None if name == "cpu" else ":4096:8")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_absent_is_refused(world: Path, tmp_path: Path, name: str) -> None:
    why = "no Metal device" if name == "mps" else f"device = '{name}' but this PyTorch sees no GPU"
    with pytest.raises(ConfigError, match=rf"{why}; use 'cpu' or 'auto'"):
        fedlora.run(experiment(world, "lora", f"device={name}"), tmp_path / "run")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:1 ", "cuda:-1", "mps:0", ""])
def test_other_names_are_refused(world: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        config.parse(document(world) | {"device": name})


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_names_are_the_same_in_a_run_and_on_a_site(world: Path, name: str) -> None:
    assert config.parse(document(world) | {"device": name}).device == name
    assert SiteConfig(name="one", rows="rows.csv", device=name).device == name


# ---- number formats


@pytest.mark.parametrize(("capability", "found"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bfloat16_where_the_device_has_it(
    world: Path, monkeypatch: pytest.MonkeyPatch, two_gpus: None, capability: Any, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = experiment(world, "slora", "method.local.compute='auto'", "device='cuda:1'", rounds=2)
    assert [phase.recipe.local.compute for phase in in_mode(chosen).phases] == [found, found]
    assert in_mode(in_mode(chosen)) == in_mode(chosen)


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_auto_is_float32_elsewhere(name: str) -> None:
    assert compute_on(torch.device(name)) == "fp32"


def test_a_run_in_auto_is_that_in_float32_and_the_manifest_says_so(world: Path, tmp_path: Path) -> None:
    auto, plain = (
        fedlora.run(experiment(world, "lora", f"method.local.compute={one}", "device=cpu", rounds=1), tmp_path / one)
        for one in ("auto", "fp32")
    )
    assert auto.after == plain.after
    told = RunFolder(auto.folder).read_json("manifest.json")
    assert (told["compute"], told["deterministic"]) == (["fp32"], True)


def test_a_tier_in_float32_needs_a_base_in_float32(world: Path) -> None:
    tiers = "clients.tiers=[{name='weak', share=0.5, compute='fp32'}, {name='strong', share=0.5}]"
    with pytest.raises(ConfigError, match="tier 'weak' computes in fp32"):
        experiment(world, "lora", "method.local.compute='auto'", tiers)


# ---- deterministic kernels


def test_deterministic_stands_in_the_manifest_and_in_the_digest_only_if_it_is_off(world: Path) -> None:
    plain, on, off = (
        experiment(world, "lora", *more) for more in ((), ("deterministic=true",), ("deterministic=false",))
    )
    assert config.digest(plain) == config.digest(on) != config.digest(off)
    assert [manifest(one, prepare(one))["deterministic"] for one in (plain, off)] == [True, False]
    assert config.resolved(plain)["deterministic"] is True


@pytest.mark.parametrize("deterministic", [True, False])
def test_clients_are_divided_with_such_kernels(
    world: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    seen = []

    def noted(skew: Any, task: Any, seed: int, device: torch.device) -> Classes:
        seen.append(flags()[0])
        return classes_by(skew, task, seed, torch.device("cpu"))

    monkeypatch.setattr(federated_data, "classes_by", noted)
    monkeypatch.setattr(federated_data, "pick_device", lambda name: CUDA)
    prepare(experiment(world, "lora", f"deterministic={str(deterministic).lower()}"))
    assert seen == [deterministic]


def flags() -> tuple[Any, ...]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        cudnn.deterministic,
        cudnn.benchmark,
        cuda.matmul.allow_tf32,
        cudnn.allow_tf32,
    )


def test_kernels_are_deterministic_within_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic_kernels(CUDA):
        assert flags() == (True, False, True, False, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with deterministic_kernels(CUDA):  # an evaluation within a callback
            pass
        assert flags()[0]
    assert flags() == before


def test_tf32_by_its_newer_name_returns() -> None:
    matrices = torch.backends.cuda.matmul
    if not hasattr(matrices, "fp32_precision"):
        pytest.skip("this PyTorch has the older name alone")
    try:
        matrices.fp32_precision = "tf32"
        with deterministic_kernels(CUDA):
            assert matrices.fp32_precision != "tf32"
        assert matrices.fp32_precision == "tf32"
    finally:
        matrices.allow_tf32 = False


@pytest.mark.parametrize("place", [torch.backends, torch.backends.cudnn])
def test_tf32_of_all_parts_is_off_and_returns(place: Any) -> None:
    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        pytest.skip("this PyTorch has the older name alone")
    parts = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    try:
        place.fp32_precision = "tf32"
        before = [part.fp32_precision for part in parts]
        with deterministic_kernels(CUDA):
            assert "tf32" not in [part.fp32_precision for part in parts]
        assert [part.fp32_precision for part in parts] == before
    finally:
        place.fp32_precision = "none"
        cudnn.allow_tf32 = True
        for part, usual in zip(parts, ("none", "tf32", "tf32"), strict=True):
            part.fp32_precision = usual


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_products_returns(precision: str) -> None:
    try:
        torch.set_float32_matmul_precision(precision)
        with deterministic_kernels(CUDA):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_kernels_are_left_alone_elsewhere(device: str, wanted: bool) -> None:
    before = flags()
    with deterministic_kernels(torch.device(device), wanted):
        assert flags() == before


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    before = flags()
    with (
        pytest.raises(ConfigError, match=r"uses put_, which .*; set deterministic = false"),
        deterministic_kernels(CUDA),
    ):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_determi ...")
    late = (
        "but this operation is not deterministic because it uses CuBLAS ... set CUBLAS_WORKSPACE_CONFIG=:4096:8 or ..."
    )
    with (
        pytest.raises(ConfigError, match="set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the program starts"),
        deterministic_kernels(CUDA),
    ):
        raise RuntimeError(f"Deterministic behavior was enabled with `torch.use_deterministic_algorithms`, {late}")
    with pytest.raises(RuntimeError, match="out of memory"), deterministic_kernels(CUDA):
        raise RuntimeError("out of memory")
    assert flags() == before


def test_under_noise_such_an_operation_ends_the_run_too(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def without_kernel(*_: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("put_ does not have a deterministic implementation, but you set ...")
        return torch.zeros(())

    monkeypatch.setattr(Workspace, "kernels", lambda self: deterministic_kernels(CUDA))
    monkeypatch.setattr(PreparedText, "loss", without_kernel)
    noise = "method.local.example_privacy={clip_norm=1.0, noise_multiplier=1.0, delta=0.01}"
    with pytest.raises(ConfigError, match="uses put_"):
        fedlora.run(experiment(world, "lora", noise), tmp_path / "run")

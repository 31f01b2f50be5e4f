"""Starts of LoRA's factors: one contract for every row of the table, then each start by its own equation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.client.workspace import Workspace
from fedlora.recipe import Recipe
from fedlora.rounds.downlink import view
from fedlora.rounds.phases import open_phase
from fedlora.testing import toy_task
from fedlora.transport import BFloat16, Link, pack, unpack
from fedlora.tuning import LORA_INITS, Kaiming, LoRA, LoRAInit, Orthogonal, SvdOfDelta, SvdOfWeight
from fedlora.tuning.lora import lora_layers
from fedlora.tuning.lora_init import truncated_svd

INITS: list[LoRAInit] = [
    *(cls() for cls in LORA_INITS.values()),
    SvdOfWeight(split="left"),
    SvdOfDelta(split="left"),
]
SVD = [SvdOfWeight(), SvdOfWeight(split="left"), SvdOfDelta(), SvdOfDelta(split="left")]
SHAPES = [(5, 7), (7, 5), (4, 4)]


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def best(source: Tensor, rank: int) -> np.ndarray[Any, Any]:
    """The best approximation of a rank, in float64 (Eckart and Young)."""
    left, values, right = np.linalg.svd(source.double().numpy(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def source_of(init: LoRAInit, weight: Tensor, delta: Tensor) -> Tensor:
    return weight if isinstance(init, SvdOfWeight) else delta


# ---- the contract


@pytest.mark.parametrize("init", INITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_shapes_hold_even_above_the_smaller_side(init: LoRAInit, shape: tuple[int, int], rank: int) -> None:
    b, a = init.factors(matrix(shape), matrix(shape, 1), rank, 2.0, 0)
    assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
    assert b.dtype == a.dtype == torch.float32
    assert bool(torch.isfinite(b).all() and torch.isfinite(a).all())


@pytest.mark.parametrize("init", INITS, ids=str)
def test_same_arguments_give_the_same_bits_and_are_left_alone(init: LoRAInit) -> None:
    weight, delta = matrix((6, 4)), matrix((6, 4), 1)
    first, second = (init.factors(weight, delta, 2, 0.5, 3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(weight, matrix((6, 4)))
    assert torch.equal(delta, matrix((6, 4), 1))


@pytest.mark.parametrize("init", INITS, ids=str)
def test_the_process_wide_generator_is_not_touched(init: LoRAInit) -> None:
    before = torch.get_rng_state()
    init.factors(matrix((6, 4)), None, 2, 0.5, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", INITS, ids=str)
def test_without_a_residual_and_a_delta_the_function_is_unchanged(init: LoRAInit) -> None:
    b, a = init.factors(matrix((6, 4)), None, 2, 0.5, 3)
    assert bool((b @ a).any()) == init.residual
    assert bool(a.any())


@pytest.mark.parametrize("init", [init for init in INITS if init.from_seed], ids=str)
def test_what_claims_to_follow_from_a_seed_does_not_read_the_weight(init: LoRAInit) -> None:
    one = init.factors(matrix((6, 4)), None, 2, 1.0, 3)
    other = init.factors(matrix((6, 4), 9), matrix((6, 4), 8), 2, 4.0, 3)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_the_table_names_each_start_by_its_kind() -> None:
    assert {kind: cls().kind for kind, cls in LORA_INITS.items()} == {kind: kind for kind in LORA_INITS}  # type: ignore[attr-defined]


# ---- the truncated SVD


@pytest.mark.parametrize("init", SVD, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4, 9])
@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_scale_b_a_is_the_best_approximation(init: LoRAInit, shape: tuple[int, int], rank: int, scale: float) -> None:
    weight, delta = matrix(shape), matrix(shape, 1)
    b, a = init.factors(weight, delta, rank, scale, 0)
    expected = best(source_of(init, weight, delta), rank)
    np.testing.assert_allclose((scale * b @ a).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("init", SVD, ids=str)
def test_the_energy_is_that_of_the_leading_values(init: LoRAInit) -> None:
    weight, delta = matrix((6, 5)), matrix((6, 5), 1)
    b, a = init.factors(weight, delta, 2, 4.0, 0)
    values = np.linalg.svd(source_of(init, weight, delta).numpy(), compute_uv=False)
    assert float((4.0 * b @ a).square().sum()) == pytest.approx(float((values[:2] ** 2).sum()), rel=1e-5)


def test_symmetric_factors_by_hand() -> None:
    # singular values 8 and 2; divided by the scale 2 they are 4 and 1, whose roots are 2 and 1
    b, a = truncated_svd(torch.tensor([[0.0, -8.0], [2.0, 0.0]]), 2, 2.0, "symmetric")
    torch.testing.assert_close(b, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(a, torch.tensor([[0.0, -2.0], [1.0, 0.0]]))


def test_left_factors_by_hand() -> None:
    b, a = truncated_svd(torch.tensor([[0.0, -8.0], [2.0, 0.0]]), 2, 2.0, "left")
    torch.testing.assert_close(b, torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(a, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))


def test_symmetric_factors_share_the_singular_values_evenly() -> None:
    b, a = truncated_svd(matrix((7, 5)), 3, 0.5, "symmetric")
    torch.testing.assert_close(b.T @ b, a @ a.T, atol=1e-5, rtol=1e-5)


def test_left_leaves_the_rows_of_a_orthonormal() -> None:
    _, a = truncated_svd(matrix((7, 5)), 3, 0.5, "left")
    torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", ["symmetric", "left"])
def test_signs_do_not_depend_on_the_machine(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = truncated_svd(matrix((6, 5)), 3, 2.0, split)
    left, values, right = torch.linalg.svd(matrix((6, 5)), full_matrices=False)
    flip = torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0])
    flipped = (left * flip, values, flip.unsqueeze(1) * right)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: flipped)
    for ours, reference in zip(truncated_svd(matrix((6, 5)), 3, 2.0, split), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=0, rtol=0)


def test_the_largest_entry_of_each_column_of_b_is_positive() -> None:
    b, _ = truncated_svd(matrix((9, 6)), 6, 1.0, "symmetric")
    assert bool((b[b.abs().argmax(0), torch.arange(6)] > 0).all())


def test_a_rank_above_the_matrix_pads_with_zeros() -> None:
    b, a = truncated_svd(matrix((3, 5)), 7, 1.0, "symmetric")
    assert not b[:, 3:].any()
    assert not a[3:].any()
    torch.testing.assert_close(b @ a, matrix((3, 5)), atol=1e-5, rtol=1e-5)


def test_a_matrix_of_lower_rank_than_asked_for_is_kept_whole() -> None:
    low = matrix((6, 1)) @ matrix((1, 5), 1)
    b, a = SvdOfDelta().factors(matrix((6, 5), 2), low, 3, 0.5, 0)
    torch.testing.assert_close(0.5 * b @ a, low, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("delta", [None, torch.zeros(6, 4)], ids=["none", "zero"])
def test_a_matrix_that_learnt_nothing_starts_as_kaiming(delta: Tensor | None) -> None:
    ours, kaiming = (init.factors(matrix((6, 4)), delta, 2, 0.5, 5) for init in (SvdOfDelta(), Kaiming()))
    assert all(torch.equal(x, y) for x, y in zip(ours, kaiming, strict=True))


# ---- the random starts


def test_kaiming_stays_in_its_bound_and_fills_it() -> None:
    _, a = Kaiming().factors(torch.zeros(4, 400), None, 50, 1.0, 0)
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < float(a.abs().max()) <= bound
    assert abs(float(a.mean())) < bound / 50
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_kaiming_has_the_spread_of_torch_s_own() -> None:
    theirs = torch.nn.init.kaiming_uniform_(
        torch.empty(50, 400), a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    _, ours = Kaiming().factors(torch.zeros(4, 400), None, 50, 1.0, 0)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.02)


@pytest.mark.parametrize("init", [Kaiming(), Orthogonal()], ids=str)
def test_another_seed_gives_another_start(init: LoRAInit) -> None:
    assert not torch.equal(*(init.factors(matrix((6, 4)), None, 2, 1.0, seed)[1] for seed in (0, 1)))


@pytest.mark.parametrize("rank", [3, 8])
def test_orthogonal_rows_are_orthonormal(rank: int) -> None:
    _, a = Orthogonal().factors(torch.zeros(4, 6), None, rank, 1.0, 0)
    expected = torch.diag(torch.tensor([1.0] * min(rank, 6) + [0.0] * (rank - min(rank, 6))))
    torch.testing.assert_close(a @ a.T, expected, atol=1e-5, rtol=1e-5)


# ---- FeDeRA in a model: W_residual = W0 - scale B0 A0, from what was received

FEDERA = LoRA(rank=4, alpha=12.0, init=SvdOfWeight())


def weights(workspace: Workspace) -> dict[str, Tensor]:
    return {name: layer.matrix().detach().clone() for name, layer in lora_layers(workspace.model).items()}


def pretrained(family: str) -> dict[str, Tensor]:
    workspace = Workspace(toy_task(family), 0, torch.device("cpu"))
    workspace.open(0, Recipe(tuning=FEDERA))
    return weights(workspace)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_residual_lacks_the_principal_part_with_the_scale_divided_out_once(family: str) -> None:
    workspace = Workspace(toy_task(family), 0, torch.device("cpu"))
    open_phase(workspace, 0, Recipe(tuning=FEDERA), seed=0, rounds_done=0, carry=None)
    before = pretrained(family)
    for name, residual in weights(workspace).items():
        np.testing.assert_allclose(residual.numpy(), before[name].numpy() - best(before[name], 4), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_residual_is_taken_from_the_factors_received(family: str) -> None:
    recipe = Recipe(tuning=FEDERA)
    server, device = (Workspace(toy_task(family), 0, torch.device("cpu")) for _ in range(2))
    state, _ = open_phase(server, 0, recipe, seed=0, rounds_done=0, carry=None)
    adapters = {name: value for name, value in state.init.items() if state.schema[name].group == "adapter"}
    received = {name: value + 0.1 * matrix(tuple(value.shape)) for name, value in adapters.items()}  # type: ignore[arg-type]
    device.apply_setup(0, recipe, pack({"init": received}, {}).raw)
    before = pretrained(family)
    for name, residual in weights(device).items():
        product = 3.0 * received[f"{name}.lora_B"] @ received[f"{name}.lora_A"]
        torch.testing.assert_close(residual, before[name] - product, atol=1e-5, rtol=1e-5)


def test_the_announcement_holds_the_start_exactly_even_under_a_bfloat16_link() -> None:
    workspace = Workspace(toy_task(), 0, torch.device("cpu"))
    recipe = Recipe(tuning=FEDERA, down=Link(precision=BFloat16()))
    state, _ = open_phase(workspace, 0, recipe, seed=0, rounds_done=0, carry=None)
    adapters = {name: value for name, value in state.init.items() if state.schema[name].group == "adapter"}
    received = unpack(state.setup, {"init": adapters})["init"]
    assert all(torch.equal(received[name], value) for name, value in adapters.items())


def test_under_a_bfloat16_link_that_counts_from_the_init_the_start_is_the_pre_trained_function() -> None:
    workspace = Workspace(toy_task(), 0, torch.device("cpu"))
    recipe = Recipe(tuning=FEDERA, down=Link(precision=BFloat16(), reference="init"))
    state, _ = open_phase(workspace, 0, recipe, seed=0, rounds_done=0, carry=None)
    shown, before = view(recipe, state, 0), pretrained("bert")
    for name, residual in weights(workspace).items():
        whole = residual + 3.0 * shown[f"{name}.lora_B"] @ shown[f"{name}.lora_A"]
        torch.testing.assert_close(whole, before[name], atol=1e-5, rtol=1e-5)


def test_an_announcement_is_applied_once() -> None:
    workspace = Workspace(toy_task(), 0, torch.device("cpu"))
    recipe = Recipe(tuning=FEDERA)
    state, _ = open_phase(workspace, 0, recipe, seed=0, rounds_done=0, carry=None)
    once = weights(workspace)
    workspace.apply_setup(0, recipe, state.setup)
    workspace.apply_setup(0, recipe, None)
    assert all(torch.equal(weights(workspace)[name], value) for name, value in once.items())

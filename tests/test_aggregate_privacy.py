"""The mean of a cohort by hand; the clip exactly and the noise by its statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError

from fedlora import tree
from fedlora.aggregate import AGGREGATORS, Mean
from fedlora.errors import TrainingError
from fedlora.privacy import PRIVACY, CentralGaussian, NoPrivacy
from fedlora.state import Update
from fedlora.tree import Tree

A = Update({}, {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([[4.0]])}, 1.0)
B = Update({}, {"x": torch.tensor([3.0, 8.0]), "y": torch.tensor([[0.0]])}, 3.0)


def test_the_uniform_mean_ignores_weights() -> None:
    delta = Mean().combine([A, B], {}).delta
    assert (delta["x"].tolist(), delta["y"].tolist()) == ([2.0, 4.0], [[2.0]])


def test_the_mean_by_examples_weighs_by_them() -> None:
    delta = Mean(weighting="examples").combine([A, B], {}).delta
    assert (delta["x"].tolist(), delta["y"].tolist()) == ([2.5, 6.0], [[1.0]])


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_one_client_gives_that_client(weighting: str) -> None:
    delta = Mean(weighting=weighting).combine([B], {}).delta  # type: ignore[arg-type]
    assert all(torch.equal(delta[name], value) for name, value in B.delta.items())


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_order_does_not_matter(weighting: str) -> None:
    one, other = (Mean(weighting=weighting).combine(cohort, {}).delta for cohort in ([A, B], [B, A]))  # type: ignore[arg-type]
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_a_client_without_examples_has_no_say_by_examples_and_a_full_one_uniformly() -> None:
    idle = Update({}, {"x": torch.zeros(2), "y": torch.zeros(1, 1)}, 0.0)
    assert Mean(weighting="examples").combine([B, idle], {}).delta["x"].tolist() == [3.0, 8.0]
    assert Mean().combine([B, idle], {}).delta["x"].tolist() == [1.5, 4.0]


def test_updates_are_read_once_and_left_alone() -> None:
    read = []

    def updates() -> Iterator[Update]:
        for update in (A, B):
            read.append(update)
            yield update

    Mean(weighting="examples").combine(updates(), {})
    assert len(read) == 2
    assert A.delta["x"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("cohort", [[], [A._replace(weight=0.0)]], ids=["nobody", "no weight"])
def test_no_update_and_no_weight_are_refused(cohort: list[Update]) -> None:
    with pytest.raises(TrainingError, match="at least one client with examples"):
        Mean(weighting="examples").combine(cohort, {})


def test_the_mean_edits_no_frozen_weights() -> None:
    assert not Mean().combine([A], {}).fold


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """``mean(B A) - mean(B) mean(A) = mean((B - mean B)(A - mean A))``: why ``exact_for_products`` is false."""
    factors = [torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    mean = Mean().combine([Update({}, {"b": f[0], "a": f[1]}, 1.0) for f in factors], {}).delta
    gap = sum(f[0] @ f[1] for f in factors) / 3 - mean["b"] @ mean["a"]
    expected = sum((f[0] - mean["b"]) @ (f[1] - mean["a"]) for f in factors) / 3
    torch.testing.assert_close(gap, expected, atol=1e-5, rtol=1e-5)
    assert Mean.exact_for_products is bool(gap.abs().max() < 1e-3)


# ---- privacy


def gaussian(clip_norm: float = 2.0, noise_multiplier: float = 0.0, seed: int = 0) -> CentralGaussian:
    return CentralGaussian(clip_norm=clip_norm, noise_multiplier=noise_multiplier, seed=seed)


def test_the_clip_is_over_all_tensors_together() -> None:
    clipped = gaussian(2.0).clip({"x": torch.tensor([3.0]), "y": torch.tensor([0.0, 4.0])})  # norm 5
    torch.testing.assert_close(clipped, {"x": torch.tensor([1.2]), "y": torch.tensor([0.0, 1.6])})


def test_what_is_short_enough_is_not_clipped() -> None:
    delta = {"x": torch.tensor([0.3, -0.4])}
    assert torch.equal(gaussian(0.5).clip(delta)["x"], delta["x"])


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e6])
def test_no_update_is_longer_than_the_clip(size: float) -> None:
    delta = {"x": size * torch.randn(100, generator=torch.Generator().manual_seed(0))}
    assert tree.norm(gaussian(2.0).clip(delta)) <= 2.0 * (1 + 1e-6)


def test_the_clip_leaves_its_argument_alone() -> None:
    delta = {"x": torch.tensor([30.0, 40.0])}
    gaussian().clip(delta)
    assert delta["x"].tolist() == [30.0, 40.0]


def noise(num_clients: int, seed: int = 0, multiplier: float = 3.0) -> Tree:
    delta = {"x": torch.full((200, 100), 5.0), "y": torch.zeros(20_000)}
    return gaussian(2.0, multiplier, seed).noise(delta, num_clients, 0)


@pytest.mark.parametrize("num_clients", [1, 4])
def test_the_noise_is_z_times_c_over_n_on_every_coordinate(num_clients: int) -> None:
    noisy = noise(num_clients)
    deviation = 3.0 * 2.0 / num_clients
    for name, mean in (("x", 5.0), ("y", 0.0)):
        # standard errors with 20 000 draws: 0.7 % of the mean's unit, 0.5 % of the deviation
        assert float(noisy[name].mean()) == pytest.approx(mean, abs=0.03 * deviation)
        assert float(noisy[name].std()) == pytest.approx(deviation, rel=0.02)
        beyond = float(((noisy[name] - mean).abs() > 2 * deviation).float().mean())
        assert beyond == pytest.approx(math.erfc(math.sqrt(2)), abs=0.006)


def test_the_noise_of_two_tensors_is_not_the_same() -> None:
    noisy = noise(1)
    assert not torch.allclose(noisy["x"].flatten() - 5.0, noisy["y"])


def test_the_noise_is_that_of_its_generator() -> None:
    assert torch.equal(noise(1)["y"], noise(1)["y"])
    assert not torch.equal(noise(1)["y"], noise(1, seed=1)["y"])


def test_no_multiplier_no_noise() -> None:
    assert torch.equal(noise(1, multiplier=0.0)["x"], torch.full((200, 100), 5.0))


def test_no_privacy_changes_nothing() -> None:
    delta = {"x": torch.tensor([30.0])}
    assert NoPrivacy().noise(NoPrivacy().clip(delta), 1, 0) is delta


@pytest.mark.parametrize(
    "fields", [{"clip_norm": 0.0, "noise_multiplier": 1.0}, {"clip_norm": 1.0, "noise_multiplier": -1.0}]
)
def test_impossible_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        CentralGaussian(**fields)


def test_the_tables_name_their_rows_by_kind() -> None:
    assert AGGREGATORS["mean"]().kind == "mean"  # type: ignore[attr-defined]
    assert {kind: cls.kind for kind, cls in PRIVACY.items()} == {kind: kind for kind in PRIVACY}  # type: ignore[attr-defined]

"""The mean of a cohort by hand; the clip exactly and the noise by its statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.toy import LOCAL, Federation, combined
from pydantic import ValidationError

from fedlora.core import tree
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.core.state import Update
from fedlora.core.tree import Tree
from fedlora.methods import fedavg
from fedlora.privacy import PRIVACY, CentralGaussian, NoPrivacy
from fedlora.rounds.checkpoint import load_state, save_state
from fedlora.server.aggregate import AGGREGATORS, Mean
from fedlora.tuning import LoRA

A = Update({}, {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([[4.0]])}, 1.0)
B = Update({}, {"x": torch.tensor([3.0, 8.0]), "y": torch.tensor([[0.0]])}, 3.0)


def test_the_uniform_mean_ignores_weights() -> None:
    delta = combined(Mean(), [A, B], {}).delta
    assert (delta["x"].tolist(), delta["y"].tolist()) == ([2.0, 4.0], [[2.0]])


def test_the_mean_by_examples_weighs_by_them() -> None:
    delta = combined(Mean(weighting="examples"), [A, B], {}).delta
    assert (delta["x"].tolist(), delta["y"].tolist()) == ([2.5, 6.0], [[1.0]])


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_one_client_gives_that_client(weighting: str) -> None:
    delta = combined(Mean(weighting=weighting), [B], {}).delta  # type: ignore[arg-type]
    assert all(torch.equal(delta[name], value) for name, value in B.delta.items())


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_order_does_not_matter(weighting: str) -> None:
    one, other = (combined(Mean(weighting=weighting), cohort, {}).delta for cohort in ([A, B], [B, A]))  # type: ignore[arg-type]
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_a_client_without_examples_has_no_say_by_examples_and_a_full_one_uniformly() -> None:
    idle = Update({}, {"x": torch.zeros(2), "y": torch.zeros(1, 1)}, 0.0)
    assert combined(Mean(weighting="examples"), [B, idle], {}).delta["x"].tolist() == [3.0, 8.0]
    assert combined(Mean(), [B, idle], {}).delta["x"].tolist() == [1.5, 4.0]


def test_updates_are_read_once_and_left_alone() -> None:
    read = []

    def updates() -> Iterator[Update]:
        for update in (A, B):
            read.append(update)
            yield update

    combined(Mean(weighting="examples"), updates(), {})
    assert len(read) == 2
    assert A.delta["x"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("cohort", [[], [A._replace(weight=0.0)]], ids=["nobody", "no weight"])
def test_no_update_and_no_weight_are_refused(cohort: list[Update]) -> None:
    why = "the total aggregation weight is zero" if cohort else "at least one client that has examples"
    with pytest.raises(TrainingError, match=why):
        combined(Mean(weighting="examples"), cohort, {})


def test_the_mean_edits_no_frozen_weights() -> None:
    assert not combined(Mean(), [A], {}).fold


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """``mean(B A) - mean(B) mean(A) = mean((B - mean B)(A - mean A))``: why ``exact_for_products`` is false."""
    factors = [torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    mean = combined(Mean(), [Update({}, {"b": f[0], "a": f[1]}, 1.0) for f in factors], {}).delta
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


# ---- a clip that adapts (Andrew et al., arXiv 1905.03871)


def adaptive(**settings: Any) -> CentralGaussian:
    return CentralGaussian(**{"clip_norm": 1.0, "noise_multiplier": 0.0, "quantile": 0.5, **settings})


def test_without_noise_the_clip_finds_the_quantile_of_the_norms() -> None:
    norms = np.random.default_rng(0).lognormal(1.0, 0.5, 400)
    for quantile in (0.2, 0.5, 0.9):
        privacy = adaptive(clip_norm=0.1, quantile=quantile)
        for round in range(200):
            below = float((norms <= privacy.clip_norm).sum())
            privacy = privacy.at(privacy.adapted(below, 400, 400, round))
        assert privacy.clip_norm == pytest.approx(np.quantile(norms, quantile), rel=0.05)


def test_a_step_of_the_clip_by_hand() -> None:
    assert adaptive(quantile=0.5).adapted(3.0, 4, 4, 0) == pytest.approx(math.exp(-0.2 * 0.25))
    # of five that were to answer four did: the fifth counts as half
    assert adaptive(quantile=0.5).adapted(3.0, 4, 5, 0) == pytest.approx(math.exp(-0.2 * ((3 - 2) / 5)))
    assert CentralGaussian(clip_norm=1.0, noise_multiplier=1.0).adapted(3.0, 4, 4, 0) is None


def test_bits_and_updates_together_cost_what_the_multiplier_says() -> None:
    privacy = adaptive(noise_multiplier=1.0, count_noise=2.0, clip_norm=3.0, seed=0)
    zeros = {"x": torch.zeros(200_000)}
    spread = float(privacy.noise(zeros, 10, 0)["x"].std()) * 10 / 3.0
    assert spread == pytest.approx((1.0 - 1 / 16) ** -0.5, rel=0.01)
    # Gaussians of sensitivities C and 1/2 in one: z^-2 = z_updates^-2 + (2 s)^-2
    assert spread**-2 + (2 * 2.0) ** -2 == pytest.approx(1.0, rel=0.02)
    draws = [privacy.adapted(5.0, 10, 10, round) or 0.0 for round in range(4000)]
    shares = 0.5 - np.log(np.array(draws) / 3.0) / 0.2
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.std() == pytest.approx(2.0 / 10, rel=0.05)


def test_the_noise_of_bits_is_a_twentieth_of_the_cohort_and_never_too_little() -> None:
    for num_clients in (1, 10, 1000):
        privacy = adaptive(noise_multiplier=2.0, seed=1)
        assert torch.isfinite(privacy.noise({"x": torch.zeros(3)}, num_clients, 0)["x"]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_multiplier": 1.0, "count_noise": 0.5},
        {"noise_multiplier": 1.0, "count_noise": 1.0, "quantile": None},
    ],
)
def test_bits_that_would_cost_more_than_all_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="count_noise"):
        adaptive(**settings)


def test_in_a_federation_the_clip_follows_the_updates_and_survives_a_checkpoint(tmp_path: Path) -> None:
    def federation() -> Federation:
        privacy = adaptive(clip_norm=50.0, quantile=0.5, clip_lr=1.0)
        return Federation(fedavg(rounds=6, tuning=LoRA(rank=4), local=LOCAL, privacy=privacy))

    whole = federation()
    end = whole.go_on(whole.start(), 6)
    clips = [row.clip_norm for row in whole.rows]
    assert clips[:2] == pytest.approx([50.0, 50.0 * math.exp(-0.5)])  # all three were below
    assert all(row.loss == 0.0 and row.examples == 0 for row in whole.rows)
    state = federation().start()
    for rounds in range(1, 7):
        one = federation()
        save_state(one.go_on(state, rounds), tmp_path / "state", {})
        state, _ = load_state(tmp_path / "state")
        assert one.rows[0].clip_norm == clips[rounds - 1]
    assert all(torch.equal(state.params[name], value) for name, value in end.params.items())

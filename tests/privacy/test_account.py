"""What a run spends of privacy, against closed forms; and noise that nobody can foresee."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import experiment, tiny_world
from fixtures.toy import LOCAL, Federation
from scipy.optimize import brentq
from scipy.stats import norm

import fedlora
from fedlora.core import tree
from fedlora.core.errors import ConfigError
from fedlora.methods import fedavg
from fedlora.population.clients import draw_cohort
from fedlora.privacy import CentralGaussian
from fedlora.privacy.accountant import SamplingScheme, calibrate, epsilon, open_account
from fedlora.recipe import Phase, Recipe
from fedlora.rounds.round import run_round
from fedlora.testing import equal_population
from fedlora.transport import Link, TopK, Uniform
from fedlora.tuning import LoRA

pytest.importorskip("dp_accounting", reason="the extra fedlora[privacy] is not installed")
world = pytest.fixture(scope="module")(tiny_world)

DELTA = 1e-5
ALL = SamplingScheme(10, 10, "fixed")
FEW = SamplingScheme(350, 10, "fixed")
CHANCE = SamplingScheme(350, 10, "poisson")


def gaussian_epsilon(multiplier: float, rounds: int) -> float:
    """The exact epsilon of composed Gaussians (Balle and Wang, arXiv 1805.06530, Theorem 8)."""
    mu = math.sqrt(rounds) / multiplier

    def delta(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))

    return float(brentq(lambda eps: delta(eps) - DELTA, 0, 200))


@pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (2.0, 10), (8.0, 200)])
def test_without_sampling_it_is_the_gaussian_mechanisms(multiplier: float, rounds: int) -> None:
    exact = gaussian_epsilon(multiplier, rounds)
    assert epsilon(((multiplier, rounds),), ALL, DELTA, "pld") == pytest.approx(exact, rel=0.01)
    assert exact <= epsilon(((multiplier, rounds),), ALL, DELTA, "rdp") < 1.25 * exact


@pytest.mark.slow
def test_chance_is_cheaper_than_everybody_and_pld_is_tighter_than_rdp() -> None:
    everybody = epsilon(((1.0, 60),), ALL, DELTA, "pld")
    rdp, pld = (epsilon(((1.0, 60),), CHANCE, DELTA, name) for name in ("rdp", "pld"))
    assert pld < rdp < 0.2 * everybody
    assert pld == pytest.approx(1.69, abs=0.02)  # dp-accounting 0.6


def test_a_cohort_of_fixed_size_is_charged_for_the_exchange_of_a_client() -> None:
    # another client in one's place may move the sum by twice the clip
    assert epsilon(((2.0, 60),), FEW, DELTA, "rdp") > epsilon(((2.0, 60),), CHANCE, DELTA, "rdp")
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    account = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    account.compose(SampledWithoutReplacementDpEvent(350, 10, GaussianDpEvent(1.0)), 60)
    assert epsilon(((2.0, 60),), FEW, DELTA, "auto") == account.get_epsilon(DELTA)


def test_pld_with_a_fixed_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not support cohorts of a fixed size"):
        epsilon(((1.0, 1),), FEW, DELTA, "pld")


def test_no_noise_spends_everything() -> None:
    assert epsilon(((0.0, 1),), CHANCE, DELTA, "rdp") == math.inf
    assert epsilon(((0.0, 0),), CHANCE, DELTA, "rdp") == 0


def test_phases_add_up() -> None:
    whole = epsilon(((1.0, 10),), CHANCE, DELTA, "rdp")
    assert epsilon(((1.0, 4), (1.0, 6)), CHANCE, DELTA, "rdp") == pytest.approx(whole)


@pytest.mark.parametrize("sampled", [ALL, pytest.param(FEW, marks=pytest.mark.slow), CHANCE])
def test_the_noise_found_spends_the_target_and_no_more(sampled: SamplingScheme) -> None:
    found = calibrate(2.0, 50, sampled, DELTA, "rdp")
    assert 1.98 < epsilon(((found, 50),), sampled, DELTA, "rdp") <= 2.0 + 1e-6


@pytest.mark.parametrize("target", [50.0, 200.0, 1e4, 1e6])
def test_the_noise_of_a_great_target_is_found_as_finely(target: float) -> None:
    found = calibrate(target, 50, ALL, DELTA, "rdp")
    assert 0.99 * target < epsilon(((found, 50),), ALL, DELTA, "rdp") <= target


def phase(**privacy: Any) -> Phase:
    return Phase(recipe=Recipe(privacy=CentralGaussian(clip_norm=1.0, **privacy)), rounds=10)


def test_an_account_is_opened_with_the_noise_of_its_target() -> None:
    budget, (noisy,) = open_account((phase(target_epsilon=0.3, accountant="rdp"),), CHANCE)
    assert budget is not None
    assert isinstance(noisy.recipe.privacy, CentralGaussian)
    assert noisy.recipe.privacy.noise_multiplier is not None
    assert budget.delta == pytest.approx(350**-1.1)
    assert budget.spent((noisy,), 10) == pytest.approx(0.3, rel=0.02)
    assert open_account((Phase(recipe=Recipe()),), CHANCE)[0] is None


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((phase(noise_multiplier=1.0), phase(noise_multiplier=1.0, delta=0.1)), "share one account"),
        ((phase(noise_multiplier=0.3, max_epsilon=0.5),), "the first round spends more"),
        ((phase(noise_multiplier=1.0, accountant="pld"),), "fixed size"),
        ((phase(noise_multiplier=0.5), phase(target_epsilon=2.0)), "give it to every phase alike"),
        ((phase(noise_multiplier=0.5), phase(noise_multiplier=0.0)), "give every phase noise"),
    ],
)
def test_accounts_that_cannot_be_kept_are_refused(phases: tuple[Phase, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_account(phases, FEW)


def test_few_clients_must_say_their_delta() -> None:
    with pytest.raises(ConfigError, match=r"set privacy\.delta"):
        open_account((phase(noise_multiplier=1.0),), ALL)


def test_a_delta_that_gives_no_protection_is_refused() -> None:
    assert open_account((phase(noise_multiplier=1.0, delta=0.05),), ALL._replace(num_clients=19))[0]
    with pytest.raises(
        ConfigError, match=r"delta = 0\.05 gives no protection for 20 clients.*privacy\.delta below 0\.05"
    ):
        open_account((phase(noise_multiplier=1.0, delta=0.05),), ALL._replace(num_clients=20))


def test_a_clip_alone_keeps_no_account() -> None:
    assert open_account((phase(noise_multiplier=0.0),), FEW)[0] is None


def test_noise_outside_a_federation_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="clients in a federation"):
        experiment(world, "flasc", *PRIVATE, "mode='centralised'")


def test_who_took_part_is_not_told_where_noise_is_secure(world: Path, tmp_path: Path) -> None:
    chosen = (PRIVATE[0].replace("seed=3,", ""), PRIVATE[1])
    result = fedlora.run(experiment(world, "flasc", *chosen, rounds=2), tmp_path / "run")
    assert {row.cohort for row in result.rows} == {()}
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["privacy"]
    assert told["noise"] == ["the operating system's secure source"]
    assert told["delta"] == 0.01
    assert told["noise_multiplier"][0] > 0


def test_nor_is_their_tier(world: Path, tmp_path: Path) -> None:
    slow = "network='down=1kbit,up=1kbit'"
    tiers = f"clients.tiers=[{{name='vip',share=0.2,{slow}}},{{name='rest',share=0.8}}]"
    tiers = (tiers, "clients.network='down=1Mbit,up=1Mbit'")
    chosen = (PRIVATE[0].replace("seed=3,", "").replace("target_epsilon=8.0", "noise_multiplier=1.0"), PRIVATE[1])
    fedlora.run(experiment(world, "flasc", *chosen, *tiers, rounds=2), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [(row["tiers"], row["tier_seconds"], row["network_seconds"]) for row in rows] == [({}, {}, None)] * 3


@pytest.mark.parametrize(("sampling", "used"), [("poisson", "pld"), ("fixed", "rdp")])
def test_the_manifest_has_the_accountant_that_was_used(world: Path, tmp_path: Path, sampling: str, used: str) -> None:
    privacy = "method.privacy={kind='central_gaussian',clip_norm=0.5,noise_multiplier=1.0,delta=0.01,seed=3}"
    chosen = experiment(world, "flasc", privacy, f"clients.sampling={sampling!r}", "clients.per_round=2", rounds=1)
    fedlora.run(chosen, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["privacy"]["accountant"] == used


def test_little_noise_and_great_targets_are_accounted_for() -> None:
    assert epsilon(((0.05, 1),), CHANCE, DELTA, "auto") > 50
    assert calibrate(300.0, 1, CHANCE, DELTA, "auto") < 0.3
    with pytest.raises(ConfigError, match=r"choose a value from 0\.01 to 1e6, or set noise_multiplier"):
        calibrate(1e12, 1, CHANCE, DELTA, "auto")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_multiplier": 0.0, "max_epsilon": 1.0}, "would never be met"),
        (
            {"target_epsilon": 8.0, "max_epsilon": 1.0},
            "max_epsilon = 1 ends the run before it spends target_epsilon = 8",
        ),
        ({"noise_multiplier": 1.0, "clip_lr": 0.5}, "an adaptive clip"),
        ({"noise_multiplier": 1.0, "count_noise": 5.0}, "an adaptive clip"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CentralGaussian(clip_norm=1.0, **settings)  # type: ignore[arg-type]


def test_one_of_multiplier_and_target_is_asked_for() -> None:
    for wrong in ({}, {"noise_multiplier": 1.0, "target_epsilon": 1.0}):
        with pytest.raises(ConfigError, match="one of noise_multiplier and target_epsilon"):
            CentralGaussian(clip_norm=1.0, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a property of a whole run"):
        CentralGaussian(clip_norm=1.0, target_epsilon=1.0).noise({"x": torch.zeros(1)}, 1, 0)


PRIVATE = (
    "method.privacy={kind='central_gaussian',clip_norm=0.5,target_epsilon=8.0,delta=0.01,seed=3,accountant='rdp'}",
    "clients.sampling='poisson'",
)


def test_a_run_keeps_its_account_round_by_round(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, "flasc", *PRIVATE, rounds=4), tmp_path / "run")
    spent = [row.epsilon for row in result.rows[1:]]
    assert spent == sorted(spent)  # type: ignore[type-var]
    assert 7.5 < (spent[-1] or 0) <= 8.0 + 1e-6
    assert {row.loss for row in result.rows[1:]} == {0.0}  # no figure leaves a client without noise


def test_a_run_ends_before_it_spends_more_than_its_budget(world: Path, tmp_path: Path) -> None:
    privacy = (
        "method.privacy={kind='central_gaussian',clip_norm=0.5,noise_multiplier=1.0,"
        "max_epsilon=3.0,delta=0.01,accountant='rdp',seed=1}"
    )
    chosen = experiment(world, "flasc", privacy, "clients.sampling='poisson'", rounds=30)
    result = fedlora.run(chosen, tmp_path / "run")
    assert 0 < len(result.rows) - 1 < 30
    assert (result.rows[-1].epsilon or 99) <= 3.0
    assert result.rows[-1].metrics
    assert result.stopped == "another round would exceed privacy.max_epsilon = 3"
    again = fedlora.run(chosen, tmp_path / "run")
    assert (len(again.rows), again.stopped) == (len(result.rows), result.stopped)


def test_noise_in_some_phases_only_is_refused(world: Path) -> None:
    from fedlora.config import Experiment

    with pytest.raises(ConfigError, match="some phases have noise"):
        Experiment(phases=(phase(noise_multiplier=1.0), Phase(recipe=Recipe())))


def test_chance_draws_each_client_by_itself() -> None:
    population = equal_population(200, 100)
    sizes = [len(draw_cohort(population, 5, seed, "poisson")) for seed in range(400)]
    assert np.mean(sizes) == pytest.approx(5, abs=0.4)
    assert np.var(sizes) == pytest.approx(100 * 0.05 * 0.95, rel=0.25)
    assert 0 in sizes


def private(**slots: Any) -> Federation:
    noise = CentralGaussian(clip_norm=0.1, noise_multiplier=0.0, seed=0)
    return Federation(fedavg(rounds=4, tuning=LoRA(rank=4), local=LOCAL, privacy=noise, **slots))


def test_under_chance_sums_are_divided_by_what_is_expected() -> None:
    federation = private()
    state = federation.start()
    recipe = federation.phases[0].recipe
    one, _ = run_round(recipe, state, (0,), federation.engine, 0, 4, expected=4)
    other, _ = run_round(recipe, state, (0,), federation.engine, 0, 4)
    for name, value in other.params.items():
        torch.testing.assert_close(one.params[name] - state.params[name], (value - state.params[name]) / 4)


def test_a_round_of_nobody_adds_noise_alone() -> None:
    noise = CentralGaussian(clip_norm=1.0, noise_multiplier=1.0, seed=0)
    federation = Federation(fedavg(rounds=4, tuning=LoRA(rank=4), local=LOCAL, privacy=noise))
    state = federation.start()
    after, row = run_round(federation.phases[0].recipe, state, (), federation.engine, 0, 4, expected=10)
    moved = tree.flatten(tree.subtract(after.params, state.params))
    assert float(moved.std()) == pytest.approx(0.1, rel=0.1)
    assert (row.cohort, row.up_bytes, row.loss) == ((), {}, 0.0)


@pytest.mark.parametrize("precision", [Uniform(bits=1), Uniform(bits=2, rounding="stochastic")])
def test_an_update_that_rounding_made_longer_is_clipped_again(precision: Uniform) -> None:
    federation = private(up=Link(sparsify=TopK(density=0.5), precision=precision))
    state = federation.go_on(federation.start(), 1, (1,))
    assert tree.norm(tree.subtract(state.params, state.init)) <= 0.1 * (1 + 1e-5)


def test_flascs_form_divides_by_the_clip() -> None:
    delta = {"x": torch.ones(4)}
    plain = CentralGaussian(clip_norm=0.5, noise_multiplier=1.0, seed=1).noise(delta, 2, 0)["x"]
    flasc = CentralGaussian(clip_norm=0.5, noise_multiplier=1.0, seed=1, normalise=True).noise(delta, 2, 0)["x"]
    torch.testing.assert_close(flasc, plain / 0.5)
    assert flasc.mean() != 2.0


def test_noise_without_a_seed_is_normal_and_never_the_same() -> None:
    noise = CentralGaussian(clip_norm=1.0, noise_multiplier=2.0)
    zeros = {"x": torch.zeros(40_001)}
    one, other = (noise.noise(zeros, 1, 0)["x"] for _ in range(2))
    assert not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(2.0, rel=0.02)
    assert float(one.mean()) == pytest.approx(0.0, abs=0.06)
    assert float((one.abs() > 4.0).float().mean()) == pytest.approx(0.0455, abs=0.006)

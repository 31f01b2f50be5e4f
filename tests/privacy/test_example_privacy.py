"""DP-SGD on clients: clipped sums of single examples' gradients, noise, sampling, and the account."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import experiment, ledger, tiny_world
from fixtures.toy import LOCAL, Federation

import fedlora
from fedlora.config import Experiment
from fedlora.core.errors import ConfigError
from fedlora.core.state import generator
from fedlora.methods import fedavg
from fedlora.privacy.accountant import example_epsilon
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import AdamW, Local
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.server.aggregate import Mean
from fedlora.testing import toy_task
from fedlora.tuning import BitFit, Full, LoRA, Tuning

world = pytest.fixture(scope="module")(tiny_world)
CPU = torch.device("cpu")
SILENT = ExampleNoise(clip_norm=1e9, noise_multiplier=0.0, seed=0)


def gradients(tuning: Tuning, family: str, noise: ExampleNoise, rows: Any, batch_size: int) -> dict[str, torch.Tensor]:
    task = toy_task(family)
    model, head = task.load_model(0, "fp32", CPU)
    installed = tuning.install(model, head, 0)
    model.eval()
    values = list(installed.parameters.values())
    noise.gradients(
        lambda chosen: task.loss(model, task.batch(chosen, CPU)), values, np.asarray(rows), batch_size, noise.draws(1)
    )
    return {name: value.grad.clone() for name, value in installed.parameters.items() if value.grad is not None}


@pytest.mark.parametrize("family", ["bert", "t5", "mobilenet_v2"])
@pytest.mark.parametrize("tuning", [LoRA(rank=2), BitFit(), Full()], ids=lambda tuning: type(tuning).__name__)
def test_without_clip_and_noise_it_is_the_gradient_of_the_batch(family: str, tuning: Tuning) -> None:
    if family == "t5" and isinstance(tuning, BitFit):
        pytest.skip("T5 has no biases")
    found = gradients(tuning, family, SILENT, range(6), 6)
    task = toy_task(family)
    model, head = task.load_model(0, "fp32", CPU)
    installed = tuning.install(model, head, 0)
    model.eval()
    task.loss(model, task.batch(np.arange(6), CPU)).backward()  # type: ignore[no-untyped-call]
    for name, value in installed.parameters.items():
        expected = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)


def test_each_example_is_clipped_by_itself() -> None:
    one = [gradients(LoRA(rank=2), "bert", SILENT, [row], 1) for row in range(4)]
    norms = [math.sqrt(sum(float(value.square().sum()) for value in each.values())) for each in one]
    clip = sorted(norms)[1] * 1.01  # two are longer
    found = gradients(LoRA(rank=2), "bert", replace(SILENT, clip_norm=clip), range(4), 8)
    for name, value in found.items():
        expected = sum(each[name] / max(1.0, norm / clip) for each, norm in zip(one, norms, strict=True)) / 8
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_the_noise_is_z_times_c_on_the_sum_and_falls_on_an_empty_batch_too() -> None:
    noise = ExampleNoise(clip_norm=0.5, noise_multiplier=2.0, seed=3)
    found = gradients(Full(), "bert", noise, np.zeros(0, np.int64), 10)
    values = torch.cat([value.flatten() for value in found.values()])
    assert float(values.std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.02)
    assert abs(float(values.mean())) < 0.002
    assert not torch.equal(*(torch.sort(each.flatten()[:64]).values for each in list(found.values())[:2]))


@pytest.mark.parametrize("seed", [0, None])
def test_batches_are_poisson_samples(seed: int | None) -> None:
    rows = np.arange(100, 140)
    draws = None if seed is None else generator(seed)
    batches = SILENT.batches(rows, 2000, 4, draws)
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(4.0, abs=0.25)
    assert sizes.var() == pytest.approx(40 * 0.1 * 0.9, rel=0.15)
    assert (sizes == 0).any()
    assert set(np.concatenate(batches)) == set(rows)
    assert all(len(set(batch)) == len(batch) for batch in batches)
    assert all(len(batch) == 40 for batch in SILENT.batches(rows, 3, 50, draws))


def phases(**settings: Any) -> tuple[Phase, ...]:
    noise = ExampleNoise(**{"clip_norm": 1.0, "noise_multiplier": 1.0, "seed": 0, **settings})
    return fedavg(rounds=4, tuning=LoRA(rank=4), local=replace(LOCAL, example_privacy=noise))


def test_the_account_is_that_of_the_client_that_lost_most() -> None:
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.rdp import RdpAccountant

    def direct(chance: float, steps: int) -> float:
        account = RdpAccountant()
        event = accounting.GaussianDpEvent(1.0)
        account.compose(event if chance == 1 else accounting.PoissonSampledDpEvent(chance, event), steps)
        return float(account.get_epsilon(1e-5))

    # batches of 8, two passes: 16 examples take 4 steps at 1/2, 80 take 20 at 1/10
    cohorts = [(0, 1), (1,), (1, 2)]
    turns = [(size, phases()[0].recipe.local) for size in (16, 80, 0)]
    found = example_epsilon(phases(), cohorts, turns)
    assert found == pytest.approx(max(direct(0.5, 4), direct(0.1, 60)))
    # who took part in a secret round nobody knows
    secret = example_epsilon(phases(), [(), ()], turns, secret=True)
    assert secret == pytest.approx(max(direct(0.5, 8), direct(0.1, 40)))
    # and an empty sample, which is no secret, discloses nothing
    assert example_epsilon(phases(), [*cohorts, ()], turns) == found
    assert example_epsilon(phases(), [(0,)], [(8, turns[0][1])]) == pytest.approx(direct(1.0, 2))
    assert example_epsilon(phases(), [], turns) == 0.0
    assert example_epsilon(phases(noise_multiplier=0.0), cohorts, turns) is None
    with pytest.raises(ConfigError, match="in warm_local too"):
        Experiment(phases=(Phase(), *phases()))
    with pytest.raises(ConfigError, match="in warm_local too"):
        Experiment(phases=(*phases(noise_multiplier=0.0), *phases()))


def test_a_client_without_rows_draws_empty_batches() -> None:
    drawn = SILENT.batches(np.empty(0, np.int64), 3, 8, generator(0))
    assert [len(one) for one in drawn] == [0, 0, 0]


def test_a_tier_with_larger_batches_or_more_steps_loses_more() -> None:
    pytest.importorskip("dp_accounting")
    local = phases()[0].recipe.local
    plain = example_epsilon(phases(), [(0, 1)] * 10, [(80, local), (80, local)]) or 0.0
    larger = example_epsilon(phases(), [(0, 1)] * 10, [(80, local), (80, replace(local, batch_size=64))]) or 0.0
    shorter = example_epsilon(phases(), [(0, 1)] * 10, [(80, replace(local, max_steps=1))] * 2) or 0.0
    assert larger > 1.5 * plain
    assert 0 < shorter < plain


def test_phases_that_differ_in_the_account_are_refused_before_training(world: Path, tmp_path: Path) -> None:
    one, other = phases(), phases(noise_multiplier=2.0)
    with pytest.raises(ConfigError, match="share one account of examples"):
        example_epsilon((*one, *other), [], [(16, LOCAL)])
    # a learning rate is no part of it
    faster = replace(one[0].recipe.local, optimizer=AdamW(lr=0.5))
    recipes = (one[0], replace(one[0], recipe=replace(one[0].recipe, local=faster)))
    assert example_epsilon(recipes, [], [(16, faster)]) == 0.0


def test_an_example_without_a_finite_gradient_is_left_out() -> None:
    task = toy_task()
    loss = task.loss

    def broken(model: Any, batch: Any) -> torch.Tensor:
        return loss(model, batch) * (float("nan") if int(batch["labels"][0]) == 1 else 1.0)

    task.loss = broken  # type: ignore[method-assign]
    model, head = task.load_model(0, "fp32", CPU)
    installed = LoRA(rank=2).install(model, head, 0)
    values = list(installed.parameters.values())
    SILENT.gradients(lambda chosen: task.loss(model, task.batch(chosen, CPU)), values, np.arange(6), 6, None)
    assert all(bool(torch.isfinite(value.grad).all()) for value in values if value.grad is not None)


def test_under_noise_a_client_that_fails_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(phases(noise_multiplier=0.0))
    state = federation.start()
    task = federation.workspace.task
    loss = task.loss
    monkeypatch.setattr(task, "loss", lambda model, batch: loss(model, batch) * float("nan"))
    after = federation.go_on(state, 1)
    assert all(torch.equal(after.params[name], value) for name, value in state.params.items())


def test_a_federation_learns_beside_a_little_noise_tells_nothing_and_repeats_with_a_seed() -> None:
    ends = []
    for _ in range(2):
        federation = Federation(phases(noise_multiplier=0.05, clip_norm=5.0), 24)
        state = federation.start()
        before = federation.loss(state)
        ends.append(federation.go_on(state, 3))
        assert federation.loss(ends[-1]) < before
        assert all((row.examples, row.steps, row.loss) == (0, 0, 0.0) for row in federation.rows)
    assert all(torch.equal(ends[0].params[name], value) for name, value in ends[1].params.items())
    secure = Federation(phases(noise_multiplier=0.05, clip_norm=5.0, seed=None), 24)
    other = secure.go_on(secure.start(), 3)
    assert any(not torch.equal(ends[0].params[name], value) for name, value in other.params.items())


def test_the_ledger_tells_what_examples_have_lost(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    noise = "method.local.example_privacy={clip_norm=1.0,noise_multiplier=1.0}"
    result = fedlora.run(experiment(world, "lora", noise, "checkpoint_every=10", rounds=3), tmp_path / "run")
    spent = [row["example_epsilon"] for row in ledger(result.folder)]
    assert spent[0] is None
    assert 0 < spent[1] <= spent[2] <= spent[3]
    # noise that cannot be drawn again must not be drawn twice for one round
    assert len(list((result.folder / "checkpoints").iterdir())) == 2
    manifest = json.loads((result.folder / "manifest.json").read_text())
    (told,) = manifest["example_privacy"]
    assert told["noise"] == "the operating system's secure source"
    assert (told["noise_multiplier"], told["clip_norm"], told["accountant"]) == (1.0, 1.0, "rdp")


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"aggregator": Mean(weighting="examples")}, "do not report their number"),
        ({"shrink": RankPruning()}, "bypass the noise"),
        ({"local": Local(example_privacy=SILENT, timeout_seconds=1.0)}, "lengths of examples"),
    ],
)
def test_what_would_pass_by_the_noise_is_refused(slots: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"local": Local(example_privacy=SILENT), **slots})

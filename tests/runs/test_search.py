"""FLASC-Search: pairs of equal bytes, the better one kept, until the budget; stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures.tiny import experiment, tiny_world
from typer.testing import CliRunner

from fedlora import config
from fedlora.cli.main import app
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, prepare
from fedlora.core.errors import CheckpointError, ConfigError, TrainingError
from fedlora.runs.search import Bounds, Trial, _Sizes, configured, search
from fedlora.transport import TopK

world = pytest.fixture(scope="module")(tiny_world)
BOUNDS = Bounds(rank=1, density=0.25, factor=2, client_bytes=3_000.0, max_rank=4)


def searched(world: Path, folder: Path, bounds: Bounds = BOUNDS, *overrides: str) -> list[Trial]:
    return search(experiment(world, "flasc", *overrides, rounds=2), folder, bounds)


def test_each_step_tries_more_density_and_more_ranks_of_the_better_one(world: Path, tmp_path: Path) -> None:
    trials = searched(world, tmp_path / "search")
    assert (trials[0].rank, trials[0].density, trials[0].kept) == (1, 0.25, True)
    assert len(trials) >= 3
    best = trials[0]
    for step in range(1, trials[-1].step + 1):
        pair = [trial for trial in trials if trial.step == step]
        denser = [trial for trial in pair if trial.rank == best.rank]
        wider = [trial for trial in pair if trial.density == best.density]
        assert denser + wider == pair
        assert all(best.density < trial.density <= 1 for trial in denser)
        assert all(best.rank < trial.rank <= min(4, 2 * best.rank) for trial in wider)
        kept = [trial for trial in pair if trial.kept]
        if not kept:
            break
        (best,) = kept
    assert all(trial.client_bytes <= BOUNDS.client_bytes for trial in trials if trial.kept)
    chosen = experiment(world, "flasc", rounds=2)
    sizes = _Sizes(chosen, prepare(chosen), BOUNDS)
    spare = BOUNDS.client_bytes - best.client_bytes + sizes.of(best.rank, best.density)
    last = [trial for trial in trials if trial.step == trials[-1].step]
    # nothing more fits, or what was tried at last turned out too long
    if any(trial.kept for trial in last):
        assert all(sizes.of(*one) > spare for one in sizes.after(best.rank, best.density))
    else:
        assert all(trial.client_bytes > BOUNDS.client_bytes for trial in last)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_the_better_of_a_pair_is_kept_whichever_way_is_better(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, higher: bool, wide: bool
) -> None:
    def made_up(chosen: Experiment, folder: Path, *, data: FederatedData, callbacks: Any) -> SimpleNamespace:
        recipe = chosen.phases[0].recipe
        rank, density = recipe.tuning.rank, recipe.up.sparsify.density
        good = (rank if wide else 0) + density
        return SimpleNamespace(
            rounds=2,
            down_bytes={"adapter": 0},
            up_bytes={"adapter": 6 * round(700 * rank * density)},
            main_metric="m",
            after={"m": good if higher else -good},
        )

    def prepared(chosen: Experiment) -> FederatedData:
        data = prepare(chosen)
        data.task.higher_is_better = higher
        return data

    monkeypatch.setattr("fedlora.runs.search.run", made_up)
    monkeypatch.setattr("fedlora.runs.search.prepare", prepared)
    trials = searched(world, tmp_path / "search")
    kept = [(trial.rank, trial.density) for trial in trials if trial.kept]
    assert len(kept) >= 3
    assert len(trials) > len(kept)
    ranks, densities = zip(*kept, strict=True)
    if wide:
        assert densities[0] == densities[1]
        assert ranks[:2] == (1, 2)
    else:
        assert ranks[:3] == (1, 1, 1)
        assert densities[0] < densities[1] < densities[2] <= 1.0


@pytest.mark.parametrize("holdout", [0.1, 0.0])
def test_trials_are_compared_on_training_data_unless_asked_otherwise(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdout: float
) -> None:
    seen: list[FederatedData] = []
    original = prepare

    def prepared(chosen: Experiment) -> FederatedData:
        seen.append(original(chosen))
        return seen[-1]

    monkeypatch.setattr("fedlora.runs.search.prepare", prepared)
    chosen = experiment(world, "flasc", rounds=1)
    search(chosen, tmp_path / "search", Bounds(1, 0.25, 2, 1_000.0, 1), holdout=holdout)
    texts, test = seen[0].task.texts("test"), prepare(chosen).task.texts("test")
    assert (set(texts) <= set(test)) == (not holdout)
    assert config.load(tmp_path / "search" / "best.toml").data == chosen.data
    with pytest.raises(ConfigError, match="a share above 0 and below 1"):
        search(chosen, tmp_path / "other", BOUNDS, holdout=1.0)


def test_a_trial_that_fails_has_lost(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.runs import search as module

    run = module.run

    def failing(experiment: Any, folder: Path, **others: Any) -> Any:
        if "rank-2" in folder.name:
            raise TrainingError("it diverged")
        return run(experiment, folder, **others)

    monkeypatch.setattr(module, "run", failing)
    trials = searched(world, tmp_path / "search")
    assert [(trial.metric is None, trial.kept) for trial in trials if trial.rank == 2] == [(True, False)] * sum(
        trial.rank == 2 for trial in trials
    )
    assert (tmp_path / "search" / "best.toml").exists()


@pytest.mark.parametrize(("rank", "density", "factor"), [(2, 0.25, 2), pytest.param(1, 0.1, 4, marks=pytest.mark.slow)])
def test_the_two_of_a_pair_cost_the_same(world: Path, tmp_path: Path, rank: int, density: float, factor: int) -> None:
    bounds = Bounds(rank, density, factor, client_bytes=4_000.0, max_rank=16)
    trials = search(experiment(world, "flasc", rounds=6), tmp_path / "search", bounds)
    one, other = (trial for trial in trials if trial.step == 1)
    assert (one.rank, other.density) == (rank, density)
    assert one.client_bytes == pytest.approx(other.client_bytes, rel=0.08)


def test_a_pair_costs_the_same_where_a_factor_keeps_still(world: Path, tmp_path: Path) -> None:
    sparse = "sparsify={kind='top_k', density=0.25}"
    chosen = experiment(
        world, "full", "method.kind='fedavg'", "method.tuning={kind='lora', rank=2, train='B'}",
        f"method.down={{{sparse}, reference='init'}}", f"method.up={{{sparse}}}", rounds=6,
    )  # fmt: skip
    trials = search(chosen, tmp_path / "search", Bounds(2, 0.25, 2, client_bytes=4_000.0, max_rank=16))
    one, other = (trial for trial in trials if trial.step == 1)
    assert one.client_bytes == pytest.approx(other.client_bytes, rel=0.08)


@pytest.mark.parametrize("link", ["down", "up"])
def test_a_pair_costs_the_same_where_one_link_is_dense(world: Path, link: str) -> None:
    chosen = experiment(world, "flasc", f"method.{link}=1.0")
    sizes = _Sizes(chosen, prepare(chosen), BOUNDS)
    denser, wider = sizes.after(2, 0.25)
    assert denser[0] == 2
    assert wider == (3, 0.25)  # with rank 4 it would be more than all of rank 2
    assert sizes.of(*denser) == pytest.approx(sizes.of(*wider), rel=0.02)


def test_no_rank_is_above_what_a_matrix_can_have(world: Path, tmp_path: Path) -> None:
    bounds = Bounds(rank=8, density=0.25, factor=4, client_bytes=1e9, max_rank=1000)
    trials = searched(world, tmp_path / "search", bounds)
    assert max(trial.rank for trial in trials) == 32
    assert (tmp_path / "search" / "best.toml").exists()


def test_the_answer_is_a_configuration_that_runs_and_the_table_is_kept(world: Path, tmp_path: Path) -> None:
    trials = searched(world, tmp_path / "search")
    best = max((trial for trial in trials if trial.kept), key=lambda trial: trial.metric or 0.0)
    found = config.load(tmp_path / "search" / "best.toml")
    recipe = found.phases[0].recipe
    assert recipe.tuning.rank == best.rank  # type: ignore[union-attr]
    assert recipe.up.sparsify == TopK(density=best.density)
    kept = json.loads((tmp_path / "search" / "search.json").read_text())
    assert kept["trials"] == [trial.__dict__ for trial in trials]
    assert kept["bounds"]["client_bytes"] == 3_000.0


def test_a_search_that_was_stopped_goes_on_and_says_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.runs import search as module

    expected = searched(world, tmp_path / "whole")
    done: list[str] = []
    run = module.run

    def stopping(experiment: Any, folder: Path, **others: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(folder.name)
        return run(experiment, folder, **others)

    with monkeypatch.context() as patch:
        patch.setattr(module, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            searched(world, tmp_path / "search")
    finished = (tmp_path / "search" / done[0] / "result.json").stat().st_mtime_ns
    assert searched(world, tmp_path / "search") == expected
    assert (tmp_path / "search" / done[0] / "result.json").stat().st_mtime_ns == finished  # it was not run again


def test_trials_of_another_search_are_not_continued(world: Path, tmp_path: Path) -> None:
    bounds = Bounds(1, 0.25, 2, 1_200.0, 1)
    search(experiment(world, "flasc", rounds=1), tmp_path, bounds)
    with pytest.raises(CheckpointError, match=r"another configuration .* choose another folder with --out"):
        search(experiment(world, "flasc", rounds=2), tmp_path, bounds)


@pytest.mark.parametrize(
    ("method", "overrides", "bounds", "message"),
    [
        ("lora", (), BOUNDS, "there is none; use method flasc"),
        ("full", (), BOUNDS, "varies the rank of LoRA"),
        ("slora", (), BOUNDS, "in one phase"),
        ("flasc", ("mode='centralised'",), BOUNDS, "only a federation sends"),
        ("flasc", ("method.tuning.rank_pattern={query=2}",), BOUNDS, "the same rank of all adapters"),
        ("flasc", (), BOUNDS._replace(client_bytes=100.0), "above the budget of 100"),
        ("flasc", (), BOUNDS._replace(density=0.0), "above 0 and at most 1"),
        ("flasc", (), BOUNDS._replace(rank=8), "above --max-rank 4"),
        ("flasc", (), BOUNDS._replace(client_bytes=float("nan")), "a finite number, and nan is not; set --kilobytes"),
        (
            "flasc",
            ("method.privacy={kind='none'}", "clients.tiers=[{name='a',share=1.0,rank=1}]"),
            BOUNDS,
            "of its own",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(
    world: Path, tmp_path: Path, method: str, overrides: tuple[str, ...], bounds: Bounds, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(experiment(world, method, *overrides, rounds=2), tmp_path / "search", bounds)


def test_why_the_first_trial_failed_is_told(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise TrainingError("client 3 got a loss of nan")

    monkeypatch.setattr("fedlora.runs.search.run", failing)
    with pytest.raises(ConfigError, match="did not train: client 3 got a loss of nan"):
        searched(world, tmp_path / "search")


def test_a_budget_that_nothing_fits_is_refused_before_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.runs.search.run", None)
    with pytest.raises(ConfigError, match="start smaller, or raise the budget"):
        searched(world, tmp_path / "search", BOUNDS._replace(client_bytes=100.0))


def test_folds_are_not_searched(world: Path) -> None:
    top = "method.up={sparsify={kind='top_k',density=0.25}}"
    chosen = experiment(
        world, "bitfit", "method.tuning={kind='lora',rank=4}", top, "method.aggregator={kind='product_exact'}"
    )
    with pytest.raises(ConfigError, match="an aggregator without folds"):
        configured(chosen, 2, 0.5)


def test_the_other_link_and_everything_else_stay_as_they_are(world: Path) -> None:
    before = experiment(world, "flasc", "method.up=1.0")
    after = configured(before, 2, 0.5)
    assert after.phases[0].recipe.up == before.phases[0].recipe.up
    assert after.phases[0].recipe.down.sparsify == TopK(density=0.5)
    assert after.phases[0].recipe.local == before.phases[0].recipe.local


def test_the_command_prints_what_was_tried(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml(experiment(world, "flasc", rounds=2)))
    arguments = ["search", str(file), "--kilobytes", "3", "--rank", "1", "--density", "0.25", "--factor", "2"]
    arguments += ["--max-rank", "4", "--out", str(tmp_path / "search")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "best.toml" in shown.output
    again = CliRunner().invoke(app, [*arguments, "--format", "json"])
    trials = json.loads(again.stdout)
    assert [trial["step"] for trial in trials][:1] == [0]
    assert trials == json.loads((tmp_path / "search" / "search.json").read_text())["trials"]

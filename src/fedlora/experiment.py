"""One run, from configuration to adapter: phases, rounds, evaluation, checkpoints, ledger."""

from __future__ import annotations

import dataclasses
import math
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import config
from fedlora.account import Sampled, example_epsilon, open_account
from fedlora.byte_counts import ByteCounts
from fedlora.clients import Population, draw_cohort
from fedlora.config import Experiment
from fedlora.engines import Engine, Serial
from fedlora.errors import CheckpointError, FedloraError, QuorumError
from fedlora.evaluation import evaluate, over_clients, tested_clients
from fedlora.export import export_run
from fedlora.folder import RunFolder
from fedlora.foreign import Partitioner
from fedlora.ledger import Row
from fedlora.phases import close_phase, open_phase
from fedlora.recipe import Recipe
from fedlora.round import run_round
from fedlora.setting import Setting, in_mode, manifest, prepare
from fedlora.state import ServerState, named_seed
from fedlora.track import Tracker
from fedlora.watch import Silent, Watcher
from fedlora.workspace import Workspace


class Stopped(FedloraError):
    """The user asked to stop; everything is saved."""


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        label: the method's name.
        folder: where the run lies.
        seed: its seed.
        rounds: rounds done.
        main_metric: the metric that tables show.
        higher_is_better: its direction.
        before: metrics before the first round.
        after: metrics after the last one, on all test examples.
        down_bytes: bytes sent to clients, by kind.
        up_bytes: bytes received from clients, by kind.
        seconds: time spent in rounds and evaluations, over all sessions of the run.
        rows: the ledger.
        adapter: the exported adapter or model.
    """

    label: str
    folder: Path
    seed: int
    rounds: int
    main_metric: str
    higher_is_better: bool
    before: dict[str, float]
    after: dict[str, float]
    down_bytes: ByteCounts
    up_bytes: ByteCounts
    seconds: float
    rows: tuple[Row, ...] = field(repr=False)
    adapter: Path | None = None


def run(
    experiment: Experiment,
    folder: Path | str | None = None,
    *,
    partitioner: Partitioner | None = None,
    watcher: Watcher | None = None,
    trackers: Sequence[Tracker] = (),
    setting: Setting | None = None,
    engine: Engine | None = None,
    until: int | None = None,
) -> Result:
    """Runs an experiment, or goes on with it where its folder holds a checkpoint.

    Args:
        experiment: what to run.
        folder: where to keep the run; ``runs/<label>-<digest>`` if absent.
        partitioner: deals the data instead of the configuration's partition.
        watcher: is told of every round.
        trackers: get every row of the ledger; not in the mode ``local``, where there is a ledger per client.
        setting: data that ``prepare`` gave for the same experiment, to share among runs.
        engine: where clients run; in this process if absent.
        until: the round to stop after for now, evaluated and saved; a later call goes on from it. Nothing is exported.

    Returns:
        Metrics, bytes and the folder; with ``until``, of the rounds up to it, metrics being those of the ledger.

    Raises:
        FedloraError: something that the message says how to mend.
        Stopped: the user interrupted; the run can go on.
    """
    watcher = watcher or Silent()
    path = Path(folder) if folder is not None else Path("runs") / f"{experiment.label}-{config.digest(experiment)}"
    files = RunFolder(path)
    files.claim(experiment)
    effective = in_mode(experiment)
    try:
        setting = setting or prepare(effective, partitioner)
        if experiment.mode == "local":
            return _run_local(experiment, effective, setting, files, watcher, until)
        sent = experiment.mode == "federated"
        return _run_phases(effective, setting, files, watcher, trackers, sent, engine, until)
    except KeyboardInterrupt:
        on = "The same command goes on" if engine else f"Go on with: fedlora run {shlex.quote(str(path))}"
        raise Stopped(f"stopped; every finished round is saved. {on}") from None


def _run_phases(
    experiment: Experiment,
    setting: Setting,
    files: RunFolder,
    watcher: Watcher,
    trackers: Sequence[Tracker],
    sent: bool,
    engine: Engine | None = None,
    until: int | None = None,
) -> Result:
    workspace = Workspace(setting.task, experiment.seed, setting.device)
    engine = engine or Serial(workspace, setting.population)
    facts = {"config": config.digest(experiment), "data": setting.task.fingerprint}
    state, rows = _resume(files, facts)
    clients = experiment.clients
    sampled = Sampled(len(setting.population), clients.per_round, clients.sampling)
    budget, phases = open_account(experiment.phases, sampled)
    files.write_json("manifest.json", manifest(experiment, setting, budget, phases))
    watcher.started(experiment, setting, rows)
    for tracker in trackers:
        tracker.started(rows)
    phase = state.phase if state else 0
    recipe = phases[phase].recipe
    # an account of sampled cohorts holds only while nobody can tell who was in them
    seeds = [getattr(each.recipe.privacy, "seed", None) for each in phases]
    secret = budget is not None and None in seeds
    drawn = any((noise := each.recipe.local.example_privacy) and noise.seed is None for each in phases)
    turns = setting.turns(recipe)
    example_epsilon(phases, [], turns)  # what it refuses is refused before training
    pending: dict[str, float] = {}
    if state is None:
        state, pending = open_phase(workspace, 0, recipe, experiment.seed, 0, None)
        clock = time.perf_counter()
        tested = tested_clients(experiment, setting, last=False)
        metrics, warnings = evaluate(experiment, setting, workspace, recipe, state, tested)
        first = Row(
            round=0, phase=0, cohort=(), examples=0, steps=0, loss=0.0, down_bytes={}, up_bytes={},
            density_down=0.0, density_up=0.0, update_norm=0.0, metrics=metrics, facts=pending, warnings=warnings,
            seconds={"evaluate": time.perf_counter() - clock},
        )  # fmt: skip
        pending = {}
        files.append(first)
        rows.append(first)
        _tell(first, watcher, trackers)
    else:
        workspace.settle(phase, recipe, state.setup)
    # `recorded` is the last state whose row is in the ledger, `saved` the round of the newest checkpoint
    recorded, saved = state, state.round if files.checkpoints else 0
    try:
        while not (budget and budget.exhausted(phases, state.round)) and (until is None or state.round < until):
            if state.steps == phases[phase].rounds:
                if phase + 1 == len(phases):
                    break
                carry = close_phase(workspace, recipe, state)
                phase += 1
                recipe = phases[phase].recipe
                state, pending = open_phase(workspace, phase, recipe, experiment.seed, state.round, carry)
            state, row = _round(experiment, setting, recipe, state, engine, secret)
            told = () if secret else row.cohort
            last = state.round == experiment.rounds or bool(budget and budget.exhausted(phases, state.round))
            metrics, warnings, seconds = {}, (), 0.0
            if last or state.round == until or state.round % experiment.evaluate.every == 0:
                clock = time.perf_counter()
                tested = tested_clients(experiment, setting, last)
                metrics, warnings = evaluate(experiment, setting, workspace, recipe, state, tested)
                seconds = time.perf_counter() - clock
            row = dataclasses.replace(
                row,
                metrics=metrics,
                warnings=row.warnings + warnings,
                facts=pending,
                epsilon=budget.spent(phases, state.round) if budget else None,
                example_epsilon=example_epsilon(phases, [*(one.cohort for one in rows[1:]), told], turns),
                seconds={**row.seconds, "evaluate": seconds},
                cohort=told,
                late=() if secret else row.late,
                refused={} if secret else row.refused,
                tiers={} if secret else row.tiers,
                tier_seconds={} if secret else row.tier_seconds,
                down_bytes=row.down_bytes if sent else {},
                up_bytes=row.up_bytes if sent else {},
                references=row.references if sent else {},
                network_seconds=row.network_seconds if sent or not clients.network else row.slowest_seconds,
            )
            if secret and any(tier.network for tier in clients.tiers):  # it would tell who was drawn
                row = dataclasses.replace(row, network_seconds=None)
            pending = {}
            files.append(row)
            rows.append(row)
            recorded = state
            # noise that cannot be drawn again must not be drawn twice for one round that anyone heard of
            # and sites cannot go far back
            often = secret or drawn or not engine.trusted
            if last or often or state.round == until or state.round % experiment.checkpoint_every == 0:
                files.save(state, facts)
                saved = state.round
            _tell(row, watcher, trackers)
    except KeyboardInterrupt:
        if recorded.round > saved:
            files.save(recorded, facts)
        raise
    if until is not None:
        done = [row for row in rows if row.round <= until]
        newest = [row for row in done if row.metrics][-1]
        seconds = sum(sum(row.seconds.values()) for row in done)
        return Result(
            folder=files.path, rows=tuple(done), **_figures(experiment, setting, done, newest.metrics, seconds)
        )
    return _finish(experiment, setting, workspace, recipe, state, rows, files, watcher)


def _round(
    experiment: Experiment, setting: Setting, recipe: Recipe, state: ServerState, engine: Engine, secret: bool
) -> tuple[ServerState, Row]:
    """One round; where too few clients answer it is tried again, and nothing of the attempt counts."""
    clients, tried = experiment.clients, 0
    warnings: tuple[str, ...] = ()
    seed = secrets.randbits(48) if secret else named_seed(experiment.seed, "cohort", state.round)
    num = min(math.ceil(clients.per_round * engine.over_sample), len(setting.population))
    expected = clients.per_round if clients.sampling == "poisson" else None
    while True:
        engine.wait()
        cohort = draw_cohort(setting.population, num, seed, clients.sampling)
        present = engine.present()
        # a draw that an account of privacy counts on is as it is
        if present is not None and clients.sampling == "fixed" and not recipe.privacy.needs_uniform_mean:
            others = np.random.default_rng(seed).permutation(sorted(present - set(cohort)))
            cohort = (*(one for one in cohort if one in present), *map(int, others))[:num]
        try:
            after, row = run_round(
                recipe, state, cohort, engine, experiment.seed, experiment.rounds, setting.tiers, expected,
                clients.networks() if experiment.mode == "federated" else {},
            )  # fmt: skip
            return after, dataclasses.replace(row, warnings=warnings)
        except QuorumError as error:
            tried += 1
            if tried == engine.attempts:
                raise
            warnings += (f"round {state.round + 1} was tried again: {error}",)
            state = state.without(error.refused)


def _resume(files: RunFolder, facts: dict[str, str]) -> tuple[ServerState | None, list[Row]]:
    held = files.latest()
    if held is None:
        return None, files.rewind(-1)
    state, kept = held
    if kept["config"] != facts["config"]:
        raise CheckpointError(f"the checkpoint in {files.path} belongs to another configuration; use another --out")
    if kept["data"] != facts["data"]:
        raise CheckpointError(
            f"the data have changed since the checkpoint in {files.path} was made; put the old data back, or start in "
            "another folder with --out"
        )
    rows = files.rewind(state.round)
    if [row.round for row in rows] != list(range(state.round + 1)):
        raise CheckpointError(
            f"{files.path / 'ledger.jsonl'} lacks rounds that its checkpoint has; put the old file back, or start in "
            "another folder with --out"
        )
    return state, rows


def _tell(row: Row, watcher: Watcher, trackers: Sequence[Tracker]) -> None:
    watcher.finished_round(row)
    for tracker in trackers:
        tracker.log(row)


def _finish(
    experiment: Experiment,
    setting: Setting,
    workspace: Workspace,
    recipe: Recipe,
    state: ServerState,
    rows: list[Row],
    files: RunFolder,
    watcher: Watcher,
) -> Result:
    held = files.read_json("result.json") if (files.path / "result.json").exists() else None
    adapter: Path | None = None
    if held:
        after, seconds, adapter = held["after"], held["seconds"], files.path / held["adapter"]
    else:
        clock = time.perf_counter()
        after, _ = evaluate(experiment, setting, workspace, recipe, state)
        # the last round has tested all clients already
        after |= {name: value for name, value in rows[-1].metrics.items() if name.startswith("client_")}
        seconds = sum(sum(row.seconds.values()) for row in rows) + time.perf_counter() - clock
    if adapter is None or not adapter.exists():
        adapter = export_run(files.path, experiment, setting.task, workspace, recipe, state, after)
    figures = _figures(experiment, setting, rows, after, seconds)
    if not held:
        files.write_json("result.json", {**figures, "adapter": adapter.name})
    result = Result(folder=files.path, rows=tuple(rows), adapter=adapter, **figures)
    watcher.finished(result)
    return result


def _figures(
    experiment: Experiment, setting: Setting, rows: list[Row], after: dict[str, float], seconds: float
) -> dict[str, Any]:
    return {
        "label": experiment.label,
        "seed": experiment.seed,
        "rounds": rows[-1].round,
        "main_metric": setting.task.main_metric,
        "higher_is_better": setting.task.higher_is_better,
        "before": rows[0].metrics,
        "after": after,
        "down_bytes": _total(row.down_bytes for row in rows),
        "up_bytes": _total(row.up_bytes for row in rows),
        "seconds": seconds,
    }


def _total(kinds: Any) -> ByteCounts:
    total: ByteCounts = {}
    for sizes in kinds:
        for kind, size in sizes.items():
            total[kind] = total.get(kind, 0) + size
    return total


def _run_local(
    asked: Experiment,
    experiment: Experiment,
    setting: Setting,
    files: RunFolder,
    watcher: Watcher,
    until: int | None,
) -> Result:
    count = min(asked.num_local, len(setting.population))
    chosen = draw_cohort(setting.population, count, named_seed(asked.seed, "local"))
    results = []
    for client in chosen:
        rows = setting.population.rows_of(client)
        single = Population((setting.population.names[client],), rows, np.array([0, len(rows)]))
        kept = {0: setting.holdout[client]} if client in setting.holdout else {}
        own = dataclasses.replace(setting, population=single, holdout=kept)
        inner = RunFolder(files.path / "clients" / str(client))
        inner.path.mkdir(parents=True, exist_ok=True)
        results.append(_run_phases(experiment, own, inner, watcher, (), sent=False, until=until))
    first = results[0]
    result = dataclasses.replace(
        first,
        folder=files.path,
        before=_over_local([one.before for one in results], setting),
        after=_over_local([one.after for one in results], setting),
        seconds=sum(one.seconds for one in results),
        adapter=None,
    )
    if until is not None:
        return result
    document = {
        key: getattr(result, key)
        for key in ("label", "seed", "rounds", "main_metric", "higher_is_better", "before", "after")
    }
    files.write_json("manifest.json", manifest(asked, setting))
    files.write_json(
        "result.json", {**document, "down_bytes": {}, "up_bytes": {}, "seconds": result.seconds, "adapter": None}
    )
    return result


def _over_local(metrics: list[dict[str, float]], setting: Setting) -> dict[str, float]:
    """The mean over clients that trained alone; what they reached on rows of their own as ``over_clients`` has it."""
    main = setting.task.main_metric
    means = {
        name: float(np.mean([one[name] for one in metrics])) for name in metrics[0] if not name.startswith("client_")
    }
    own = [one[f"client_mean_{main}"] for one in metrics if f"client_mean_{main}" in one]
    return means | over_clients(main, own, setting.task.higher_is_better)

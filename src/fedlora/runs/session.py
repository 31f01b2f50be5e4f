"""A run in its folder: phases, rounds, evaluation, checkpoints, ledger."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora import config
from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, fingerprints, manifest
from fedlora.config.places import located_adapter
from fedlora.core.byte_counts import add_up
from fedlora.core.errors import CallbackError, CheckpointError, DivergedError, QuorumError, TrainingError
from fedlora.core.state import ServerState, named_seed
from fedlora.engines import AnyEngine, Engine, Serial
from fedlora.population.clients import draw_cohort
from fedlora.privacy.accountant import SamplingScheme, example_epsilon, open_account
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe import Recipe
from fedlora.recipe.modes import MODES
from fedlora.rounds.base_size import check_base_update
from fedlora.rounds.checkpoint import can_go_on
from fedlora.rounds.ledger import RoundRecord
from fedlora.rounds.phases import close_phase, open_phase, without_start
from fedlora.rounds.round import run_round
from fedlora.runs import mending
from fedlora.runs.attempts import Attempts
from fedlora.runs.callbacks import CallbackList
from fedlora.runs.evaluation import evaluate, tested_clients, uses_all_rows
from fedlora.runs.export import export_run
from fedlora.runs.folder import KEPT, KEPT_OF_SITES, RunFolder
from fedlora.runs.inference import TrainedRun
from fedlora.runs.partition import partition_record
from fedlora.runs.result import Result
from fedlora.runs.stopping import check_stop, reason_to_stop
from fedlora.runs.undo import undo
from fedlora.tasks.models.fingerprints import NAMES, changed


class Session:
    """A run, or the remainder of one, from the latest checkpoint of its folder to the end.

    ``state`` is the latest state whose row is in the ledger, ``rows`` the ledger.

    Args:
        experiment: the experiment to run, with the settings implied by its mode.
        data: its data.
        files: the run's folder.
        callback: called during the run.
        engine: where clients run; in this process if absent.

    Raises:
        CheckpointError: the folder's checkpoint is damaged, or belongs to other settings or data.
        ConfigError: privacy accounting does not permit the run.
    """

    state: ServerState

    def __init__(
        self,
        experiment: Experiment,
        data: FederatedData,
        files: RunFolder,
        callback: CallbackList,
        engine: AnyEngine | None,
    ) -> None:
        self.experiment, self.data, self.files, self.callback = experiment, data, files, callback
        self.mode = MODES[experiment.mode]
        self.workspace = Workspace(data.task, experiment.seed, data.device, experiment.deterministic)
        self.engine = engine if isinstance(engine, Engine) else (engine or Serial)(self.workspace, data.population)
        self._barred: frozenset[int] = frozenset()
        self._notes: tuple[str, ...] = ()
        self._facts = {
            "config": config.digest(experiment),
            "data": data.task.fingerprint,
            **fingerprints(experiment, data.task),
        }
        self.rows = self._resume()
        clients = experiment.clients
        sampled = SamplingScheme(len(data.population), clients.per_round, clients.sampling)
        self.budget, self.phases = open_account(experiment.phases, sampled)
        self._turns = data.turns(self.phases[self.state.phase if self.rows else 0].recipe)
        self._attempts = Attempts(files.path, self.phases)
        disclosed = [disclosure_of(phase.recipe) for phase in self.phases]
        # amplification by sampling holds only as long as cohort membership is secret
        self._secret = not all(each.cohort for each in disclosed)
        # noise that cannot be reproduced must not be drawn twice for a round that was already disclosed,
        # and sites keep only recent states
        self._saves_each = not all(each.replays for each in disclosed) or not self.engine.trusted

    def run(self, until: int | None = None) -> Result:
        """Runs to the end, or up to the round ``until``; see ``fedlora.run``."""
        self._begin()
        last = self.experiment.rounds if until is None else min(until, self.experiment.rounds)
        try:
            while self.state.round < last and not (self.rows[-1].stopped or self._exhausted(self.state)):
                try:
                    self._advance(until)
                except DivergedError as error:
                    self._go_back(error)
        except (KeyboardInterrupt, CallbackError):
            if self.state.round > self._saved:
                self._save()
            raise
        return self._finish() if until is None else self._so_far(until)

    def _resume(self) -> list[RoundRecord]:
        """Loads the latest checkpoint's state, if there is one, and returns the ledger up to it."""
        files = self.files
        held = mending.latest(files, self.experiment, self.callback.message)
        if held is None:
            return files.rewind(-1)
        self.state, kept = held
        if not files.began_with(kept, self.experiment):
            raise CheckpointError(f"the checkpoint in {files.path} belongs to another configuration; use another --out")
        if wrong := changed(kept, self._facts):
            raise CheckpointError(
                f"{NAMES[wrong[0]]} changed since the checkpoint in {files.path} was made; put the old {wrong[0]} "
                "back, or start in another folder with --out"
            )
        if not can_go_on(files.checkpoints[-1]) and not (files.path / "result.json").exists():
            raise CheckpointError(
                f"the run in {files.path} was started by an older version of fedlora, and this one cannot resume "
                "it; start it again in another folder with --out, or finish it with that version"
            )
        rows = files.rewind(self.state.round)
        if [row.round for row in rows] != list(range(self.state.round + 1)):
            raise CheckpointError(
                f"{files.path / 'ledger.jsonl'} lacks rounds that its checkpoint has; restore the original file, "
                "or start in another folder with --out"
            )
        return rows

    def _begin(self) -> None:
        """Restores the checkpoint, or starts the run and records the initial evaluation as the first row."""
        self.files.write_json("manifest.json", manifest(self.experiment, self.data, self.budget, self.phases))
        self.files.write_json("partition.json", partition_record(self.experiment, self.data))
        self.callback.run_started(self.experiment, self.data, self.rows)
        # called for its checks too, before any training
        self._accounted = self.budget is not None or example_epsilon(self.phases, [], self._turns) is not None
        self._restore()

    def _restore(self) -> None:
        """Loads the state of the last row, or starts the run."""
        if self.rows:
            self.workspace.apply_setup(self.state.phase, self._recipe(self.state), self.state.setup)
        else:
            recipe, seed = self.phases[0].recipe, self.experiment.seed
            state, facts = open_phase(self.workspace, 0, recipe, seed, 0, None, located_adapter(self.experiment))
            check_base_update(recipe, state, self.workspace.model, self.experiment.clients.per_round)
            metrics, warnings, seconds = self._evaluate(state, last=False)
            if self.experiment.stop:
                check_stop(self.experiment.stop, metrics, self.data.task.main_metric, self._accounted)
            row = RoundRecord(
                round=0, phase=0, cohort=(), examples=0, steps=0, loss=0.0, down_bytes={}, up_bytes={},
                density_down=0.0, density_up=0.0, update_norm=0.0, metrics=metrics, facts=facts,
                warnings=self.data.notes + self.workspace.notes + self.workspace.installed.notes + warnings,
                seconds={"evaluate": seconds},
            )  # fmt: skip
            self._record(state, row)
            self.callback.report(row)
        self._saved = self.state.round if self.files.checkpoints else 0
        for note in self._attempts.note(self.state.round):
            self.callback.message(note)
            self._notes += (note,)

    def _go_back(self, error: DivergedError) -> None:
        """Repeats the round that caused a divergence, without the client whose update explains it."""
        client, note = undo(error, self.files, self.engine, self._barred)
        self._barred |= {client}
        self._notes += (note,)
        self.callback.message(note)
        if error.recorded:
            self.rows = self._resume()
            self._restore()
        else:  # after the first round of a phase, the model has that phase's setup
            self.workspace.apply_setup(self.state.phase, self._recipe(self.state), self.state.setup)
        self.state = self.state.without({client})

    def _advance(self, until: int | None) -> None:
        """Runs the next round, including its row in the ledger and its checkpoint."""
        experiment, state = self.experiment, self.state
        facts: dict[str, float] = {}
        if state.steps == self.phases[state.phase].rounds:
            state, facts = self._next_phase()
        state, row = self._round(state)
        self._attempts.noised(state.round)
        last = bool(spent := self._exhausted(state)) or state.round == experiment.rounds
        due = last or state.round == until or state.round % experiment.evaluate.every == 0
        metrics, warnings, seconds = self._evaluate_round(state, last) if due else ({}, (), 0.0)
        row = self._redacted(self._counted(row))
        cohorts = [*(one.cohort for one in self.rows[1:]), row.cohort, *self._attempts.cohorts(state.round)]
        again = self._attempts.rounds(state.round)
        row = dataclasses.replace(
            row,
            metrics=metrics,
            warnings=self._notes + self._changes(state.round - 1) + row.warnings + warnings,
            facts=facts,
            epsilon=self.budget.spent(self.phases, state.round, again) if self.budget else None,
            example_epsilon=example_epsilon(self.phases, cohorts, self._turns, self._secret),
            seconds={**row.seconds, "evaluate": seconds},
            stopped=spent,
        )
        # asked after the last round too: it is a hook of every round
        if (reason := self._reason(row)) and not last:
            row = self._ended(state, row, reason)
        self._record(state, row)
        self._notes = ()
        due = state.round % experiment.checkpoint_every == 0
        if any((due, last, row.stopped, state.round == until, self._saves_each)):
            self._save()
        self.callback.report(row)

    def _reason(self, row: RoundRecord) -> str:
        """Why the run should end after a round that is not in the ledger yet; empty if it should not."""
        stop, task = self.experiment.stop, self.data.task
        by_setting = reason_to_stop(stop, [*self.rows, row], task.main_metric, task.higher_is_better) if stop else ""
        return self.callback.reason_to_stop(row) or by_setting

    def _ended(self, state: ServerState, row: RoundRecord, reason: str) -> RoundRecord:
        """The row of the round after which a run ends early, evaluated as the last round would have been."""
        first, final = (tested_clients(self.experiment, self.data, last) for last in (False, True))
        if not row.metrics or list(first) != list(final):
            metrics, warnings, seconds = self._evaluate_round(state, last=True)
            seconds += row.seconds["evaluate"]
            row = dataclasses.replace(
                row,
                metrics=metrics,
                warnings=tuple(dict.fromkeys(row.warnings + warnings)),
                seconds={**row.seconds, "evaluate": seconds},
            )
        return dataclasses.replace(row, stopped=reason)

    def _next_phase(self) -> tuple[ServerState, dict[str, float]]:
        carry, number = close_phase(self.workspace, self._recipe(self.state), self.state), self.state.phase + 1
        recipe = self.phases[number].recipe
        state, facts = open_phase(self.workspace, number, recipe, self.experiment.seed, self.state.round, carry)
        check_base_update(recipe, state, self.workspace.model, self.experiment.clients.per_round)
        self._notes += self.workspace.installed.notes
        return state, facts

    def _round(self, state: ServerState) -> tuple[ServerState, RoundRecord]:
        """Runs one round; if too few clients reply, it is retried and nothing of the failed attempt is used."""
        experiment, data, engine = self.experiment, self.data, self.engine
        clients, recipe, tried = experiment.clients, self._recipe(state), 0
        warnings: tuple[str, ...] = ()
        seed = secrets.randbits(48) if self._secret else named_seed(experiment.seed, "cohort", state.round)
        expected = clients.per_round if clients.sampling == "poisson" else None
        while True:
            engine.wait()
            cohort = self._cohort(recipe, seed)
            self._attempts.asked(state.round + 1, () if self._secret else cohort)
            try:
                after, row = run_round(
                    recipe, state, cohort, engine, experiment.seed, experiment.rounds, data.tiers, expected,
                    clients.networks() if self.mode.sends else {},
                )  # fmt: skip
                return after, dataclasses.replace(row, warnings=warnings + row.warnings)
            except QuorumError as error:
                tried += 1
                if tried == engine.attempts:
                    raise
                warnings += (f"round {state.round + 1} was tried again: {error}",)
                state = state.without(error.refused)

    def _cohort(self, recipe: Recipe, seed: int) -> tuple[int, ...]:
        """The clients asked in a round: the sampled ones, with replacements for those that are unavailable."""
        clients, population, engine = self.experiment.clients, self.data.population, self.engine
        num = min(math.ceil(round(clients.per_round * engine.over_sample, 9)), len(population))
        cohort = draw_cohort(population, num, seed, clients.sampling)
        if self._barred:
            cohort = tuple(one for one in cohort if one not in self._barred)
        present = engine.present()
        # a sample that privacy accounting relies on is not modified
        if present is None or clients.sampling != "fixed" or not disclosure_of(recipe).absence:
            return cohort
        others = np.random.default_rng(seed).permutation(sorted(present - set(cohort) - self._barred))
        return (*(one for one in cohort if one in present), *map(int, others))[:num]

    def _evaluate(self, state: ServerState, last: bool) -> tuple[dict[str, float], tuple[str, ...], float]:
        """Metrics, warnings and seconds of an evaluation for the ledger."""
        clock = time.perf_counter()
        tested = tested_clients(self.experiment, self.data, last)
        metrics, warnings = evaluate(self.experiment, self.data, self.workspace, self._recipe(state), state, tested)
        return metrics, warnings, time.perf_counter() - clock

    def _evaluate_round(self, state: ServerState, last: bool) -> tuple[dict[str, float], tuple[str, ...], float]:
        """``_evaluate`` after a round, whose longest update is the suspect if a metric is not finite."""
        try:
            return self._evaluate(state, last)
        except TrainingError as error:
            longest = state.parts.value("norms", "longest")
            raise DivergedError(str(error), (longest[0], longest[1]) if longest else None) from error

    def _counted(self, row: RoundRecord) -> RoundRecord:
        """The row without figures for messages that were not sent."""
        if self.mode.sends:
            return row
        takes = row.slowest_seconds if self.experiment.clients.network else row.network_seconds
        return dataclasses.replace(row, down_bytes={}, up_bytes={}, references={}, network_seconds=takes)

    def _redacted(self, row: RoundRecord) -> RoundRecord:
        """The row without anything that reveals the cohort, if its membership is secret."""
        if not self._secret:
            return row
        # with a network per tier, the modelled time would reveal the tiers
        takes = None if any(tier.network for tier in self.experiment.clients.tiers) else row.network_seconds
        return dataclasses.replace(
            row, cohort=(), late=(), refused={}, tiers={}, tier_seconds={}, network_seconds=takes
        )

    def _recipe(self, state: ServerState) -> Recipe:
        return self.phases[state.phase].recipe

    def _exhausted(self, state: ServerState) -> str:
        """Why the privacy budget permits no further round; empty if it does, and after the last one."""
        if self.budget is None or state.round == self.experiment.rounds:
            return ""
        return self.budget.exhausted(self.phases, state.round, self._attempts.rounds(state.round))

    def _changes(self, round: int) -> tuple[str, ...]:
        """The changes of the configuration that were made after a round."""
        return tuple(one for change in self.files.changes() if change["round"] == round for one in change["changes"])

    def _record(self, state: ServerState, row: RoundRecord) -> None:
        self.files.append(row)
        self.rows.append(row)
        self.state = without_start(state, self.phases)

    def _save(self) -> None:
        self.files.save(self.state, self._facts, KEPT if self.engine.trusted else KEPT_OF_SITES)
        self._saved = self.state.round
        self.callback.on_save(self._saved, self.files.checkpoints[-1])

    def _so_far(self, until: int) -> Result:
        """The result up to a round; its metrics are the latest in the ledger."""
        done = [row for row in self.rows if row.round <= until]
        newest = [row for row in done if row.metrics][-1]
        return self._result(done, newest.metrics, _seconds(done))

    def _finish(self) -> Result:
        """The result of a finished run, with the adapter; both are written if they do not exist yet."""
        files, state = self.files, self.state
        held = mending.result(files, self.callback.message)
        if held:
            after, seconds = held["after"], held["seconds"]
            adapter = mending.exported(files.path / held["adapter"], self.callback.message)
        else:
            clock = time.perf_counter()
            after, adapter = self._after(), None
            seconds = _seconds(self.rows) + time.perf_counter() - clock
        if adapter is None:
            trained = TrainedRun(self.experiment, self._recipe(state), state, self.workspace, after, files.path)
            adapter = export_run(files.path, trained)
        result = self._result(self.rows, after, seconds, adapter)
        if not held:
            files.write_json("result.json", {**result.figures(), "adapter": adapter.name})
        self.callback.run_finished(result)
        return result

    def _after(self) -> dict[str, float]:
        """Metrics on all test examples, and those over clients, all of which were evaluated after the last round."""
        metrics = self.rows[-1].metrics
        own = {name: value for name, value in metrics.items() if name.startswith("client_")}
        # the last row has none if attempts that were interrupted have spent the rest of the budget
        if not metrics or not uses_all_rows(self.experiment, self.data):
            metrics, _ = evaluate(self.experiment, self.data, self.workspace, self._recipe(self.state), self.state)
        return {name: value for name, value in metrics.items() if name not in own} | own

    def _result(
        self, rows: Sequence[RoundRecord], after: dict[str, float], seconds: float, adapter: Path | None = None
    ) -> Result:
        task = self.data.task
        return Result(
            label=self.experiment.label,
            folder=self.files.path,
            seed=self.experiment.seed,
            rounds=rows[-1].round,
            main_metric=task.main_metric,
            higher_is_better=task.higher_is_better,
            before=rows[0].metrics,
            after=after,
            down_bytes=add_up(row.down_bytes for row in rows),
            up_bytes=add_up(row.up_bytes for row in rows),
            seconds=seconds,
            rows=tuple(rows),
            adapter=adapter,
            stopped=rows[-1].stopped or (self._exhausted(self.state) if rows[-1] is self.rows[-1] else ""),
        )


def _seconds(rows: Sequence[RoundRecord]) -> float:
    return sum(sum(row.seconds.values()) for row in rows)

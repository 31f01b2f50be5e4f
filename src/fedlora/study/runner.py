"""``fedlora study``: tunes every method at every setting, then runs the best of each with every seed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora import config
from fedlora.core.errors import ConfigError
from fedlora.core.network import parse_network
from fedlora.recipe.modes import MODES
from fedlora.show.compare import warn_of_other_data
from fedlora.study import results as figures
from fedlora.study.gates import GateError, check, parse_rules, parse_target
from fedlora.study.halving import Halving, with_values
from fedlora.study.plan import Study
from fedlora.study.pool import Job, Outcome, Source, deadline_of, execute, known, processes_for, shown
from fedlora.study.restore import restore
from fedlora.study.results import Key

STAGES = ("tune", "final", "table")
"""Parts of a study that can be run on their own."""
Log = Callable[[str], None]


def setting_names(study: Study) -> dict[str, dict[str, Any]]:
    """The settings by a short name that is valid as a folder name."""
    found: dict[str, dict[str, Any]] = {}
    for setting in study.settings():
        short = {key: key.rpartition(".")[2] for key in setting}
        unique = len(set(short.values())) == len(short)
        words = ",".join(f"{short[key] if unique else key}={shown(value)}" for key, value in setting.items()) or "all"
        name = re.sub(r"[^\w.=,+-]+", "_", words)[:80]
        found[name if name not in found else f"{name}-{len(found)}"] = setting
    return found


class Finals(Source):
    """The final runs of tuned methods.

    Args:
        jobs: the jobs by method, setting and seed.
    """

    def __init__(self, jobs: dict[tuple[str, str, int], Job]) -> None:
        self.jobs = jobs
        self.outcomes: dict[tuple[str, str, int], Outcome] = {}
        self._waiting = list(jobs)
        self._keys = {job.folder: key for key, job in jobs.items()}

    def take(self) -> Job | None:
        return self.jobs[self._waiting.pop(0)] if self._waiting else None

    def put_back(self, job: Job) -> None:
        self._waiting.insert(0, self._keys[job.folder])

    def record(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[self._keys[job.folder]] = outcome


@dataclass
class Runner:
    """The execution of a study.

    Args:
        study: the study to run.
        folder: the folder of its runs and of ``results.json``.
        only: the methods to run; all if empty.
        tunings: the tunings, by method and setting.

    Raises:
        ConfigError: a configuration of the study is invalid.
    """

    study: Study
    folder: Path
    only: Sequence[str] = ()
    tunings: dict[Key, Halving] = field(init=False)
    finals: Finals = field(init=False)

    def __post_init__(self) -> None:
        study = self.study
        if unknown := [label for label in self.only if label not in study.labels]:
            raise ConfigError(f"--only: there is no method {unknown[0]!r}; there are: {', '.join(study.labels)}")
        if study.report.link:
            parse_network(study.report.link)
        if study.report.target is not None:
            label = parse_target(study.report.target, study.labels).label
            if label and label not in study.labels:
                raise ConfigError(f"report.target: there is no method {label!r}; there are: {', '.join(study.labels)}")
        self._settings = setting_names(study)
        self._rules = parse_rules(study.gates.rules, study.labels, study.vary)
        self._alone: list[str] = []
        self.tunings = {}
        for name, setting in self._settings.items():
            for label in study.labels:
                self._add(label, name, setting)
        self.finals = Finals({})

    def _add(self, label: str, name: str, setting: dict[str, Any]) -> None:
        """Parses a method's configurations, so that errors are found before anything runs."""
        study = self.study
        where = f"method {label!r}" + ("" if name == "all" else f" at {name}")
        document = study.document(label, setting, study.tune.seed)
        try:
            experiment = config.parse(document)
            if not MODES[experiment.mode].sends and label not in self._alone:
                self._alone.append(label)
            if study.tuned:
                self.tunings[label, name] = Halving(
                    f"{label} {name}" if name != "all" else label,
                    document,
                    study.varied(label),
                    self.folder / "tune" / name / label,
                    trials=study.tune.trials,
                    seed=study.tune.seed,
                    share=study.tune.holdout,
                )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def tune(self, processes: int, deadline: float | None, log: Log) -> bool:
        """Tunes the methods; returns whether tuning is complete."""
        chosen = [halving for (label, _), halving in self.tunings.items() if self._asked(label)]
        return execute(chosen, processes, deadline, log)

    def final(self, processes: int, deadline: float | None, log: Log) -> bool:
        """Runs the tuned methods with every seed; returns whether all runs are complete."""
        self.finals = Finals({key: job for key, (job, _) in self._jobs().items() if self._asked(key[0])})
        return execute([self.finals], processes, deadline, log)

    def gather(self) -> dict[str, Any]:
        """Collects all available results, including methods not selected now, and writes them to ``results.json``."""
        execute([halving for halving in self.tunings.values() if not halving.done], 1, time.monotonic())
        jobs = self._jobs()
        ended = {key: (job, self.finals.outcomes.get(key) or known(job)) for key, (job, _) in jobs.items()}
        begun = {key: one for key, one in ended.items() if one[1] or (one[0].folder / "ledger.jsonl").exists()}
        study = self.study
        outcomes = [one for _, one in ended.values() if one and not one.failure]
        metric = next(
            iter([one.main_metric for one in outcomes] or [r.main_metric for r in self.tunings.values() if r.best]), ""
        )
        higher = all(
            [one.higher_is_better for one in outcomes]
            or [halving.higher_is_better for halving in self.tunings.values()]
        )
        found: dict[str, Any] = {
            "version": figures.VERSION,
            "name": study.name,
            "metric": metric,
            "higher_is_better": higher,
            "labels": study.labels,
            "seeds": list(study.seeds),
            "reference": study.reference,
            "target": study.report.target,
            "link": study.report.link,
            "settings": [{"name": name, "values": setting} for name, setting in self._settings.items()],
            "broken_gates": [],
            "failures": self._failures(ended),
            "tuning": figures.tuning_rows(self.tunings),
            "rows": figures.tune_rows(self.tunings, study.tune.seed)
            + figures.final_rows(begun, study.report.link, self._alone)
            + self._kept(),
        }
        found["broken_gates"] = self.broken(found)
        figures.write(self.folder / "results.json", found)
        return found

    def broken(self, found: dict[str, Any]) -> list[str]:
        """The gates that do not hold, on held-out data and on test data."""
        ends = {(row["method"], row["setting"]): row["ends"] for row in found["tuning"] if row["done"]}
        tune, final = (
            {(one["method"], one["setting"]): one["reason"] for one in found["failures"] if one["stage"] == stage}
            for stage in ("tune", "final")
        )
        tuned = check(self._rules, self._settings, figures.figures(found, "tune"), ends, "held-out data", tune)
        return tuned + check(self._rules, self._settings, figures.figures(found, "final"), {}, "test data", final)

    def check_tuned(self, log: Log) -> None:
        """Checks that there are tuned values to run with every seed, and names the methods that have none.

        Raises:
            ConfigError: no method has any.
        """
        asked = [halving for (label, _), halving in self.tunings.items() if self._asked(label)]
        without = [halving for halving in asked if not (halving.done and halving.best)]
        if without and len(without) == len(asked):
            if not all(halving.done for halving in asked):
                raise ConfigError("no method is tuned yet, and final runs need tuned values: run --stage tune first")
            raise ConfigError(
                f"no trial has a result, so no method can be run with every seed; the first one: "
                f"{asked[0].trials[0].failure}. Change the study, or what it needs, and run the same command again"
            )
        if without:
            names = ", ".join(halving.name for halving in without)
            log(f"without final runs, as they are not tuned yet or every trial failed: {names}")

    def check_finals(self) -> None:
        """Checks that a final run has a result.

        Raises:
            ConfigError: all failed.
        """
        failures = [outcome.failure for outcome in self.finals.outcomes.values()]
        if failures and all(failures):
            raise ConfigError(
                f"no final run has a result; the first one: {failures[0]}. Change the study, or what it needs, and run "
                "the same command again"
            )

    def check_data(self) -> None:
        """Warns of trials, and of final runs, at one setting that read different rows, as after a change of files."""
        for name in self._settings:
            here = [halving for (_, at), halving in self.tunings.items() if at == name]
            warn_of_other_data([trial.folder for halving in here for trial in halving.trials])
            warn_of_other_data([job.folder for (_, at, _), (job, _) in self._jobs().items() if at == name])

    def stop_at_gates(self, found: dict[str, Any]) -> None:
        """Stops the study if a gate does not hold.

        Raises:
            GateError: with the figures, unless the study is configured to continue.
        """
        if found["broken_gates"] and self.study.gates.stop:
            raise GateError(
                f"{'; '.join(found['broken_gates'])}. Change the set-up or the grid, or set gates.stop = false "
                "to continue with a warning in the report"
            )

    def left(self) -> dict[str, Any]:
        """The remaining work: runs, rounds, and their duration estimated from earlier runs of the same method."""
        restore(self.folder, self.study.report.link)
        execute([halving for halving in self.tunings.values() if not halving.done], 1, time.monotonic())
        jobs = self._jobs(guess=True)
        runs: dict[str, list[int]] = {"tune": [], "final": []}
        rounds: dict[str, int] = {}
        spent: dict[str, tuple[float, int]] = {}
        for (label, _), halving in self.tunings.items():
            seconds, passed = spent.get(label, (0.0, 0))
            tried = [trial for trial in halving.trials if trial.metrics]
            passed += sum(max(trial.metrics) for trial in tried)
            spent[label] = seconds + sum(trial.seconds for trial in tried), passed
            if self._asked(label) and halving.left:
                runs["tune"].append(halving.left)
                rounds[label] = rounds.get(label, 0) + halving.left
        for (label, _, _), (job, length) in jobs.items():
            if self._asked(label) and known(job) is None:
                runs["final"].append(length)
                rounds[label] = rounds.get(label, 0) + length
        timed = {label: spent[label][0] / spent[label][1] for label in rounds if spent.get(label, (0.0, 0))[1]}
        return {
            **{stage: {"runs": len(found), "rounds": sum(found)} for stage, found in runs.items()},
            "seconds": sum(timed[label] * number for label, number in rounds.items() if label in timed),
            "not_timed": [label for label in rounds if label not in timed],
        }

    def _asked(self, label: str) -> bool:
        return not self.only or label in self.only

    def _jobs(self, guess: bool = False) -> dict[tuple[str, str, int], tuple[Job, int]]:
        """The final runs and their rounds, with runs on the same data consecutive.

        Args:
            guess: whether to include methods that are not tuned yet, with their current values.
        """
        jobs = {}
        for name in self._settings:
            for seed in self.study.seeds:
                for label in self.study.labels:
                    halving = self.tunings.get((label, name))
                    if halving is not None and not (halving.done and halving.best) and not guess:
                        continue
                    values = (
                        halving.best.values if halving and halving.best else halving.trials[0].values if halving else {}
                    )
                    jobs[label, name, seed] = self._job(label, name, seed, values)
        return jobs

    def _job(self, label: str, name: str, seed: int, values: Mapping[str, Any]) -> tuple[Job, int]:
        """The final run of a method at a setting with tuned values, and its rounds."""
        experiment = config.parse(with_values(self.study.document(label, self._settings[name], seed), values))
        folder = self.folder / "final" / name / label / f"seed-{seed}-{config.digest(experiment)[:8]}"
        return Job(config.to_toml(experiment), folder, None, f"{label} {name} seed {seed}"), experiment.rounds

    def _kept(self) -> list[dict[str, Any]]:
        """The final rows in ``results.json`` of methods without tuned values now, if they are of one of its trials."""
        file = self.folder / "results.json"
        if not file.exists():
            return []
        rows, runs = [], dict[tuple[str, str, int], set[str]]()
        for row in figures.rows_over(self.study.report.link, figures.read(file)):
            label, name, seed = key = row["method"], row["setting"], row["seed"]
            halving = self.tunings.get((label, name))
            if row["stage"] != "final" or halving is None or (halving.done and halving.best):
                continue
            if key not in runs:
                trials = halving.trials if seed in self.study.seeds else []
                runs[key] = {self._job(*key, trial.values)[0].folder.name for trial in trials}
            rows += [row] if row["run"] in runs[key] else []
        return rows

    def _failures(self, ended: dict[tuple[str, str, int], tuple[Job, Outcome | None]]) -> list[dict[str, Any]]:
        found = [
            {"stage": "tune", "method": label, "setting": name, "reason": halving.trials[0].failure}
            for (label, name), halving in self.tunings.items()
            if all(trial.failure for trial in halving.trials)
        ]
        return found + [
            {"stage": "final", "method": label, "setting": name, "seed": seed, "reason": outcome.failure}
            for (label, name, seed), (_, outcome) in ended.items()
            if outcome and outcome.failure
        ]


def run_study(
    study: Study,
    folder: Path | str,
    *,
    stage: str | None = None,
    only: Sequence[str] = (),
    jobs: int | None = 1,
    budget: float | None = None,
    log: Log = lambda text: None,
) -> dict[str, Any]:
    """Runs or resumes a study: tunes, checks gates, runs the best settings with every seed, checks gates again.

    Args:
        study: the study to run.
        folder: the folder of its runs and of ``results.json``.
        stage: ``tune`` or ``final`` to run only that part; ``table`` runs nothing.
        only: the methods to run; all if empty.
        jobs: number of concurrent processes; None for one per GPU, or per core without one.
        budget: seconds after which nothing new is started.
        log: receives a line for each run that ends.

    Returns:
        All results, as in ``results.json``.

    Raises:
        ConfigError: the study is invalid, is not tuned before its final runs, or every trial or final run failed.
        GateError: a gate does not hold.
        Stopped: the user interrupted; repeating the call resumes the study.
    """
    restore(Path(folder), study.report.link)
    runner = Runner(study, Path(folder), only)
    processes, deadline = processes_for(jobs), deadline_of(budget)
    done = True
    if stage in (None, "tune"):
        done = runner.tune(processes, deadline, log)
    found = runner.gather()
    if stage != "table" and done:
        runner.check_tuned(log)
        runner.stop_at_gates(found)
    if stage in (None, "final"):
        done = runner.final(processes, deadline, log) and done
        found = runner.gather()
        runner.check_finals()
        runner.stop_at_gates(found)
    runner.check_data()
    if not done:
        log("the budget was spent before the end; run the same command to resume")
    return found

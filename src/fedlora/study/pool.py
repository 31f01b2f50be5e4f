"""Runs in several processes: what is waiting, who does it, and what came of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fedlora import config
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, in_mode, prepare
from fedlora.core.errors import FedloraError, TrainingError
from fedlora.runs.experiment import Stopped, run
from fedlora.runs.folder import RunFolder

_RUNGS, _FAILED = "rungs.json", "failed.json"
_ATTEMPTS = 2
"""How often a run is begun whose process ends without a word."""
_LAST: dict[str, FederatedData] = {}
"""The data that this process prepared last, by the settings that decide them."""


@dataclass(frozen=True)
class Job:
    """A run to begin or to go on with.

    Args:
        text: its resolved configuration as TOML.
        folder: of the run.
        until: the round to stop after; None for a whole run with its export.
        name: for people.
    """

    text: str
    folder: Path
    until: int | None
    name: str


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Args:
        metrics: after its last round, by name.
        main_metric: which of them counts.
        higher_is_better: its direction.
        failure: why there are none; empty if there are.
        cause: ``diverged`` is training that went wrong, ``refused`` an error that the user can mend, ``fault`` another.
        seconds: that the run has taken so far.
    """

    metrics: dict[str, float]
    main_metric: str = ""
    higher_is_better: bool = True
    failure: str = ""
    cause: Literal["", "diverged", "refused", "fault"] = ""
    seconds: float = 0.0

    @property
    def value(self) -> float:
        """The main metric."""
        return self.metrics[self.main_metric]


class Source(ABC):
    """Gives jobs, one after the other, and takes what came of them."""

    @abstractmethod
    def take(self) -> Job | None:
        """The next job that can begin now; None if there is none, or none yet."""

    @abstractmethod
    def record(self, job: Job, outcome: Outcome) -> None:
        """A job is done."""


def known(job: Job) -> Outcome | None:
    """What is on disk of a job that was done before."""
    files, kept = RunFolder(job.folder), remembered(job.folder)
    name = "result.json" if job.until is None else _RUNGS
    held, failure = None, ""
    if (files.path / name).exists():
        found = files.read_json(name)
        held = found if job.until is None else found.get(str(job.until))
    elif kept.exists() and not job.folder.exists():
        found = RunFolder(kept.parent).read_json(kept.name)
        held, failure = found["outcomes"].get("end" if job.until is None else str(job.until)), found["failure"]
    if held:
        return Outcome(held["after"], held["main_metric"], held["higher_is_better"], seconds=held["seconds"])
    if (files.path / _FAILED).exists():
        failure = files.read_json(_FAILED)["reason"]
    return Outcome({}, failure=failure, cause="diverged") if failure else None


def remembered(folder: Path) -> Path:
    """The file beside a run's place that holds what is known of it where the run itself is gone."""
    return folder.with_name(f"{folder.name}.json")


def perform(job: Job) -> Outcome:
    """Does a job in this process and writes down what came of it.

    Raises:
        Stopped: the user interrupted.
    """
    files = RunFolder(job.folder)
    try:
        experiment = config.parse(tomllib.loads(job.text))
        result = run(experiment, job.folder, setting=_setting(experiment), until=job.until)
    except Stopped:
        raise
    except TrainingError as error:
        files.write_json(_FAILED, {"reason": str(error)})
        return Outcome({}, failure=str(error), cause="diverged")
    except FedloraError as error:
        return Outcome({}, failure=str(error), cause="refused")
    except Exception as error:
        return Outcome({}, failure=f"{type(error).__name__}: {error}", cause="fault")
    if job.until is not None:
        figures = {key: vars(result)[key] for key in ("after", "main_metric", "higher_is_better", "seconds")}
        held = files.read_json(_RUNGS) if (files.path / _RUNGS).exists() else {}
        files.write_json(_RUNGS, {**held, str(job.until): figures})
    return Outcome(result.after, result.main_metric, result.higher_is_better, seconds=result.seconds)


def drop_checkpoints(folder: Path) -> None:
    """Removes what only a run that goes on needs."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for inner in folder.glob("clients/*/checkpoints"):
        shutil.rmtree(inner, ignore_errors=True)


def _setting(experiment: Experiment) -> FederatedData:
    """The data of an experiment; those of the last one are kept, as runs in turn mostly share them."""
    effective = in_mode(experiment)
    values = config.resolved(effective)
    for name in ("label", "phases", "checkpoint_every"):
        del values[name]
    key = json.dumps(values, sort_keys=True)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = prepare(effective)
    return _LAST[key]


def execute(
    sources: Sequence[Source], processes: int, deadline: float | None, log: Callable[[str], None] = lambda text: None
) -> bool:
    """Does all jobs of ``sources``, those of the first one first.

    Args:
        sources: where jobs come from.
        processes: how many run at a time; 1 is this process.
        deadline: the ``time.monotonic()`` after which none is begun.
        log: gets a line for each job that ends.

    Returns:
        Whether all were done; False if the deadline came first.

    Raises:
        Stopped: the user interrupted; what ran is saved.
    """
    queue = _Queue(sources, deadline)
    try:
        if processes > 1:
            while _in_processes(queue, processes, log):
                pass
            return not queue.late
        while found := queue.next():
            source, job = found
            outcome = perform(job)
            log(_line(job, outcome))
            source.record(job, outcome)
        return not queue.late
    finally:
        _LAST.clear()  # files may change before the next time


class _Queue:
    """The jobs of several sources, and those whose process ended without a word.

    Args:
        sources: where jobs come from, the first one first.
        deadline: after which none is begun.
    """

    def __init__(self, sources: Sequence[Source], deadline: float | None) -> None:
        self.late = False
        self._sources, self._deadline = sources, deadline
        self._again: list[tuple[Source, Job]] = []
        self._tried: dict[Path, int] = {}

    def next(self) -> tuple[Source, Job] | None:
        """A job that has to be run; those that are done already are recorded."""
        if self._again:
            return self._again.pop()
        for source in self._sources:
            while job := source.take():
                outcome = known(job)
                if outcome is not None:
                    source.record(job, outcome)
                elif self._deadline is not None and time.monotonic() >= self._deadline:
                    self.late = True  # others may be done already
                else:
                    return source, job
        return None

    def lost(self, source: Source, job: Job) -> None:
        """A job's process ended without a word: it is tried once more, at most."""
        self._tried[job.folder] = self._tried.get(job.folder, 0) + 1
        if self._tried[job.folder] < _ATTEMPTS:
            self._again.append((source, job))
            return
        reason = "its process was ended, twice, as systems do that run out of memory; use fewer --jobs"
        source.record(job, Outcome({}, failure=reason, cause="fault"))


def _in_processes(queue: _Queue, processes: int, log: Callable[[str], None]) -> bool:
    """Runs jobs until none is left, or a process ended without a word; then True, to go on with another pool."""
    running: dict[Future[Outcome], tuple[Source, Job]] = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin) as pool:
        try:
            while True:
                while len(running) < processes and (found := queue.next()):
                    running[pool.submit(perform, found[1])] = found
                if not running:
                    return False
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    source, job = running[future]
                    outcome = future.result()
                    del running[future]
                    log(_line(job, outcome))
                    source.record(job, outcome)
        except BrokenProcessPool:
            for source, job in running.values():
                queue.lost(source, job)
            return True
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise Stopped("stopped; every finished round is saved. The same command goes on") from None


def _begin() -> None:
    """What a process does first: it takes one thread, and ends when the one that started it does."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # two processes must never write to one run

    threading.Thread(target=follow, daemon=True).start()


def _line(job: Job, outcome: Outcome) -> str:
    up_to = "" if job.until is None else f", round {job.until}"
    found = outcome.failure or f"{outcome.main_metric} {outcome.value:.4f}"
    return f"{job.name}{up_to}: {found}"


def processes_for(jobs: int | None) -> int:
    """How many processes to use: those asked for, else one for each core that this process may use."""
    if jobs is not None:
        return jobs
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has it
        return os.cpu_count() or 1


def deadline_of(budget: float | None) -> float | None:
    """When a budget of seconds that begins now is over."""
    return None if budget is None else time.monotonic() + budget


def shown(value: Any) -> str:
    """A setting's value for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)

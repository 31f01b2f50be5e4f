"""Execution of runs in several processes: jobs, workers, and outcomes."""

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
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Literal

import torch

from fedlora import config
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, in_mode, prepare
from fedlora.core.errors import ConfigError, FedloraError, TrainingError
from fedlora.core.interrupts import worker_signals
from fedlora.runs.experiment import Stopped, run
from fedlora.runs.folder import RunFolder

_RUNGS, _FAILED = "rungs.json", "failed.json"
_ATTEMPTS = 2
"""Maximum number of attempts at a run whose process dies unexpectedly."""
_LAST: dict[str, FederatedData] = {}
"""Cache of the data last prepared in this process, by the settings that determine them."""


@dataclass(frozen=True)
class Job:
    """A run to start or resume.

    Args:
        text: its resolved configuration as TOML.
        folder: the run's folder.
        until: the round to stop after; None for a whole run including the export.
        name: name for display.
    """

    text: str
    folder: Path
    until: int | None
    name: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job.

    Args:
        metrics: metrics after its last round, by name.
        main_metric: name of the main metric.
        higher_is_better: its direction.
        failure: why there are no metrics; empty if there are.
        cause: ``diverged`` for failed training, ``refused`` for an error that the user can fix, ``fault`` for others.
        seconds: time the run has taken so far.
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
    """A source of jobs, which receives their outcomes."""

    @abstractmethod
    def take(self) -> Job | None:
        """The next job that can start now; None if there is none, or none yet."""

    @abstractmethod
    def put_back(self, job: Job) -> None:
        """Takes back a job that was not started, to be the next one."""

    @abstractmethod
    def record(self, job: Job, outcome: Outcome) -> None:
        """Records the outcome of a finished job."""


def known(job: Job) -> Outcome | None:
    """The outcome on disk of a job that was finished earlier, if any."""
    files, kept = RunFolder(job.folder), remembered(job.folder)
    name = "result.json" if job.until is None else _RUNGS
    held, failure = None, ""
    if (files.path / name).exists():
        found = files.read_json(name) if job.until is None else _rungs(files)
        held = found if job.until is None else found.get(str(job.until))
    if not held and kept.exists():  # a remembered run that goes on has only its later rungs in its folder
        found = RunFolder(kept.parent).read_json(kept.name)
        held, failure = found["outcomes"].get("end" if job.until is None else str(job.until)), found["failure"]
    if held:
        return Outcome(held["after"], held["main_metric"], held["higher_is_better"], seconds=held["seconds"])
    if (files.path / _FAILED).exists():
        failure = files.read_json(_FAILED)["reason"]
    return Outcome({}, failure=failure, cause="diverged") if failure else None


def remembered(folder: Path) -> Path:
    """The file next to a run's folder that stores its outcome if the run itself is not on this machine."""
    return folder.with_name(f"{folder.name}.json")


def perform(job: Job) -> Outcome:
    """Executes a job in this process and stores its outcome.

    Raises:
        Stopped: the user interrupted the job.
    """
    files = RunFolder(job.folder)
    try:
        experiment = config.parse(tomllib.loads(job.text))
        result = run(experiment, job.folder, data=_data(experiment), until=job.until)
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
        held = _rungs(files) if (files.path / _RUNGS).exists() else {}
        files.write_json(_RUNGS, {**held, str(job.until): figures})
    return Outcome(result.after, result.main_metric, result.higher_is_better, seconds=result.seconds)


def _rungs(files: RunFolder) -> dict[str, Any]:
    """The outcomes of a trial by its rounds.

    Raises:
        ConfigError: they are damaged.
    """
    try:
        return files.read_json(_RUNGS)
    except ConfigError as error:
        file = files.path / _RUNGS
        raise ConfigError(
            f"{file} is damaged or may not be read: restore it, or remove the folder {files.path}, and the same "
            "command runs this trial again"
        ) from error


def drop_checkpoints(folder: Path) -> None:
    """Removes the checkpoints, which are only needed to resume a run."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for inner in folder.glob("clients/*/checkpoints"):
        shutil.rmtree(inner, ignore_errors=True)


def _data(experiment: Experiment) -> FederatedData:
    """The data of an experiment; the last ones are cached, as consecutive runs mostly share them."""
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
    """Executes all jobs of ``sources``, in the order of the sources.

    Args:
        sources: the sources of jobs.
        processes: number of concurrent jobs; 1 uses this process.
        deadline: the ``time.monotonic()`` after which no job is started.
        log: receives a line for each job that ends.

    Returns:
        Whether all jobs were finished; False if the deadline passed first.

    Raises:
        Stopped: the user interrupted; running jobs have been saved.
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
    except (KeyboardInterrupt, Stopped):  # one run's own sentence would resume that run alone
        raise Stopped("stopped; every finished round is saved. Run the same command to resume") from None
    finally:
        _LAST.clear()  # files may change before the next time


class _Queue:
    """The jobs of several sources, and those whose process died unexpectedly.

    Args:
        sources: the sources of jobs, in order of priority.
        deadline: time after which no job is started.
    """

    def __init__(self, sources: Sequence[Source], deadline: float | None) -> None:
        self.late = False
        self._sources, self._deadline = sources, deadline
        self._again: list[tuple[Source, Job]] = []
        self._tried: dict[Path, int] = {}

    def next(self) -> tuple[Source, Job] | None:
        """The next job that must be run; jobs finished earlier are recorded directly."""
        if self._again:
            return self._again.pop()
        for source in self._sources:
            late = []
            while job := source.take():
                outcome = known(job)
                if outcome is not None:
                    source.record(job, outcome)
                elif self._deadline is not None and time.monotonic() >= self._deadline:
                    self.late = True  # others may be finished already
                    late.append(job)
                else:
                    return source, job
            for job in reversed(late):
                source.put_back(job)
        return None

    def lost(self, source: Source, job: Job) -> None:
        """Handles a job whose process died unexpectedly: it is retried at most once."""
        self._tried[job.folder] = self._tried.get(job.folder, 0) + 1
        if self._tried[job.folder] < _ATTEMPTS:
            self._again.append((source, job))
            return
        reason = "its process was killed twice, as when memory runs out; use fewer --jobs"
        source.record(job, Outcome({}, failure=reason, cause="fault"))


def _in_processes(queue: _Queue, processes: int, log: Callable[[str], None]) -> bool:
    """Runs jobs until none is left, or a process dies unexpectedly; then returns True, to continue with a new pool."""
    running: dict[Future[Outcome], tuple[Source, Job]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (context.Value("i", 0),)) as pool:
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
            for child in multiprocessing.active_children():
                child.terminate()  # which they take as Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


def _begin(begun: Synchronized[int]) -> None:
    """Initialises a worker process: it uses one thread and the next GPU in turn, and ends when its parent does."""
    torch.set_num_threads(1)
    with begun.get_lock():
        number = begun.value
        begun.value += 1
    if (gpus := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(number % gpus)  # which `device = "auto"` means
    worker_signals()
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
    """Number of processes to use: as requested, or else one per GPU, or per core available if there is none."""
    if jobs is not None:
        return jobs
    if gpus := torch.cuda.device_count():
        return gpus
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not available on every system
        return os.cpu_count() or 1


def deadline_of(budget: float | None) -> float | None:
    """The deadline for a budget in seconds that starts now."""
    return None if budget is None else time.monotonic() + budget


def shown(value: Any) -> str:
    """A setting's value for display."""
    return f"{value:g}" if isinstance(value, float) else str(value)

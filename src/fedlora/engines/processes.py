"""Several clients at a time, in processes of this machine: forked ones on a CPU, one for each GPU on CUDA."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch

from fedlora.client.jobs import Job, Reply
from fedlora.client.turn import run_job
from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError, FedloraError, TrainingError, first_line, ran_out_of_memory
from fedlora.engines.base import Engine
from fedlora.population.clients import Population
from fedlora.tasks.base import Positions

Work = list[tuple[int, Job, Positions]]
"""Jobs with their number in the round and the client's rows."""
_ENDED = (
    "a worker of the engine 'processes' ended before its jobs were done, as when memory runs out: use fewer --workers, "
    "or the engine 'serial'; on GPUs, a script must start its run below `if __name__ == '__main__':`, as each worker "
    "imports it"
)


class Processes(Engine):
    """Runs a round's jobs in several processes; with the bits of ``Serial`` if this process has one thread too.

    On a CPU, workers are forked for each round: they share the base weights and the data with this process, and each
    takes memory only for what it writes. On CUDA, where a process cannot be forked, each GPU has one worker that loads
    a model of its own and stays. Jobs are placed before they start: the longest first, each on the worker with the
    least work so far.

    Args:
        workspace: the resident model of this process.
        population: the examples of each client.
        workers: number of processes; by default one for each core, or for each GPU.
        start: ``fork`` or ``spawn``; by default as described above.

    Raises:
        ConfigError: this machine cannot fork, and no GPU is used.
    """

    def __init__(
        self,
        workspace: Workspace,
        population: Population,
        workers: int | None = None,
        start: Literal["fork", "spawn"] | None = None,
    ) -> None:
        gpus = _gpus(workspace.device)
        self._fork = (start or ("spawn" if gpus else "fork")) == "fork"
        if self._fork and "fork" not in multiprocessing.get_all_start_methods():
            raise ConfigError("the engine 'processes' needs an operating system that can fork; use the engine 'serial'")
        self.workspace, self.population = workspace, population
        self.workers = workers or len(gpus) or _cores()
        self._resident: list[_Worker] = []
        weakref.finalize(self, _stop, self._resident)

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        shares = [share for share in _placed(jobs, self.population, self.workers) if share]
        crew: list[_Worker] = [] if self._fork else self._resident
        try:
            if self._fork:
                for share in shares:
                    crew.append(_forked(self.workspace, share))
            else:
                self._staff(shares)
            yield from _in_order(crew, len(jobs))
        except BaseException:
            _stop(self._resident)
            raise
        finally:
            if self._fork:
                _stop(crew)

    def _staff(self, shares: Sequence[Work]) -> None:
        """Gives each resident worker its share of the jobs; starts them if there are none."""
        if not self._resident:
            self._resident += [_spawned(self.workspace, number) for number in range(self.workers)]
        for worker, share in zip(self._resident, shares, strict=False):
            # the server's own model has the setup, so jobs may lack it; a worker's model may not have it yet
            setup = self.workspace.setup
            worker.send([(number, job._replace(setup=setup, start=None), rows) for number, job, rows in share])


class _Worker:
    """A process and the pipe to it.

    Args:
        process: the process, or the number of a forked one.
        pipe: the pipe.
        owed: the number of results to come.
    """

    def __init__(self, process: BaseProcess | int, pipe: Connection, owed: int = 0) -> None:
        self._process, self.pipe, self.owed = process, pipe, owed

    def send(self, share: Work) -> None:
        """Gives the worker jobs.

        Raises:
            TrainingError: the worker ended.
            ConfigError: they cannot be copied.
        """
        copied = _copied(share)
        with _ended():
            self.pipe.send_bytes(copied)
        self.owed = len(share)

    def receive(self) -> Any:
        """The worker's next result.

        Raises:
            TrainingError: the worker ended.
        """
        self.owed -= 1
        with _ended():
            return pickle.loads(self.pipe.recv_bytes())  # from our own child

    def stop(self) -> None:
        """Ends the process."""
        self.pipe.close()
        if isinstance(self._process, int):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        else:
            self._process.kill()
            self._process.join()


class _Pickler(pickle.Pickler):
    """Writes a view of a tensor alone: otherwise each tensor of a tree would bring the vector of all of them along."""

    def reducer_override(self, value: Any) -> Any:
        """How a value is written; views of a tensor as copies of themselves."""
        plain = type(value) is torch.Tensor and value.layout == torch.strided
        if plain and value.untyped_storage().nbytes() > value.nbytes:
            return value.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _pickled(value: Any) -> bytes:
    """Jobs or a result as bytes."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _copied(value: Any) -> bytes:
    """What a resident worker gets, as bytes.

    Raises:
        ConfigError: a part of it has no name by which another process could find it.
    """
    try:
        return _pickled(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the engine 'processes' copies everything to its workers on GPUs, and a part cannot be copied "
            f"({first_line(error)}): define functions and classes at the top of a module, or use the engine 'serial'"
        ) from error


@contextlib.contextmanager
def _ended() -> Iterator[None]:
    """Raises the system's error for a worker that ended, or that cannot be started, as a sentence."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise TrainingError(_ENDED) from error


def _stop(crew: list[_Worker]) -> None:
    """Ends all workers of a list, and empties it."""
    while crew:
        crew.pop().stop()


def _in_order(crew: Sequence[_Worker], count: int) -> Iterator[Reply]:
    """The replies in the order of the jobs.

    Raises:
        TrainingError: a worker ended.
        FedloraError: a job failed, as in this process.
    """
    found: dict[int, Reply | BaseException] = {}
    for number in range(count):
        while number not in found:
            by_pipe = {worker.pipe: worker for worker in crew if worker.owed}
            for pipe in wait(list(by_pipe)):
                done, result = by_pipe[pipe].receive()  # type: ignore[index]
                found[done] = result
        reply = found.pop(number)
        if isinstance(reply, BaseException):
            raise reply
        yield reply


def _placed(jobs: Sequence[Job], population: Population, workers: int) -> list[Work]:
    """The jobs of each worker, by greedy placement: the longest first, on the worker with the least work."""
    shares: list[Work] = [[] for _ in range(workers)]
    loads = [0] * workers
    work = [_work(job, len(population.rows_of(job.client))) for job in jobs]
    for number in sorted(range(len(jobs)), key=lambda number: (-work[number], number)):
        least = loads.index(min(loads))
        loads[least] += work[number]
        shares[least].append((number, jobs[number], population.rows_of(jobs[number].client)))
    return [sorted(share, key=lambda each: each[0]) for share in shares]


def _work(job: Job, rows: int) -> int:
    """Expected work of a job: its examples in all steps, and one for what a turn costs beside them."""
    local = job.recipe.local
    return 1 + local.num_steps(rows) * local.batch_size


def _forked(workspace: Workspace, share: Work) -> _Worker:
    """A child that runs its share on this process's model and data, which it shares until it writes."""
    ours, theirs = multiprocessing.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child runs only what follows
        with _ended():
            child = os.fork()
    if child:
        theirs.close()
        return _Worker(child, ours, len(share))
    status = 1
    try:
        ours.close()
        _begin(theirs)
        _perform(workspace, share, theirs)
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's runs at exit: no flush, no temporary folder


def _spawned(workspace: Workspace, number: int) -> _Worker:
    """A process with a model of its own, on a GPU of its own if there are several."""
    context = multiprocessing.get_context("spawn")
    gpus = _gpus(workspace.device)
    device = gpus[number % len(gpus)] if gpus else workspace.device
    settings = _copied((workspace.task, workspace.seed, device, workspace.deterministic))
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    worker = _Worker(process, ours)
    with _ended():
        worker.pipe.send_bytes(settings)
    return worker


def _serve(pipe: Connection) -> None:
    """The life of a spawned worker: builds a workspace, then runs shares of jobs until the pipe is closed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    _begin(parent.sentinel)
    task, seed, device, deterministic = pickle.loads(pipe.recv_bytes())  # the pipe from our own parent
    if device.type == "cuda":
        torch.cuda.set_device(device)
    workspace = Workspace(task, seed, device, deterministic)
    with contextlib.suppress(EOFError):
        while True:
            _perform(workspace, pickle.loads(pipe.recv_bytes()), pipe)


def _begin(parent: Connection | int) -> None:
    """What holds for every worker: one thread, requests to stop are for the parent, and it ends with the parent.

    Args:
        parent: becomes readable when the parent has ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Connection | int) -> None:
    """Ends this process as soon as its parent has: a forked one would hold the lock of the run's folder."""
    wait([parent])
    os._exit(1)


def _perform(workspace: Workspace, share: Work, pipe: Connection) -> None:
    """Runs jobs in order and sends each reply, or the error that ended the share."""
    for number, job, rows in share:
        found: Reply | BaseException
        try:
            found = run_job(job, workspace, rows)
        except FedloraError as error:
            found = error
        except Exception as error:
            advice = ran_out_of_memory(error)
            told = f"{type(error).__name__} in a worker:\n{traceback.format_exc()}"
            found = ConfigError(f"in a worker, {advice}") if advice else RuntimeError(told)
            found.__cause__ = None
        pipe.send_bytes(_pickled((number, found)))
        if isinstance(found, BaseException):
            return


def _gpus(device: torch.device) -> list[torch.device]:
    """The GPUs that workers use: all of them, or the one that ``device`` names by number; none if it is no GPU."""
    if device.type != "cuda":
        return []
    return [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if device.index is None else [device]


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1

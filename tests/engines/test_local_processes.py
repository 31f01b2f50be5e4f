"""Clients in several processes: the bits of `serial`, greedy placement, and workers that end early."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from fixtures.tiny import contents, experiment, ledger, tiny_world
from fixtures.toy import toy_run
from typer.testing import CliRunner

import fedlora
from fedlora.cli.main import app
from fedlora.client.jobs import Job, Reply
from fedlora.client.turn import run_job
from fedlora.client.workspace import Workspace
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.core.locks import LOCK
from fedlora.core.tree import have_same_bits, unflatten
from fedlora.engines import Processes, processes
from fedlora.engines.processes import _placed
from fedlora.population.clients import Population
from fedlora.tasks.base import Positions

world = pytest.fixture(scope="module")(tiny_world)


@pytest.mark.parametrize("method", ["slora", "flasc", pytest.param("fedex", marks=pytest.mark.slow)])
def test_forked_workers_give_the_bits_of_serial(world: Path, tmp_path: Path, method: str) -> None:
    state = ("method.memory=init", "method.feedback=true") if method == "flasc" else ()
    chosen = experiment(world, method, *state, rounds=4)
    for name, engine in (("serial", None), ("processes", partial(Processes, workers=2))):
        fedlora.run(chosen, tmp_path / name, engine=engine)
    assert ledger(tmp_path / "serial") == ledger(tmp_path / "processes")
    serial, several = (contents(tmp_path / name) for name in ("serial", "processes"))
    weights = [name for name in serial if name.endswith(".safetensors")]
    assert weights
    assert all(serial[name] == several[name] for name in weights)


@pytest.mark.slow  # each process loads PyTorch
def test_spawned_workers_give_the_bits_of_serial(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "slora", rounds=4)
    fedlora.run(chosen, tmp_path / "serial")
    spawned: Sequence[Literal["spawn"]] = ["spawn"]
    fedlora.run(chosen, tmp_path / "processes", engine=partial(Processes, workers=1, start=spawned[0]))
    assert ledger(tmp_path / "serial") == ledger(tmp_path / "processes")


def children() -> set[str]:
    """The processes that this one has started and not yet waited for."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def jobs_of(sizes: Sequence[int]) -> tuple[list[Job], Population]:
    chosen, _ = toy_run(fedlora.dense_lora(rounds=1))
    recipe = chosen.phases[0].recipe
    population = Population(tuple(map(str, sizes)), np.arange(sum(sizes)), np.cumsum([0, *sizes]))
    made = [Job(recipe, client, 0, 0, (0, 1), 0, "fp32", b"", None, None, None) for client in range(len(sizes))]  # type: ignore[arg-type]
    return made, population


def test_the_longest_jobs_are_placed_first_on_the_least_loaded_worker() -> None:
    jobs, population = jobs_of([16, 160, 80, 80])
    shares = _placed(jobs, population, 2)
    assert [[number for number, _, _ in share] for share in shares] == [[0, 1], [2, 3]] or [
        sorted(number for number, _, _ in share) for share in shares
    ] == [[1], [0, 2, 3]]
    loads = [sum(processes._work(job, len(rows)) for _, job, rows in share) for share in shares]
    assert max(loads) <= 4 / 3 * sum(loads) / 2  # the bound of greedy placement


def test_a_failing_job_fails_the_round_as_in_serial(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "method.local.optimizer={kind='sgd', lr=1e30}", rounds=2)
    with pytest.raises(fedlora.FedloraError) as serial:
        fedlora.run(chosen, tmp_path / "serial")
    with pytest.raises(fedlora.FedloraError) as several:
        fedlora.run(chosen, tmp_path / "processes", engine=partial(Processes, workers=2))
    assert type(serial.value) is type(several.value)


def test_a_killed_worker_ends_the_run_with_a_sentence_and_leaves_no_process(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(job: Job, workspace: Workspace, rows: Positions) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    before = children()
    monkeypatch.setattr(processes, "run_job", killed)
    with pytest.raises(TrainingError, match="a worker of the engine 'processes' ended"):
        fedlora.run(experiment(world, rounds=1), tmp_path / "run", engine=partial(Processes, workers=2))
    assert children() == before


def test_a_worker_that_cannot_be_started_ends_the_run_and_the_others(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, before = os.fork, children()

    def once() -> int:
        if children() != before:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", once)
    with pytest.raises(TrainingError, match="use fewer --workers"):
        fedlora.run(experiment(world, rounds=1), tmp_path / "run", engine=partial(Processes, workers=2))
    assert children() == before


def test_a_task_that_a_process_cannot_be_given_is_refused() -> None:
    _, data = toy_run(fedlora.dense_lora(rounds=1))
    task, before = data.task, children()
    task.loss_function = lambda outputs, labels: None  # type: ignore[attr-defined]
    engine = Processes(Workspace(task, 0, torch.device("cpu")), data.population, workers=1, start="spawn")
    jobs, _ = jobs_of([4])
    with pytest.raises(ConfigError, match=r"cannot be copied \(.*lambda.*\): define functions and classes at the top"):
        list(engine.run(jobs))
    assert children() == before


def test_a_tree_of_views_is_sent_once() -> None:
    tree = unflatten(torch.randn(40_000), {str(place): torch.zeros(100, 20) for place in range(20)})
    part = torch.randn(100, 20).t()
    raw = processes._pickled([tree, part, part])
    sent, one, other = pickle.loads(raw)
    assert len(raw) < 1.2 * 4 * 42_000
    assert have_same_bits(sent, tree)
    assert one is other
    assert one.stride() == part.stride()


def test_a_resident_worker_killed_between_two_rounds_ends_the_run_with_a_sentence() -> None:
    theirs, ours = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(TrainingError, match="a worker of the engine 'processes' ended"):
        processes._Worker(0, ours).send([])


def test_workers_of_a_killed_run_end_with_it_so_that_it_can_be_resumed(world: Path, tmp_path: Path) -> None:
    chosen, begun = experiment(world, rounds=1), tmp_path / "begun"

    def endless(job: Job, workspace: Workspace, rows: Positions) -> None:
        begun.touch()
        time.sleep(30)

    if not (child := os.fork()):
        processes.run_job = endless  # type: ignore[assignment]
        with contextlib.suppress(BaseException):
            fedlora.run(chosen, tmp_path / "run", engine=partial(Processes, workers=2))
        os._exit(1)
    wait_until(begun.exists)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: is_free(tmp_path / "run" / LOCK))
    assert fedlora.run(chosen, tmp_path / "run").rounds == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_free(lock: Path) -> bool:
    """Whether no process holds the lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_no_part_of_a_round_takes_less_than_no_time_if_clients_work_at_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long(job: Job, workspace: Workspace, rows: Positions) -> Reply:
        return run_job(job, workspace, rows)._replace(seconds=600.0)

    monkeypatch.setattr(processes, "run_job", long)
    result = fedlora.run(experiment(world, rounds=1), tmp_path / "run", engine=partial(Processes, workers=2))
    seconds = result.rows[1].seconds
    assert min(seconds.values()) >= 0
    assert 0 < sum(seconds.values()) < 300
    assert result.rows[1].slowest_seconds == 600


def test_a_fault_in_a_worker_carries_its_traceback(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(job: Job, workspace: Workspace, rows: Positions) -> None:
        raise KeyError("no such tensor")

    monkeypatch.setattr(processes, "run_job", wrong)
    with pytest.raises(RuntimeError, match=r"(?s)KeyError in a worker.*no such tensor"):
        fedlora.run(experiment(world, rounds=1), tmp_path / "run", engine=partial(Processes, workers=2))


def test_memory_that_runs_out_in_a_worker_is_an_error_with_a_remedy(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: Job, workspace: Workspace, rows: Positions) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(processes, "run_job", full)
    with pytest.raises(ConfigError, match=r"in a worker, memory ran out \(CUDA out of memory\): lower"):
        fedlora.run(experiment(world, rounds=1), tmp_path / "run", engine=partial(Processes, workers=2))


def test_without_fork_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ConfigError, match="use the engine 'serial'"):
        Processes(Workspace(None, 0, torch.device("cpu")), None)  # type: ignore[arg-type]


def test_the_command_takes_workers(world: Path, tmp_path: Path) -> None:
    from fedlora.config import to_toml

    (tmp_path / "run.toml").write_text(to_toml(experiment(world, rounds=1)))
    run = ["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--workers", "2"]
    made = CliRunner().invoke(app, [*run, "--engine", "processes"])
    assert made.exit_code == 0, made.output
    with pytest.raises(ConfigError, match="--workers = 2 is for --engine processes"):
        CliRunner().invoke(app, run, catch_exceptions=False, standalone_mode=False)

"""``benchmarks.peers``: the job is fedlora's own, processes are measured whole, and tables say who is ahead."""

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers import on_fedlora
from benchmarks.peers.environments import Environment, environment
from benchmarks.peers.job import Job, State, Work
from benchmarks.peers.prepare import Size, prepare
from benchmarks.peers.report import Row, report
from benchmarks.peers.watch import watch

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, about the model's name

SIZE = Size(clients=3, per_round=2, rounds=2, rows=5, test_rows=4, classes=2, max_length=12)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    columns = {"text": [f"text {number} of {number % 2}" for number in range(20)], "label": [0, 1] * 10}
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["even", "odd"]))
    source = SimpleNamespace(load=lambda: SimpleNamespace(train=datasets.Dataset.from_dict(columns, features)))
    with pytest.MonkeyPatch.context() as patch:  # parsing the standard library takes seconds
        patch.setattr("benchmarks.peers.prepare.Docstrings", lambda num_classes: source)
        return prepare(tmp_path_factory.mktemp("job"), SIZE)


def plain(job: Job) -> State:
    """The job in a loop over stock ``peft``."""
    state, model = job.start(), job.model()
    for done, cohort in enumerate(job.plan.cohorts):
        trained = []
        for client in cohort:
            peft.set_peft_model_state_dict(model, state)
            job.train(model, job.rows(done, client))
            trained.append({name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()})
        state = {name: sum(each[name] for each in trained) / len(trained) for name in state}
    return state


def worked(job: Job, out: Path, noop: bool = False) -> State:
    on_fedlora.main(Work(job.folder, out, noop))
    return load_file(out / "final.safetensors")


def test_the_jobs_rows_cohorts_and_start_are_those_of_fedloras_own_run(job: Job, tmp_path: Path) -> None:
    ours, theirs, start = worked(job, tmp_path), plain(job), job.start()
    assert ours.keys() == theirs.keys() == start.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=0)
    assert max(float((value - start[name]).abs().max()) for name, value in ours.items()) > 1e-3
    times = [float(line) for line in (tmp_path / "rounds.txt").read_text().split()]
    assert len(times) == SIZE.rounds + 1
    assert all(before < after for before, after in itertools.pairwise(times))
    assert job.accuracy(ours) == job.accuracy(theirs)


def test_clients_that_train_nothing_leave_the_start_as_it_is(job: Job, tmp_path: Path) -> None:
    start = job.start()
    for name, value in worked(job, tmp_path, noop=True).items():
        assert torch.equal(value, start[name])


PARENT = """
import subprocess, sys, time
held = bytearray(40_000_000)
child = subprocess.Popen([sys.executable, "-S", "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
time.sleep(0.5)
"""
CHILD = """
import time
while time.process_time() < 0.3: pass
print("worked", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_that_outlive_the_command_are_counted_and_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    found = watch([sys.executable, "-S", "-c", PARENT, CHILD], os.environ, tmp_path / "log", limit=30)
    assert found.status == 0
    assert time.monotonic() - start < 30
    assert 0.3 <= found.processor < 10
    assert 40e6 <= found.shared_memory <= found.resident_memory
    assert found.used_at(found.samples[-1][0] + 1) == found.samples[-1][1]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "time.process_time" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    found = watch([sys.executable, "-S", "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "log", limit=0.3)
    assert found.status is None
    assert found.wall < 30


def test_the_report_names_what_fedlora_is_not_ahead_in_and_what_is_not_installed() -> None:
    figures = dict.fromkeys(
        ("round_seconds", "round_processor", "run_seconds", "run_processor", "memory", "turn_seconds"), 2.0
    )
    ours = Row("fedlora", "0.2", **figures, accuracy=0.5)
    theirs = dataclasses.replace(ours, system="pfl", round_seconds=3.0, memory=1.0, accuracy=0.6)
    away = Row("nvflare", "", missing="not installed: no such release")
    text = report({"fedlora": ours, "pfl": theirs, "nvflare": away}, "a run")
    last = text.strip().splitlines()[-1]
    assert last == "fedlora is not ahead of pfl-research in peak memory (0.50 x), accuracy (+0.100)."
    assert "| 1.50 x |" in text
    assert "not installed: no such release" in text
    even = report({"fedlora": ours, "pfl": dataclasses.replace(ours, system="pfl")}, "a run")
    assert even.endswith("fedlora is ahead in everything.\n")
    assert "ahead" not in report({"fedlora": ours, "nvflare": away}, "a run")


def test_a_peer_that_cannot_be_installed_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **settings: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="Collecting pfl\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    assert environment("pfl", tmp_path) == Environment(None, "", "ERROR: no matching distribution")

"""Folders of runs: nothing is left of a run that never began, and one process at a time trains in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures.tiny import contents, experiment, ledger, tiny_world

import fedlora
from fedlora import config
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData
from fedlora.core import locks
from fedlora.core.errors import CallbackError, ConfigError, DataError, FedloraError
from fedlora.core.locks import LOCK
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.claim import claimed, look
from fedlora.runs.experiment import Stopped
from fedlora.runs.folder import RunFolder
from fedlora.runs.inference import load_run
from fedlora.runs.trackers import TensorBoard
from fedlora.show.compare import load_result

world = pytest.fixture(scope="module")(tiny_world)
HOLDER = r"process {pid} on [\w.-]+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}"


class AtStart(Callback):
    """Does something as a run begins, and before that writes to a folder of its own, as trackers do."""

    def __init__(self, deed: Callable[[], Any], folder: Path) -> None:
        self.deed, self.folder = deed, folder

    def run_started(self, experiment: Experiment, data: FederatedData, rows: Sequence[RoundRecord]) -> None:
        self.folder.mkdir()
        (self.folder / "events").touch()
        self.deed()


class AfterRow(Callback):
    """Does something after the first row, while the folder is in use, and keeps what was refused."""

    def __init__(self, deed: Callable[[], Any]) -> None:
        self.deed, self.refused = deed, ""

    def row_recorded(self, row: RoundRecord) -> None:
        if row.round == 0:
            try:
                self.deed()
            except ConfigError as error:
                self.refused = str(error)


class Old(Callback):
    def finished_round(self, row: RoundRecord) -> None: ...


class Nobody:
    """A partitioner without clients."""

    dataset: Any = None
    num_partitions = 0

    def load_partition(self, partition_id: int) -> Any: ...


def fail() -> None:
    raise ValueError("no room")


def interrupt() -> None:
    raise KeyboardInterrupt


# ---- nothing is left of a run that never began

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "model": (("model.path='no/such/model'",), "cannot be loaded"),
    "data": (("data.train='no.jsonl'",), "there is no file"),
    "column": (("data.columns.text='body'",), "have no column 'body'"),
    "partition": (("clients.num=1000",), "1000 clients were asked for"),
    "cohort": (
        (
            "clients.partition={kind='natural', column='user'}",
            "clients.num=3",
            "clients.per_round=3",
            "clients.test_clients=0.9",
        ),
        "clients.per_round",
    ),
    "targets": (("method.targets='nothing'",), "matches nothing"),
    "rank": (("method.rank=33", "method.tuning.strict_rank=true"), "is above the smaller side"),
    "task": (("task={kind='causal_lm'}", "data.columns={text='text'}"), "sees the tokens"),
    "device": (("device='cuda'",), "sees no GPU"),
    "tier": (("clients.tiers=[{name='a', values=['x']}]", "clients.tier_column='user'"), "tier"),
    "alone": (("mode='local'", "method.targets='nothing'"), "matches nothing"),
    "no rows of their own": (("evaluate.clients='end'",), "clients.holdout"),
    "epsilon": (
        ("method.privacy={kind='central_gaussian', clip_norm=1, noise_multiplier=1, delta=0.01, max_epsilon=1e-6}",),
        "max_epsilon",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("place", ["run", "new/and/deep/run"])
def test_what_is_refused_before_the_first_round_leaves_no_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, place: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    overrides, why = REFUSED[case]
    chosen = experiment(world, "lora", *overrides)
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FedloraError, match=re.escape(why)):
        fedlora.run(chosen, tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_partitioner_that_cannot_deal_leaves_no_folder(world: Path, tmp_path: Path) -> None:
    with pytest.raises(FedloraError):
        fedlora.run(experiment(world), tmp_path / "run", partitioner=Nobody())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        (lambda folder: AtStart(fail, folder / "events"), CallbackError),
        (lambda folder: AtStart(interrupt, folder / "events"), Stopped),
        (lambda folder: Old(), ConfigError),
    ],
    ids=["failing", "interrupted", "old"],
)
def test_a_callback_that_ends_the_run_at_its_start_leaves_no_folder(
    world: Path, tmp_path: Path, callback: Callable[[Path], Callback], error: type[Exception]
) -> None:
    with pytest.raises(error):
        fedlora.run(experiment(world), tmp_path / "new" / "run", callbacks=[callback(tmp_path / "new" / "run")])
    assert not list(tmp_path.iterdir())


def test_a_tracker_leaves_no_events_of_a_run_that_never_began(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    chosen, folder = experiment(world, "lora", "method.targets='nothing'"), tmp_path / "run"
    with pytest.raises(ConfigError):
        fedlora.run(chosen, folder, callbacks=[TensorBoard(folder / "tensorboard")])
    assert not list(tmp_path.iterdir())


def test_an_interrupt_before_the_first_row_says_that_nothing_was_saved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.runs.experiment.prepare", lambda *arguments: interrupt())
    with pytest.raises(Stopped, match=r"nothing was saved\. Run the same command to start over"):
        fedlora.run(experiment(world), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_of_the_users_stays_and_stays_empty(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError):
        fedlora.run(experiment(world, "lora", "method.targets='nothing'"), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_run_that_goes_on_and_is_refused_keeps_every_file(world: Path, tmp_path: Path) -> None:
    chosen, folder = experiment(world), tmp_path / "run"
    fedlora.run(chosen, folder, until=1)
    before = contents(folder)
    with pytest.raises(CallbackError):
        fedlora.run(chosen, folder, callbacks=[AtStart(fail, tmp_path / "events")])
    assert contents(folder) == before


def test_a_path_that_cannot_be_made_is_one_sentence(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="the disk refused"):
        fedlora.run(experiment(world), tmp_path / "file" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- one at a time


def test_who_trains_in_a_folder_is_named_to_the_second_and_the_first_goes_on(world: Path, tmp_path: Path) -> None:
    chosen, folder = experiment(world), tmp_path / "run"
    second = AfterRow(lambda: fedlora.run(chosen, folder))
    result = fedlora.run(chosen, folder, callbacks=[second])
    assert result.rounds == 3
    assert re.fullmatch(
        re.escape(str(folder))
        + r" is in use by "
        + HOLDER.format(pid=os.getpid())
        + r"; wait until that run has ended, stop it, or choose another folder with --out",
        second.refused,
    )
    fedlora.run(chosen, tmp_path / "whole")
    assert ledger(folder) == ledger(tmp_path / "whole")
    assert contents(folder).keys() == contents(tmp_path / "whole").keys()
    assert not (folder / LOCK).exists()


def test_another_thread_is_refused_too(world: Path, tmp_path: Path) -> None:
    chosen, files, refused = experiment(world), RunFolder(tmp_path / "run"), []

    def enter() -> None:
        with pytest.raises(ConfigError, match="is in use by process") as error, claimed(files, chosen):
            pass
        refused.append(error)

    with claimed(files, chosen):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert (files.path / LOCK).exists()
    assert len(refused) == 1


def test_another_process_is_refused_with_one_sentence_and_exit_code_2(world: Path, tmp_path: Path) -> None:
    chosen, folder = experiment(world), tmp_path / "run"
    with claimed(RunFolder(folder), chosen):
        before = contents(folder)
        command = [sys.executable, "-m", "fedlora", "run", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert contents(folder) == before
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(rf"error: .* is in use by {HOLDER.format(pid=os.getpid())}", done.stderr)
    assert done.stderr.count("\n") == 1


def test_a_process_that_was_killed_holds_nothing(world: Path, tmp_path: Path) -> None:
    chosen, folder = experiment(world), tmp_path / "run"
    folder.mkdir()
    code = (
        "import fcntl, os, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write('process 1 on elsewhere since 2020-01-01 00:00:00 +0000\\n'); file.flush(); "
        "print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder / LOCK)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match=r"process 1 on elsewhere since 2020-01-01 00:00:00 \+0000; wait"):
            fedlora.run(chosen, folder)
        process.kill()
    assert (folder / LOCK).exists()
    assert fedlora.run(chosen, folder).rounds == 3
    assert not (folder / LOCK).exists()


@pytest.mark.parametrize(
    "record", [b"", b"\x1b[31mrm -rf\n", b"process 1 on a\nb since now", b"\xff" * 10**6, b"process " + b"1" * 10**6]
)
def test_what_stands_in_a_lock_file_is_not_believed(
    world: Path, tmp_path: Path, record: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PAUSE", 0.001)
    files = RunFolder(tmp_path)
    with (tmp_path / LOCK).open("wb") as file:
        file.write(record)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        for refused in (look, lambda *given: claimed(*given).__enter__()):
            with pytest.raises(ConfigError, match="is in use by another process; wait until"):
                refused(files, experiment(world))


def test_a_lock_file_that_is_a_link_is_not_written_through(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(DataError, match="the disk refused"), claimed(RunFolder(tmp_path / "run"), experiment(world)):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = locks._lock, []

    def late(handle: int, shared: bool = False) -> bool | str:
        calls.append(1)
        if len(calls) == 1:  # whoever held it is done, and takes file and folder away
            (tmp_path / "run" / LOCK).unlink()
            (tmp_path / "run").rmdir()
        return original(handle, shared)

    monkeypatch.setattr(locks, "_lock", late)
    files = RunFolder(tmp_path / "run")
    with claimed(files, experiment(world)):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="is in use by process"):
            look(files, experiment(world))


def test_a_finished_run_is_read_while_someone_holds_its_folder(world: Path, tmp_path: Path) -> None:
    chosen, folder = experiment(world), tmp_path / "run"
    result = fedlora.run(chosen, folder)
    with claimed(RunFolder(folder), chosen):
        trained = load_run(folder)
        assert trained.predict(["red red"])
        trained.export(tmp_path / "out")
        assert load_result(folder)["after"] == result.after
        assert config.load(folder) == chosen


# ---- file systems and systems without locks


def test_without_locks_a_run_goes_on_and_says_so(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hears(Callback):
        def message(self, text: str) -> None:
            told.append(text)

    def refused(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    told: list[str] = []
    names = {name: getattr(fcntl, name) for name in ("LOCK_SH", "LOCK_EX", "LOCK_NB")}
    monkeypatch.setattr(locks, "fcntl", SimpleNamespace(flock=refused, **names))
    result = fedlora.run(experiment(world), tmp_path / "run", callbacks=[Hears()])
    assert result.rounds == 3
    assert not (tmp_path / "run" / LOCK).exists()
    monkeypatch.setattr(locks, "fcntl", None)
    fedlora.run(experiment(world), tmp_path / "run", callbacks=[Hears()])
    assert [text.replace(str(tmp_path), "") for text in told] == [
        f"/run cannot be locked ({reason}): nothing keeps a second process from writing to it, so start one at a time"
        for reason in ("No locks available", "this system has no flock")
    ]

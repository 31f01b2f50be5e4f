"""Runs that are killed, interrupted, or robbed of their disk, and go on: the same ledger and the same adapter."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.more import some_of
from fixtures.tiny import contents, document, experiment, ledger, tiny_world, write_rows
from safetensors import SafetensorError

import fedlora
from fedlora import config
from fedlora.cli import main as cli
from fedlora.core.errors import CheckpointError, ConfigError, DataError
from fedlora.core.locks import LOCK
from fedlora.rounds import checkpoint
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs import evaluation, session
from fedlora.runs.callbacks import Callback
from fedlora.runs.experiment import Stopped
from fedlora.runs.folder import RunFolder
from fedlora.runs.result import Result
from fedlora.show import report
from fedlora.tuning import export as adapters

PHASES = ("method.warm_rounds=5", "method.fold='rest'")
"""SLoRA with both phases long enough to be killed in."""

world = pytest.fixture(scope="module")(tiny_world)


class Deed(Callback):
    """Does something right after a round was written to the ledger."""

    def __init__(self, round: int, deed: Callable[[], Any]) -> None:
        self.round, self.deed = round, deed

    def row_recorded(self, row: RoundRecord) -> None:
        if row.round == self.round:
            self.deed()


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def command(arguments: list[str], output: str) -> None:
    """``fedlora ARGUMENTS`` in this process, with both streams in a file."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["fedlora", *arguments]
    cli.main()


def start(arguments: list[str], output: Path) -> BaseProcess:
    """The same in a process of its own; a server that has the imports done forks it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("fedlora.cli.main", "fedlora.show.describe", "fedlora.runs.inference", "fedlora.show.report"),
            # what runs import when they first need it
            *("transformers.models.bert.modeling_bert", "peft", "datasets", "sklearn.metrics"),
        ]
    )
    process = context.Process(target=command, args=(arguments, str(output)))
    process.start()
    return process


def wait_for_rows(process: BaseProcess, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (folder / "ledger.jsonl").exists() and (folder / "ledger.jsonl").read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"the process never wrote {count} rows; exit code {process.exitcode}")


@pytest.fixture(scope="module")
def whole(world: Path) -> Result:
    """The run that nobody disturbed."""
    return fedlora.run(experiment(world, "slora", *PHASES, rounds=12), world / "runs" / "whole")


@pytest.fixture
def run_toml(world: Path, tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml(experiment(world, "slora", *PHASES, rounds=12)))
    return file


def assert_same(folder: Path, whole: Result) -> None:
    assert ledger(folder) == ledger(whole.folder)
    name = whole.adapter.name if whole.adapter else ""
    assert contents(folder / name) == contents(whole.folder / name)


# ---- real processes


def test_a_run_killed_in_both_phases_ends_as_if_nothing_had_happened(
    run_toml: Path, tmp_path: Path, whole: Result
) -> None:
    folder = tmp_path / "run"
    arguments = ["run", str(run_toml), "--out", str(folder)]
    # the hand-over is between rows 6 and 7; later than a row, a checkpoint is being written
    for rows, later in ((3, 0.001), (6, 0.0), (7, 0.004), (10, 0.002)):
        process = start(arguments, tmp_path / "output")
        wait_for_rows(process, folder, rows)
        time.sleep(later)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "result.json").exists()
        assert (folder / LOCK).exists()
    process = start(arguments, tmp_path / "output")
    process.join()
    assert process.exitcode == 0
    assert "resuming after round" in (tmp_path / "output").read_text()
    assert_same(folder, whole)
    assert contents(folder).keys() == contents(whole.folder).keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_saves_says_how_to_go_on_and_exits_with_130(
    run_toml: Path, tmp_path: Path, whole: Result, number: signal.Signals
) -> None:
    folder = tmp_path / "a run"
    process = start(["run", str(run_toml), "--out", str(folder)], tmp_path / "output")
    wait_for_rows(process, folder, 5)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    said = (tmp_path / "output").read_text()
    assert f"stopped; every finished round is saved. Resume with: fedlora run '{folder}'" in said
    assert "Traceback" not in said
    process = start(["run", str(folder)], tmp_path / "output")
    process.join()
    assert process.exitcode == 0
    assert_same(folder, whole)


# ---- the same within this process, at chosen moments


def test_sigterm_stops_a_run_from_python_and_a_programs_own_handler_stays(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, folder = experiment(world), tmp_path / "run"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(Stopped, match="every finished round is saved"):
        fedlora.run(chosen, folder, callbacks=[Deed(2, lambda: signal.raise_signal(signal.SIGTERM))])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert RunFolder(folder).latest() is not None
    heard: list[int] = []
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        fedlora.run(chosen, folder, callbacks=[Deed(3, lambda: signal.raise_signal(signal.SIGTERM))])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("round", "every"),
    some_of(product([0, 1, 4, 5, 6, 12], [1, 3]), {(0, 3), (1, 1), (4, 3), (5, 1), (6, 3), (12, 1)}),
)
def test_an_interrupt_after_any_row_loses_nothing(
    world: Path, tmp_path: Path, whole: Result, round: int, every: int
) -> None:
    chosen = experiment(world, "slora", *PHASES, f"checkpoint_every={every}", rounds=12)
    with pytest.raises(Stopped):
        fedlora.run(chosen, tmp_path / "run", callbacks=[Deed(round, interrupt)])
    fedlora.run(chosen, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("where", ["view", "evaluate", "open_phase", "close_phase", "export_run"])
def test_an_interrupt_between_a_round_and_its_row_loses_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    method = "flasc" if where == "view" else "slora"
    chosen = experiment(world, method, "checkpoint_every=2", "evaluate.every=1", rounds=4)
    undisturbed = fedlora.run(chosen, tmp_path / "whole")
    place = evaluation if where == "view" else session
    original, calls = getattr(place, where), []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if where in ("open_phase", "evaluate", "view") else 1):
            interrupt()
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(place, where, interrupted)
        with pytest.raises(Stopped):
            fedlora.run(chosen, tmp_path / "run")
    fedlora.run(chosen, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


def test_a_torn_last_line_of_the_ledger_is_written_again(world: Path, tmp_path: Path, whole: Result) -> None:
    chosen, folder = experiment(world, "slora", *PHASES, rounds=12), tmp_path / "run"
    with pytest.raises(Stopped):
        fedlora.run(chosen, folder, callbacks=[Deed(9, interrupt)])
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"round": 10, "phase": 1, "coh')
    fedlora.run(chosen, folder)
    assert_same(folder, whole)


def test_rows_that_no_checkpoint_covers_are_dropped_and_made_again(world: Path, tmp_path: Path, whole: Result) -> None:
    chosen, folder = experiment(world, "slora", *PHASES, rounds=12), tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "round-000012")
    fedlora.run(chosen, folder)
    assert_same(folder, whole)


def test_going_on_with_a_finished_run_changes_no_file(world: Path, whole: Result) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("adapter/*")}
    files = contents(whole.folder)
    again = fedlora.run(experiment(world, "slora", *PHASES, rounds=12), whole.folder)
    assert contents(whole.folder) == files
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("adapter/*")} == before
    assert (again.after, again.seconds, again.adapter) == (whole.after, whole.seconds, whole.adapter)


def test_a_finished_run_whose_adapter_was_removed_writes_it_again(world: Path, tmp_path: Path, whole: Result) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / str(whole.adapter and whole.adapter.name))
    fedlora.run(experiment(world, "slora", *PHASES, rounds=12), tmp_path / "run")
    assert_same(tmp_path / "run", whole)


# ---- checkpoints that do not belong here


@pytest.fixture
def stopped(world: Path, tmp_path: Path) -> Path:
    """A run that was stopped after its third round."""
    with pytest.raises(Stopped):
        fedlora.run(experiment(world), tmp_path / "run", callbacks=[Deed(3, interrupt)])
    return tmp_path / "run"


def test_another_configuration_is_refused_with_the_difference(world: Path, stopped: Path) -> None:
    before = contents(stopped)
    with pytest.raises(
        CheckpointError, match=r"another configuration \(phases\.0\.recipe\.tuning\.rank: 4 against 5\)"
    ):
        fedlora.run(experiment(world, "lora", "method.rank=5"), stopped)
    assert contents(stopped) == before


def test_changed_data_are_refused_and_the_manifest_stays(world: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    shutil.copy(world / "train.jsonl", train)
    chosen, folder = experiment(world, "lora", f"data.train={train}"), tmp_path / "run"
    with pytest.raises(Stopped):
        fedlora.run(chosen, folder, callbacks=[Deed(2, interrupt)])
    before = contents(folder)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    write_rows(train, [{**rows[0], "text": "w1 w2 red"}, *rows[1:]])
    with pytest.raises(CheckpointError, match="the data have changed since the checkpoint"):
        fedlora.run(chosen, folder)
    assert contents(folder) == before


# ---- damage is found, told, and mended from what is left


class Hears(Callback):
    def __init__(self) -> None:
        self.told: list[str] = []

    def message(self, text: str) -> None:
        self.told.append(text)


def flip(file: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "digests.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    world: Path, tmp_path: Path, stopped: Path, name: str
) -> None:
    newest, hears = sorted((stopped / "checkpoints").iterdir())[-1], Hears()
    flip(newest / name)
    assert fedlora.run(experiment(world), stopped, callbacks=[hears]).rounds == 3
    assert len(hears.told) == 1
    assert re.match(rf"the checkpoint {newest} cannot be read \(.*\); .*; it was removed$", hears.told[0])
    assert_same(stopped, fedlora.run(experiment(world), tmp_path / "whole"))


def test_a_checkpoint_that_the_disk_fails_to_read_is_kept(
    world: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, before, real = sorted((stopped / "checkpoints").iterdir())[-1], contents(stopped), Path.read_text

    def read(path: Path, *args: str, **options: str) -> str:
        if path == newest / "state.json":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)
    with pytest.raises(CheckpointError, match=r"may be intact: try again; if it fails again, remove that folder"):
        fedlora.run(experiment(world), stopped)
    assert contents(stopped) == before


def test_without_a_checkpoint_that_can_be_read_a_run_is_refused_and_nothing_is_removed(
    world: Path, stopped: Path
) -> None:
    for folder in (stopped / "checkpoints").iterdir():
        flip(folder / "state.json")
    before = contents(stopped)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fedlora.run(experiment(world), stopped)
    assert contents(stopped) == before


def test_a_run_whose_noise_cannot_be_drawn_again_does_not_go_back(world: Path, tmp_path: Path) -> None:
    noise = ("method.privacy={kind='central_gaussian', clip_norm=1.0, noise_multiplier=1.0, delta=0.01}",)
    chosen, folder = experiment(world, "lora", *noise), tmp_path / "run"
    rows = fedlora.run(chosen, folder, until=2).rows
    # how dense the updates were before the noise would disclose failures
    assert [row.density_up for row in rows] == [0.0, 0.0, 0.0]
    assert all(row.density_down > 0 for row in rows[1:])
    flip(sorted((folder / "checkpoints").iterdir())[-1] / "state.safetensors")
    with pytest.raises(CheckpointError, match="a second draw would disclose more than its account says"):
        fedlora.run(chosen, folder)


@pytest.mark.parametrize("name", [".safetensors", ".json"])
def test_a_damaged_adapter_is_written_again_from_the_checkpoint(
    world: Path, tmp_path: Path, whole: Result, name: str
) -> None:
    hears = Hears()
    shutil.copytree(whole.folder, tmp_path / "run")
    (tmp_path / "run" / "model" / "README.md").write_text("a better card")
    chosen = experiment(world, "slora", *PHASES, rounds=12)
    fedlora.run(chosen, tmp_path / "run", callbacks=[hears])
    assert (tmp_path / "run" / "model" / "README.md").read_text() == "a better card"
    assert not hears.told
    damaged = next(path for path in (tmp_path / "run" / "model").iterdir() if path.suffix == name)
    flip(damaged)
    fedlora.run(chosen, tmp_path / "run", callbacks=[hears])
    assert hears.told == [f"{damaged} is damaged; {damaged.parent} is written again from the checkpoint"]
    assert_same(tmp_path / "run", whole)


def test_a_damaged_result_is_named_where_it_is_read_and_computed_again(
    world: Path, tmp_path: Path, whole: Result
) -> None:
    hears, file = Hears(), tmp_path / "run" / "result.json"
    shutil.copytree(whole.folder, tmp_path / "run")
    file.write_text(file.read_text().replace('"rounds": 12', '"rounds": 13'))
    with pytest.raises(ConfigError, match=r"its result.json is damaged; write it anew with: fedlora run"):
        RunFolder(tmp_path / "run").read_json("result.json")
    again = fedlora.run(experiment(world, "slora", *PHASES, rounds=12), tmp_path / "run", callbacks=[hears])
    assert (again.after, again.rounds) == (whole.after, 12)
    assert len(hears.told) == 1
    assert RunFolder(tmp_path / "run").read_json("result.json")["rounds"] == 12


def test_a_changed_row_of_the_ledger_is_named_and_one_without_a_digest_is_read(tmp_path: Path, whole: Result) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    files, file = RunFolder(tmp_path / "run"), tmp_path / "run" / "ledger.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    wrong = lines[5].replace('"phase": 0', '"phase": 1')
    file.write_text("".join([*lines[:5], wrong, *lines[6:]]))
    with pytest.raises(CheckpointError, match=r"row 5 of .* is damaged"):
        files.rows()
    assert len(files.rows(4)) == 5
    old = [{key: value for key, value in json.loads(line).items() if key != "digest"} for line in lines]
    write_rows(file, old)
    assert tuple(files.rows()) == whole.rows


def test_temporary_files_of_a_killed_process_are_removed(world: Path, tmp_path: Path, stopped: Path) -> None:
    for name in ("ledger.jsonl", "checkpoints/round-000003", "adapter"):
        (stopped / f"{name}.0123456789abcdef.tmp").mkdir()
    fedlora.run(experiment(world), stopped)
    assert not list(stopped.rglob("*.tmp"))


def test_a_ledger_that_lacks_rounds_is_refused(world: Path, stopped: Path) -> None:
    (stopped / "ledger.jsonl").unlink()
    with pytest.raises(CheckpointError, match="lacks rounds"):
        fedlora.run(experiment(world), stopped)


def test_a_configuration_whose_run_never_began_may_be_replaced(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        fedlora.run(experiment(world, "lora", "data.train=nothing.jsonl"), tmp_path / "run")
    assert fedlora.run(experiment(world), tmp_path / "run").rounds == 3


# ---- a full disk


def full_disk(*arguments: Any, **settings: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*arguments: Any, **settings: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "failure"),
    [
        (checkpoint, "save_file", full_for_safetensors),
        (checkpoint, "save_file", full_disk),
        (os, "fsync", full_disk),
    ],
    ids=["tensors", "checkpoint", "flush"],
)
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Result, module: Any, name: str, failure: Any
) -> None:
    chosen, folder = experiment(world, "slora", *PHASES, rounds=12), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(DataError, match="the disk is full while writing to"):
        fedlora.run(chosen, folder, callbacks=[Deed(8, lambda: patch.setattr(module, name, failure))])
    assert len(list((folder / "checkpoints").glob("round-??????"))) == 2
    assert not list(folder.glob("adapter*"))
    fedlora.run(chosen, folder)
    assert_same(folder, whole)


def test_a_full_disk_while_the_adapter_is_written_leaves_no_half_of_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "save_file", full_for_safetensors)
    with pytest.raises(DataError, match="the disk is full while writing to"):
        fedlora.run(experiment(world), tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob("adapter*"))
    assert fedlora.run(experiment(world), tmp_path / "run").adapter == tmp_path / "run" / "adapter"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_really_is_full_exits_with_2_and_room_mends_it(
    world: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = small_disk / "rest"

    def fill() -> None:
        with rest.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"0" * 4096):
                pass

    file = tmp_path / "run.toml"
    file.write_text(config.to_toml(config.parse(document(world))))
    arguments = ["fedlora", "run", str(file), "--out", str(small_disk / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.setattr(report, "Live", lambda console, bar: Deed(2, fill))
        with pytest.raises(SystemExit) as exit:
            cli.main()
    assert exit.value.code == 2
    assert "the disk is full while writing to" in capsys.readouterr().err
    rest.unlink()
    result = fedlora.run(config.load(file), small_disk / "run")
    assert ledger(result.folder) == ledger(fedlora.run(config.load(file), tmp_path / "whole").folder)


def test_an_unfinished_run_of_before_is_refused_and_a_finished_one_is_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = experiment(world, "lora", rounds=2)
    fedlora.run(chosen, tmp_path / "begun", until=1)
    after = fedlora.run(chosen, tmp_path / "done").after
    monkeypatch.setattr(session, "can_go_on", lambda folder: False)
    with pytest.raises(CheckpointError, match="started by an older version of fedlora, and this one cannot resume it"):
        fedlora.run(chosen, tmp_path / "begun")
    assert fedlora.run(chosen, tmp_path / "done").after == after

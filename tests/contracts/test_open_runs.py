"""Trackers and engines: fedlora's own and a class of one's own, by class and by entry point, and faults."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fixtures import strangers
from fixtures.tiny import document, ledger, tiny_world
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.client.jobs import Job, Reply
from fedlora.client.workspace import Workspace
from fedlora.core import slots
from fedlora.core.errors import CallbackError
from fedlora.core.store import Store
from fedlora.engines import Engine, Processes, Serial
from fedlora.federation.engines import ENGINES
from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.protocol.transport import Received, Transport
from fedlora.federation.server.remote import Remote, SiteInfo
from fedlora.federation.site.memory import SiteMemory
from fedlora.population.clients import Population
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.services import SERVICES
from fedlora.runs.trackers import TRACKERS, TensorBoard
from fedlora.testing import check_engine, check_tracker

world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Loopback(Transport):
    """One site that has all clients and answers a job when it is collected, the last one first."""

    def __init__(self, serial: Serial, memory: SiteMemory) -> None:
        self.serial, self.memory, self.sent = serial, memory, dict[str, bytes]()

    def sites(self) -> Mapping[str, int]:
        return {"here": 0}

    def send(self, address: int, raw: bytes, seconds: float) -> str | None:
        ticket = str(len(self.sent))
        self.sent[ticket] = raw
        return ticket

    def collect(self, tickets: Sequence[str]) -> list[Received]:
        return [Received(ticket, self.answer(envelopes.read(self.sent[ticket]))) for ticket in reversed(tickets)]

    def answer(self, envelope: envelopes.Envelope) -> bytes:
        job = envelopes.to_job(envelope)
        memory = self.memory.load(job.client, job.memory)
        setup = self.memory.setup(job.phase, job.setup)
        (reply,) = self.serial.run([job._replace(memory=memory, setup=setup)])
        kept = self.memory.save(job.client, reply.memory)
        return envelopes.of_reply(reply._replace(memory=replace(reply.memory, kept=kept)), envelope)


def serial(folder: Path) -> Callable[[Workspace, Population], Engine]:
    return Serial


def remote(folder: Path) -> Callable[[Workspace, Population], Engine]:
    """The engine of several machines, with one that is this process."""

    def build(workspace: Workspace, population: Population) -> Remote:
        site = Loopback(Serial(workspace, population), SiteMemory(folder, RUN))
        made = Remote(site, ServerPolicy(), RUN, anywhere=True)
        sizes = {client: len(population.rows_of(client)) for client in range(len(population))}
        made.site_infos["here"] = SiteInfo("", sizes)
        return made

    return build


RUN = "ab" * 8
OWN_ENGINES = {"serial": serial, "processes": lambda folder: partial(Processes, workers=2), "flower-simulation": remote}


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_of_fedlora_passes_the_check(kind: str, tmp_path: Path) -> None:
    check_engine(OWN_ENGINES[kind](tmp_path))


def test_the_tracker_of_fedlora_that_writes_files_passes_the_check() -> None:
    pytest.importorskip("tensorboard")
    # the others send to services, as tests/runs/test_services.py has it
    assert TRACKERS.keys() - SERVICES.keys() == {"tensorboard"}
    check_tracker(TensorBoard)


def test_a_class_of_ones_own_passes_the_checks() -> None:
    check_engine(strangers.LastFirst)
    check_tracker(strangers.Lines)


# ---- on the command line


@pytest.fixture
def entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package whose entry points are a tracker and an engine."""
    folder = tmp_path / "packages" / "strangers-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[fedlora.track]\nlines = fixtures.strangers:Lines\n\n[fedlora.engine]\nlast = fixtures.strangers:LastFirst\n"
    )
    monkeypatch.syspath_prepend(folder.parent)
    slots._installed.cache_clear()
    yield
    slots._installed.cache_clear()


def invoked(world: Path, folder: Path, *options: str) -> dict[str, Any]:
    (world / "run.toml").write_text(tomli_w.dumps(document(world, "lora", rounds=2)))
    words = ["run", str(world / "run.toml"), "--out", str(folder), "--format", "json", *options]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("entry_points")
@pytest.mark.parametrize("names", [("fixtures.strangers:Lines", "fixtures.strangers:LastFirst"), ("lines", "last")])
def test_a_run_takes_a_tracker_and_an_engine_by_class_or_entry_point(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    track, engine = names
    monkeypatch.setattr(strangers.LastFirst, "used", 0)
    assert invoked(world, tmp_path / "run", "--track", track, "--engine", engine)["rounds"] == 2
    assert strangers.LastFirst.used == 2 * 3
    lines = (tmp_path / "run" / track.replace(":", ".") / "lines.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    invoked(world, tmp_path / "plain")
    assert ledger(tmp_path / "run") == ledger(tmp_path / "plain")


# ---- faults that the checks find


class Reversed(Serial):
    """Replies in the wrong order."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        yield from super().run(jobs[::-1])


class Short(Serial):
    """Leaves out the last job."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        yield from super().run(jobs[:-1])


class Forgetful(Serial):
    """Loses what clients keep for error feedback."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        for job, reply in zip(jobs, super().run(jobs), strict=True):
            before = Store({"lost": job.memory.parts.tree("residual", "lost")})
            parts = reply.memory.parts.having({"residual": before})
            yield reply._replace(memory=replace(reply.memory, parts=parts))


class Stranger(Serial):
    """Has clients that do not exist."""

    def present(self) -> frozenset[int] | None:
        return frozenset({0, 99})


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Reversed, "replies are not those of one process, in the order of jobs"),
        (Short, "3 jobs got 2 replies"),
        (Forgetful, "the ledger is not that|the parameters are not those"),
        (Stranger, "present.. names"),
    ],
)
def test_an_engine_with_a_fault_is_found(engine: type[Engine], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_engine(engine)


class Elsewhere(strangers.Lines):
    """Writes next to its folder."""

    def row_recorded(self, row: RoundRecord) -> None:
        (self.file.parents[1] / "elsewhere.txt").write_text("here")


class Hasty(strangers.Lines):
    """Cannot be closed before it has started."""

    def close(self) -> None:
        self.file.read_text()


class OneThread(Callback):
    """Takes messages from one thread alone."""

    def __init__(self, folder: Path) -> None:
        self.thread = threading.get_ident()

    def message(self, text: str) -> None:
        if threading.get_ident() != self.thread:
            raise ValueError("another thread")


@pytest.mark.parametrize(
    ("tracker", "error", "message"),
    [
        (Elsewhere, AssertionError, "writes outside of the given folder"),
        (Hasty, CallbackError, "failed in close"),
        (OneThread, AssertionError, "called from another thread"),
    ],
)
def test_a_tracker_with_a_fault_is_found(
    tracker: Callable[[Path], Callback], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_tracker(tracker)

"""Contract checks of engines and trackers, which a run is given next to its configuration."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from fedlora.client.jobs import Job, Reply
from fedlora.client.workspace import Workspace
from fedlora.engines import Engine, Serial
from fedlora.methods import fedavg
from fedlora.population.clients import Population
from fedlora.rounds.ledger import RoundRecord
from fedlora.rounds.phases import open_phase
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.runs.experiment import run
from fedlora.testing.training import LOCAL, check_resumed, must, outcome, same, toy_run
from fedlora.transport import Link, TopK


def check_engine(value: Callable[[Workspace, Population], Engine]) -> None:
    """Replies are those of ``Serial``, one per job and in the order of jobs; runs resume and give the same bits.

    Clients keep an error feedback and the state of their optimisers, so that what they remember counts.

    Args:
        value: the engine's class, or a function that builds an engine from a resident model and its clients.
    """
    local = dataclasses.replace(LOCAL, keep_optimizer=True)
    up = Link(sparsify=TopK(density=0.5), feedback=True)
    experiment, data = toy_run(fedavg(rounds=4, up=up, memory="last_round", local=local))
    workspace, num = Workspace(data.task, experiment.seed, data.device), len(data.population)
    engine = value(workspace, data.population)
    must(isinstance(engine, Engine), f"an Engine is expected, and {type(engine).__name__} is none")
    must(engine.attempts >= 1, f"attempts is {engine.attempts}, and a round needs at least one")
    must(engine.over_sample >= 1, f"over_sample is {engine.over_sample}, which asks fewer clients than are counted")
    engine.wait()
    present = engine.present()
    must(present is None or present <= set(range(num)), f"there are {num} clients, and present() names {present}")
    for client in range(num):
        most = engine.most_examples(client)
        must(most is None or most >= len(data.population.rows_of(client)), f"client {client} has more examples")

    with tempfile.TemporaryDirectory() as place:
        known: list[tuple[Job, Reply]] = []
        run(experiment, Path(place) / "serial", data=data, engine=partial(_Listed, known=known))
        first = known[: experiment.clients.per_round]  # jobs of later rounds build on messages of earlier ones
        open_phase(workspace, 0, experiment.phases[0].recipe, experiment.seed, 0, None)
        for asked in (first, first[::-1]):
            replies = list(engine.run([job for job, _ in asked]))
            must(len(replies) == len(asked), f"{len(asked)} jobs got {len(replies)} replies")
            expected = [reply.raw for _, reply in asked]
            must([one.raw for one in replies] == expected, "replies are not those of one process, in the order of jobs")
        must(list(engine.run([])) == [], "without jobs there are no replies")
        found, serial = check_resumed(experiment, data, Path(place), engine=value), outcome(Path(place) / "serial")
    must(found.ledger == serial.ledger, "the ledger is not that of a run in one process")
    must(same(found.params, serial.params), "the parameters are not those of a run in one process")


def check_tracker(value: Callable[[Path], Callback]) -> None:
    """Runs with a tracker are those without it, whether they are interrupted, train clients alone, or never start.

    Args:
        value: the tracker's class, or a function that builds it from the folder for its files, which may not exist.
    """
    experiment, data = toy_run(fedavg(rounds=4, local=LOCAL))
    with tempfile.TemporaryDirectory() as place:
        plain, tracked, own = (Path(place) / name for name in ("plain", "tracked", "tracked/tracker"))
        run(experiment, plain, data=data)
        for until in (2, None):
            messages = _Messages(tracker := value(own))
            run(experiment, tracked, data=data, callbacks=[tracker, messages], until=until)
            must(not messages.failed, f"message() fails when it is called from another thread: {messages.failed}")
        must(outcome(tracked).ledger == outcome(plain).ledger, "with the tracker, a run has another ledger")
        must(same(outcome(tracked).params, outcome(plain).params), "with the tracker, a run ends elsewhere")
        files = {file.relative_to(tracked) for file in tracked.rglob("*") if own not in (file, *file.parents)}
        must(files == {file.relative_to(plain) for file in plain.rglob("*")}, "it writes outside of the given folder")

        again = value(Path(place) / "other")
        alone = dataclasses.replace(experiment, mode="local", num_local=2)
        run(alone, Path(place) / "alone", data=data, callbacks=[again])
        run(experiment, Path(place) / "second", data=data, callbacks=[again])  # closed, and used for another run
        CallbackList([value(Path(place) / "unused")]).close()  # as when a run is refused


class _Listed(Engine):
    """``Serial``, with a list of its jobs and replies."""

    def __init__(self, workspace: Workspace, population: Population, known: list[tuple[Job, Reply]]) -> None:
        self._serial, self._known = Serial(workspace, population), known

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        for job, reply in zip(jobs, self._serial.run(jobs), strict=True):
            self._known.append((job, reply))
            yield reply


class _Messages(Callback):
    """Sends a tracker a message from another thread in each round, as events of sites do."""

    def __init__(self, tracker: Callback) -> None:
        self._tracker = tracker
        self.failed: list[BaseException] = []

    def row_recorded(self, row: RoundRecord) -> None:
        thread = threading.Thread(target=self._send, args=(f"round {row.round}",))
        thread.start()
        thread.join()

    def _send(self, text: str) -> None:
        try:
            self._tracker.message(text)
        except Exception as error:
            self.failed.append(error)

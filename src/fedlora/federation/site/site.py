"""A site: holds its clients' rows and one resident model, and replies to messages, independently of the transport."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlora import config
from fedlora.client.jobs import Job, Reply
from fedlora.client.turn import run_job
from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.config.federated_data import in_mode, prepare
from fedlora.config.places import located_model
from fedlora.core.devices import pick_device
from fedlora.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FedloraError,
    TrainingError,
    WireError,
    ran_out_of_memory,
)
from fedlora.core.state import ClientState
from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.envelopes import Envelope
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.federation.site.local_paths import without_paths
from fedlora.federation.site.memory import SiteMemory
from fedlora.federation.site.usage import Usage
from fedlora.federation.site.watchdog import time_limit
from fedlora.privacy.disclosure import disclosure_of
from fedlora.tasks import Model
from fedlora.tasks.base import Positions, Prepared
from fedlora.tasks.data.notes import unread
from fedlora.tasks.models.fingerprints import base_digest


class _Run(NamedTuple):
    """The run whose model is loaded on a site."""

    name: str
    workspace: Workspace
    clients: dict[int, Positions]
    memory: SiteMemory

    @property
    def sizes(self) -> dict[str, int]:
        """The number of examples of each client, as the server is told it."""
        return {str(client): len(rows) for client, rows in self.clients.items()}


class Site:
    """Processes a server's messages on the local rows.

    The model of the last run stays loaded, so a round costs no more than its training.

    Args:
        settings: the site's identity and policy.
    """

    def __init__(self, settings: SiteConfig) -> None:
        self.settings = settings
        self.usage = Usage(Path(settings.state), settings.limits)
        self._run: _Run | None = None

    def answer(self, raw: bytes) -> bytes:
        """The reply to a message.

        Raises:
            WireError: it cannot be read, so there is nothing to reply to.
        """
        received = time.perf_counter()
        refusal = self._count(len(raw))
        envelope = envelopes.read(raw)
        kind = envelope.head.get("kind")
        if kind == "open":
            return self._open(envelope, len(raw), refusal)
        if kind == "probe":  # any reply suffices
            return envelopes.write({"kind": "probed"}, {})
        if kind != "job":
            raise WireError(
                f"a message of the unknown kind {str(kind)[:40]!r} arrived; use one version of fedlora everywhere"
            )
        try:
            if refusal:
                raise refusal
            envelopes.check_keys(envelope, "job")
            self.settings.limits.check_settings(envelope.head)
            job = envelopes.to_job(envelope)
        except (WireError, ConfigError, CheckpointError) as error:
            return envelopes.of_reply(Reply(None, ClientState(), 0.0, self._said(error), delivered=False), envelope)
        lost = False
        try:
            with self._limited(envelope):
                reply = self._turn(envelope, job, len(raw), received)
            self.usage.add_bytes(len(reply.raw or b""))
        except (WireError, TrainingError, CheckpointError, ConfigError, DataError) as error:
            lost = isinstance(error, CheckpointError)
            failed = isinstance(error, TrainingError)
            reply = Reply(None, ClientState(), 0.0, self._said(error), delivered=False, failed=failed)
        if not disclosure_of(job.recipe).timing:
            reply = reply._replace(seconds=0.0)
        return envelopes.of_reply(reply, envelope, lost)

    def _count(self, size: int) -> FedloraError | None:
        """Counts a message, whatever it holds; returns why there is no work for it."""
        try:
            self.usage.add_bytes(size)
        except (ConfigError, CheckpointError) as error:
            return error
        return None

    @contextmanager
    def _limited(self, envelope: Envelope) -> Iterator[None]:
        """Work within the limit on time.

        Raises:
            ConfigError: memory ran out.
        """
        self.usage.begin_work(str(envelope.head.get("ticket")))
        try:
            with time_limit(self.settings.limits.max_seconds):
                yield
        except Exception as error:
            if advice := ran_out_of_memory(error):
                raise ConfigError(advice) from error
            raise
        finally:  # not reached if the watchdog ends the process
            self.usage.end_work()

    def _said(self, error: FedloraError) -> str:
        """The part of an error reported to the server: neither messages about data, which quote it, nor paths here."""
        logging.getLogger("fedlora").warning("%s: %s", type(error).__name__, error)
        if isinstance(error, DataError):
            return f"{self.settings.name}: its rows do not fit the task; see its own log"
        model = self.settings.model.path if self.settings.model else None
        given = (self.settings.state, self.settings.rows, model)
        return f"{self.settings.name}: {without_paths(str(error), [Path(each).parent for each in given if each])}"

    def _log_notes(self, task: Prepared) -> None:
        """Logs here what a run of the site's owner would have in its ledger; it quotes the data, and is not sent."""
        for note in (*task.notes, *unread(task.columns("train"), task.reads)) if self.settings.rows else ():
            logging.getLogger("fedlora").warning("%s: %s", self.settings.rows, note)

    def _open(self, envelope: Envelope, size: int, refusal: FedloraError | None) -> bytes:
        head = envelope.head
        opened: dict[str, Any] = {"kind": "opened", "tier": self.settings.tier, "refused": ""}
        opened |= {key: head.get(key) for key in ("run", "ticket")}
        try:
            if refusal:
                raise refusal
            envelopes.check_keys(envelope, "open")
            if why := self.settings.limits.too_large(size):
                raise ConfigError(why)
            with self._limited(envelope):
                run = self._prepared(head)
            opened["sizes"] = run.sizes
            run.memory.open(json.dumps({**head, "sizes": run.sizes}))
            self._run = run
            self._log_notes(run.workspace.task)
        except FedloraError as error:
            opened["refused"] = self._said(error)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            opened["refused"] = self._said(WireError(f"an opening cannot be read ({type(error).__name__}: {error})"))
        return envelopes.write(opened, {})

    def _prepared(self, head: Mapping[str, Any]) -> _Run:
        """Prepares the run of an opening message.

        Raises:
            FedloraError: it is not accepted, or cannot be prepared on this site.
        """
        self.settings.limits.check_settings(head)
        name = str(head.get("run"))
        memory = SiteMemory(Path(self.settings.state), name)
        experiment = config.parse(head["experiment"])
        root = experiment.root if self.settings.share else None  # which files are read is not the server's to say
        experiment = replace(experiment, model=self._model(experiment), device=self.settings.device, root=root)
        if (found := base_digest(located_model(experiment))) != head["base"]:
            raise ConfigError(
                f"the pre-trained model here ({found}) is not the server's ({head['base']}); put the same files here"
            )
        if self.settings.share is not None:
            share = self.settings.share
            data = prepare(in_mode(experiment))
            numbers = range(share.number, len(data.population), share.of)
            clients = {client: data.population.rows_of(client) for client in numbers}
            task, device = data.task, data.device
        else:
            task = self._task(experiment, list(head["label_names"]))
            device = pick_device(self.settings.device)
            clients = {int(head["client"]): np.arange(task.num_examples("train"))}
        largest = max(map(len, clients.values()), default=0)
        for phase in experiment.phases:
            if refusal := self.settings.limits.refusal(phase.recipe, largest, opening=True):
                raise ConfigError(refusal)
        self.usage.open_run(name, experiment.clients.per_round)
        return _Run(name, Workspace(task, experiment.seed, device, experiment.deterministic), clients, memory)

    def _model(self, experiment: Experiment) -> Model:
        """The model loaded on this site: the server must not determine whose code runs or which files are read."""
        if self.settings.model is not None:
            # the trained parts determine the form of messages, so the server does determine those
            return replace(self.settings.model, head=experiment.model.head, train_head=experiment.model.train_head)
        if self.settings.share is None and experiment.model.path != "embedded":
            raise ConfigError(
                f"the server trains {experiment.model.path!r}; set model.path in the site's file to its folder here"
            )
        return replace(experiment.model, trust_remote_code=False)

    def _task(self, experiment: Experiment, label_names: list[str]) -> Prepared:
        task = experiment.task.restore(located_model(experiment), label_names)
        return task.with_rows(Path(str(self.settings.rows)), self.settings.columns, "train", self.settings.reading)

    def _turn(self, envelope: Envelope, job: Job, size: int, received: float) -> Reply:
        run = self._warm(str(envelope.head["run"]))
        limits = self.settings.limits
        if job.client not in run.clients:
            raise ConfigError(f"client {job.client} is not on this site")
        rows = run.clients[job.client]
        if refusal := limits.refusal(job.recipe, len(rows)) or limits.too_large(size):
            raise ConfigError(refusal)
        memory = run.memory.load(job.client, job.memory)
        if memory.folds.version != job.memory.folds.version:
            raise CheckpointError(f"client {job.client} has {memory.folds.version} folds cached here")
        setup = run.memory.setup(job.phase, job.setup)
        if setup is None:
            raise CheckpointError(f"the initial state of phase {job.phase} is no longer here")
        self.usage.begin_turn(run.name, job.progress[0], job.recipe, len(rows), job.client)
        seconds = envelope.head.get("seconds")
        left = math.inf if seconds is None else float(seconds) - (time.perf_counter() - received)
        if disclosure_of(job.recipe).timing:  # a turn that times out would tell how long the examples are
            left = min(left, limits.max_seconds or math.inf)
        reply = run_job(job._replace(memory=memory, setup=setup), run.workspace, rows, left)
        if reply.raw is not None and (refusal := limits.too_large(len(reply.raw))):
            raise ConfigError(refusal)
        kept = run.memory.save(job.client, reply.memory)
        return reply._replace(memory=replace(reply.memory, kept=kept))

    def _warm(self, name: str) -> _Run:
        """The run of a job: the resident one, or one that was opened before this process started."""
        if self._run is None or self._run.name != name:
            opened = SiteMemory(Path(self.settings.state), name).opened()
            if opened is None:
                raise CheckpointError(f"run {name} was never opened here")
            head = json.loads(opened)
            run = self._prepared(head)
            if head.get("sizes", run.sizes) != run.sizes:
                raise CheckpointError("its number of rows is no longer the one that it reported; it reports it again")
            self._run = run
        return self._run

"""Clients on remote sites: sending jobs, waiting, retrying, rejecting; the transport carries the messages."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

from fedlora import config
from fedlora.client.jobs import Job, Reply
from fedlora.config import Experiment
from fedlora.config.federated_data import in_mode
from fedlora.config.places import located_model
from fedlora.core.errors import ConfigError, DataError, QuorumError, TrainingError, WireError, plain
from fedlora.core.state import ClientState
from fedlora.engines.base import Engine
from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.protocol.transport import Received, Transport
from fedlora.federation.server.plain_settings import PlainSettings
from fedlora.federation.server.probes import Probing
from fedlora.privacy.disclosure import disclosure_of
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.tasks.base import Prepared
from fedlora.tasks.models.fingerprints import base_digest

POLL = 0.2
FIRST_TIMEOUT = 3600.0
"""Seconds that the first round waits for replies, and any for sites, unless the policy states it."""
SHORTEST_TIMEOUT, TURNS = 600.0, 10.0
"""Later rounds wait ``TURNS`` times as long as the longest turn took, but at least the first, in seconds."""
TRIES = 5
"""Maximum number of times a job is sent to a site that is lost each time."""
ASK_AGAIN = 600.0
"""Seconds after which a site that refused a run is asked again: it may have restarted unseen, or a new day begun."""
LARGEST_SIZE = 2**24
"""Upper bound on a client's reported number of examples."""


class SiteInfo(NamedTuple):
    """The information reported by a site: its kind, and the number of examples of each of its clients."""

    kind: str
    sizes: dict[int, int]


class _Invited(NamedTuple):
    """An opening message in transit."""

    name: str
    address: int
    secret: str


class _Refusal(NamedTuple):
    """Why a site was not admitted, and the time before which it is not asked again."""

    address: int
    why: str
    until: float


@dataclass
class _PendingJob:
    """A job in transit."""

    job: Job
    site: str
    secret: str
    ticket: str | None = None
    tries: int = 0
    lost_since: float | None = None
    why: str = "its site is not connected"


class Remote(Engine):
    """Runs jobs on sites.

    Args:
        transport: carries messages.
        rules: quorum, timeouts and retries.
        run: name of the run, hexadecimal digits; sites store their state under it.
        anywhere: whether any site can take any client's turn and is trusted, as in a simulation.
        callbacks: receive messages about events of sites.

    Attributes:
        accounted: the number of examples by which the privacy of a site's examples is accounted, which it has to have.
    """

    trusted = False

    def __init__(
        self,
        transport: Transport,
        rules: ServerPolicy,
        run: str,
        anywhere: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        # workers that can take any client's turn do not receive messages in order
        self.transport = transport if anywhere else Probing(transport)
        self.rules, self.name = rules, run
        self.anywhere, self._message = anywhere, CallbackList(callbacks).message
        self.min_clients = rules.min_clients
        self.over_sample = rules.over_sample
        self.attempts = rules.attempts
        self.site_infos: dict[str, SiteInfo] = {}
        self.accounted: Mapping[str, int] = {}
        self._opening: dict[str, Any] = {}
        self._plain: PlainSettings | None = None
        self._numbers: Mapping[str, int] = {}
        self._clients = self._per_round = 0
        self._invited: dict[str, _Invited] = {}
        self._refusals: dict[str, _Refusal] = {}
        self._longest = 0.0

    @property
    def round_timeout(self) -> float:
        """Seconds that a round waits for replies."""
        if self.rules.round_timeout is not None:
            return self.rules.round_timeout
        return max(SHORTEST_TIMEOUT, TURNS * self._longest) if self._longest else FIRST_TIMEOUT

    def open(
        self, experiment: Experiment, task: Prepared, clients: int, numbers: Mapping[str, int] | None = None
    ) -> None:
        """Announces the run, and waits until enough clients can be reached to start.

        Args:
            experiment: the whole configuration.
            task: its task.
            clients: total number of clients.
            numbers: the client number of each site, if sites have their own rows.

        Raises:
            ConfigError: the policy waits for more clients than there are.
            QuorumError: too few clients connected within ``round_timeout`` seconds, or their sites refuse.
        """
        if (least := self.rules.min_available or 0) > clients:
            raise ConfigError(
                f"min_available = {least} clients are waited for, but there are only {clients}; lower it in the rules "
                "of server.toml"
            )
        effective = in_mode(experiment)
        self._plain = plain_settings = PlainSettings(effective, task)
        self._opening = {
            "kind": "open",
            "run": self.name,
            "experiment": config.resolved(plain_settings.experiment),
            "label_names": task.label_names,
            "base": base_digest(located_model(effective)),
        }
        self._clients, self._numbers = clients, numbers or {}
        self._per_round = experiment.clients.per_round
        self._wait_for(self.rules.min_available or self.min_clients)

    def wait(self) -> None:
        """See ``Engine.wait``; the run is announced to new sites."""
        self._wait_for(self.min_clients)

    def _wait_for(self, least: int) -> None:
        # under Ray no client is ever late, yet workers may never start
        deadline = time.monotonic() + min(self.rules.round_timeout or FIRST_TIMEOUT, FIRST_TIMEOUT)
        said = False
        while True:
            online = self.transport.sites()
            self._invite(online)
            self._welcome()
            reached = self._reach(online)
            if reached >= least:
                return
            if time.monotonic() > deadline:
                refused = "; ".join(f"{name}: {refusal.why}" for name, refusal in self._refusals.items())
                raise QuorumError(
                    f"{reached} clients can be reached, and {least} are required ({refused or sorted(online)}); "
                    "start more sites, or lower min_clients and min_available"
                )
            if not said:
                self._message(f"waiting for sites: {reached} of {least} clients can be reached")
                said = True
            time.sleep(POLL)

    def _reach(self, online: Mapping[str, int]) -> int:
        """The number of clients represented by the online sites."""
        there = self.site_infos if self.anywhere else [name for name in online if name in self.site_infos]
        return sum(len(self.site_infos[name].sizes) for name in there)

    def _invite(self, online: Mapping[str, int]) -> None:
        """Announces the run to sites that have not joined it; if they refused, on reconnecting or after a while."""
        # a site's address stays the same after a restart, so only its absence tells that it has reconnected
        for name in self._refusals.keys() - online.keys():
            self._refusals[name] = self._refusals[name]._replace(until=0.0)
        asked = {(one.name, one.address) for one in self._invited.values()}
        for name, address in online.items():
            refusal = self._refusals.get(name)
            refused = refusal and refusal.address == address and time.monotonic() < refusal.until
            if name in self.site_infos or (name, address) in asked or refused:
                continue
            if self.anywhere and (self.site_infos or self._invited):  # all share one state folder
                return
            secret = secrets.token_hex(8)
            head = {**self._opening, "client": self._numbers.get(name, 0), "ticket": secret}
            ticket = self.transport.send(address, envelopes.write(head, {}), self.round_timeout)
            if ticket is not None:
                self._invited[ticket] = _Invited(name, address, secret)

    def _welcome(self) -> None:
        """Reads the replies to opening messages."""
        for received in self.transport.collect(list(self._invited)) if self._invited else ():
            name, address, secret = self._invited.pop(received.ticket)
            try:
                site_info = self._site_info(name, received, secret)
            except (WireError, DataError) as error:
                if not received.again:
                    before = self._refusals.get(name)
                    self._refusals[name] = _Refusal(address, str(error), time.monotonic() + ASK_AGAIN)
                    if before is None or before.why != str(error):
                        self._message(f"{name} is not admitted: {error}")
                continue
            self.site_infos[name] = site_info
            self._message(
                f"{name} connected with {sum(site_info.sizes.values()):,} examples of {len(site_info.sizes)} clients"
            )

    def _site_info(self, name: str, received: Received, secret: str) -> SiteInfo:
        """The information reported by a site, validated.

        Raises:
            WireError: it is invalid.
            DataError: the site refuses.
        """
        if received.raw is None:
            raise DataError(received.why)
        envelope = envelopes.read(received.raw)
        envelopes.check_keys(envelope, "opened")
        head = envelope.head
        if (head.get("kind"), head.get("run"), head.get("ticket")) != ("opened", self.name, secret):
            raise WireError("its reply is to another message")
        if head.get("refused"):
            raise DataError(plain(head["refused"]))
        try:
            sizes = {int(client): int(size) for client, size in head["sizes"].items()}
            site_info = SiteInfo(plain(head["tier"], 64), sizes)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise WireError(f"its reply cannot be read ({type(error).__name__})") from error
        self._check_sizes(name, sizes)
        online = self.transport.sites()
        for other in [
            each for each in self.site_infos if each != name and set(sizes) & set(self.site_infos[each].sizes)
        ]:
            if other in online:
                raise WireError(
                    f"it claims clients that {other} already has; where sites have rows of their own, set "
                    "data.kind = 'sites'"
                )
            del self.site_infos[other]  # the same site under another name
        return site_info

    def _check_sizes(self, name: str, sizes: Mapping[int, int]) -> None:
        """Checks the number of examples of each client that a site reports.

        Raises:
            WireError: they cannot be those of its clients.
            DataError: they are not those that the privacy of its examples is accounted for.
        """
        if not all(0 <= client < self._clients and 0 <= size <= LARGEST_SIZE for client, size in sizes.items()):
            raise WireError("it claims clients that do not exist, or have too many examples")
        if self._numbers and set(sizes) != {self._numbers.get(name)}:
            raise WireError("it claims clients that are not its own")
        if (total := sum(sizes.values())) != (before := self.accounted.get(name, total)):
            raise DataError(
                f"it has {total} examples, and had {before} when the run began, for which the privacy of examples is "
                "accounted; put its rows back, or start another run with --out"
            )

    def present(self) -> frozenset[int] | None:
        if self.anywhere:
            return None
        online = self.transport.sites()
        return frozenset(client for name in online if name in self.site_infos for client in self.site_infos[name].sizes)

    def most_examples(self, client: int) -> int | None:
        sizes = (site_info.sizes[client] for site_info in self.site_infos.values() if client in site_info.sizes)
        return next(sizes, None)

    def counted_examples(self) -> float | None:
        """See ``Engine.counted_examples``; shares of the server's own partition are not capped by the median."""
        sizes = [size for each in self.site_infos.values() for size in each.sizes.values() if size]
        limits = [self.rules.max_weight * median_low(sizes)] if self._numbers and sizes else []
        limits += [self.rules.max_examples] if self.rules.max_examples else []
        return min(limits, default=None)

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        """See ``Engine.run``: all jobs are sent at once; replies are yielded in the order of jobs as they arrive."""
        begun = time.monotonic()
        deadline = begun + self.round_timeout
        enough = min(len(jobs), self._per_round) if self.over_sample > 1 else len(jobs)
        secret = secrets.token_hex(8)
        online = self.transport.sites()
        homes = {client: name for name, site_info in self.site_infos.items() for client in site_info.sizes}
        pending_jobs = []
        for number, job in enumerate(jobs):
            site = sorted(online)[number % len(online)] if self.anywhere and online else homes.get(job.client, "")
            pending_jobs.append(_PendingJob(job, site, f"{secret}-{number}"))
            self._post(pending_jobs[-1], online, deadline)
        replies: dict[int, Reply] = {}
        counted = 0
        for place, job in enumerate(jobs):
            while place not in replies and counted < enough and time.monotonic() < deadline:
                for number, received in self._collect(pending_jobs, deadline):
                    if counted < enough:
                        replies[number] = self._read(received, pending_jobs[number])
                        if replies[number].raw is not None:
                            counted += 1
                            self._longest = max(self._longest, time.monotonic() - begun)
            if place not in replies:  # as far as is known here, its state is unchanged
                self._message(f"client {job.client} ({pending_jobs[place].site}) is late; its reply is dropped")
                replies[place] = Reply(None, job.memory, 0.0, delivered=False)
            yield replies.pop(place)

    def _post(self, pending_job: _PendingJob, online: Mapping[str, int], deadline: float) -> None:
        left = max(1.0, deadline - time.monotonic())
        announced = left if disclosure_of(pending_job.job.recipe).timing and not self.anywhere else None
        address = online.get(pending_job.site)
        if address is not None:
            job = pending_job.job
            job = job._replace(recipe=self._plain.of(job.recipe) if self._plain else job.recipe)
            raw = envelopes.of_job(job, self.name, pending_job.secret, announced)
            pending_job.ticket = self.transport.send(address, raw, left)
        if pending_job.ticket is None:
            pending_job.lost_since = pending_job.lost_since or time.monotonic()
        else:
            pending_job.tries += 1
            pending_job.lost_since = None

    def _collect(self, pending_jobs: list[_PendingJob], deadline: float) -> list[tuple[int, Received]]:
        """The outcomes received, after a short pause if there are none; jobs of lost sites are sent again."""
        out = {each.ticket: number for number, each in enumerate(pending_jobs) if each.ticket is not None}
        done: list[tuple[int, Received]] = []
        for received in self.transport.collect(list(out)) if out else ():
            number = out[received.ticket]
            pending_job = pending_jobs[number]
            pending_job.ticket = None
            if received.again and pending_job.tries < TRIES and disclosure_of(pending_job.job.recipe).retries:
                pending_job.why, pending_job.lost_since = received.why, time.monotonic()
                self._message(
                    f"{pending_job.site} has not replied ({received.why}); its job is sent again when it reconnects"
                )
            else:
                done.append((number, received))
        lost = [(number, each) for number, each in enumerate(pending_jobs) if each.lost_since]
        online = self.transport.sites() if lost else {}
        for number, pending_job in lost:
            self._post(pending_job, online, deadline)
            if pending_job.lost_since and time.monotonic() - pending_job.lost_since > self.rules.rejoin_timeout:
                pending_job.lost_since = None
                done.append((number, Received("", None, pending_job.why)))
        if not done:
            time.sleep(POLL)
        return done

    def _read(self, received: Received, pending_job: _PendingJob) -> Reply:
        """The reply in a received message, or a reply with the reason why there is none.

        Raises:
            TrainingError: a trusted worker reports that training failed.
        """
        lost = False
        try:
            if received.raw is None:
                raise WireError(received.why)
            envelope = envelopes.read(received.raw)
            reply = envelopes.to_reply(envelope, pending_job.job, self.name, pending_job.secret)
            lost = envelope.head.get("lost") is True
        except WireError as error:
            self._message(f"the reply of {pending_job.site} is rejected: {error}")
            size = len(received.raw or b"")
            reply = Reply(None, ClientState(), 0.0, f"{pending_job.site}: {error}", delivered=False, size=size)
        if reply.refused and self.anywhere:
            raise TrainingError(reply.refused)
        if lost:  # the run is announced to it again
            self.site_infos.pop(pending_job.site, None)
        return reply

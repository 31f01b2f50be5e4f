"""Clients on sites: letters to them and back, waiting, asking again, refusing. Knows nothing of how letters travel."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedlora import config
from fedlora.config import Experiment
from fedlora.engines import letters
from fedlora.engines.base import Engine
from fedlora.engines.rules import Rules
from fedlora.engines.site import base_digest
from fedlora.errors import DataError, QuorumError, WireError
from fedlora.jobs import Job, Reply
from fedlora.setting import in_mode
from fedlora.state import ClientState

POLL = 0.2


class Arrived(NamedTuple):
    """What came of a letter: an answer, or why there is none.

    Args:
        ticket: what ``Courier.post`` gave.
        raw: the answer; None if there is none.
        why: a sentence then.
        again: whether it is worth asking again, as the site was lost rather than at fault.
    """

    ticket: str
    raw: bytes | None
    why: str = ""
    again: bool = False


class Courier(ABC):
    """Carries letters to sites and answers back."""

    @abstractmethod
    def sites(self) -> Mapping[str, int]:
        """The sites that are there now: an address by name."""

    @abstractmethod
    def post(self, address: int, raw: bytes, seconds: float) -> str | None:
        """Sends a letter that is worth nothing after ``seconds``; its ticket, or None where the site is gone."""

    @abstractmethod
    def collect(self, tickets: Sequence[str]) -> list[Arrived]:
        """What has come of these letters since the last call."""


class Guest(NamedTuple):
    """What a site said of itself: its kind, and how many examples each of its clients has."""

    tier: str
    sizes: dict[int, int]


@dataclass
class _Errand:
    """A letter on its way."""

    site: str
    raw: bytes
    tickets: list[str] = field(default_factory=list)
    arrived: Arrived | None = None
    lost_since: float | None = None
    why: str = ""


class Remote(Engine):
    """Runs jobs on sites.

    Args:
        courier: carries letters.
        rules: what is waited for.
        run: name of the run, hexadecimal digits; what sites remember is theirs by it.
        anywhere: whether any site can take any client's turn, as in a simulation.
        tell: is told what happens to sites.
    """

    trusted = False

    def __init__(
        self,
        courier: Courier,
        rules: Rules,
        run: str,
        anywhere: bool = False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.courier, self.rules, self.name = courier, rules, run
        self.anywhere, self.tell = anywhere, tell
        self.min_clients = rules.min_clients
        self.over_sample = rules.over_sample
        self.attempts = rules.attempts
        self._opening: dict[str, Any] = {}
        self._numbers: Mapping[str, int] = {}
        self.guests: dict[str, Guest] = {}

    def open(self, experiment: Experiment, label_names: list[str], numbers: Mapping[str, int]) -> None:
        """Says what the run is, and waits until so many sites that a round can begin have taken it up.

        Args:
            experiment: the whole configuration.
            label_names: what the model was told about its outputs.
            numbers: the client number of each site that has rows of its own.

        Raises:
            QuorumError: too few came in ``round_timeout`` seconds, or they refuse.
        """
        effective = in_mode(experiment)
        self._opening = {
            "kind": "open",
            "run": self.name,
            "experiment": config.resolved(effective),
            "label_names": label_names,
            "base": base_digest(effective.model),
        }
        self._numbers = numbers
        self._wait_for(self.rules.min_available or self.min_clients)

    def wait(self) -> None:
        """See ``Engine.wait``; new sites are told of the run."""
        self._wait_for(self.min_clients)

    def _wait_for(self, least: int) -> None:
        deadline = time.monotonic() + self.rules.round_timeout
        refused: dict[str, str] = {}
        said = False
        while True:
            online = self.courier.sites()
            new = [name for name in online if name not in self.guests and name not in refused]
            refused |= self._invite({name: online[name] for name in new}, deadline)
            if self._reach(online) >= least:
                return
            if time.monotonic() > deadline:
                why = "; ".join(f"{name}: {text}" for name, text in refused.items()) or f"there: {sorted(online)}"
                raise QuorumError(
                    f"{self._reach(online)} clients can be reached, and {least} are waited for ({why}); "
                    "start more sites, or lower min_clients and min_available"
                )
            if not said:
                self.tell(f"waiting for sites: {self._reach(online)} of {least} clients can be reached")
                said = True
            time.sleep(POLL)

    def _reach(self, online: Mapping[str, int]) -> int:
        """How many clients the sites that are there stand for."""
        if self.anywhere:
            return sum(len(guest.sizes) for guest in self.guests.values())
        return sum(len(self.guests[name].sizes) for name in online if name in self.guests)

    def _invite(self, online: Mapping[str, int], deadline: float) -> dict[str, str]:
        """Tells sites of the run; why those refuse that do."""
        if self.anywhere:  # all share one memory
            online = dict(list(online.items())[:1]) if not self.guests else {}
        seconds = max(1.0, deadline - time.monotonic())
        waiting: dict[str, tuple[str, str]] = {}
        for name, address in online.items():
            secret = secrets.token_hex(8)
            head = {**self._opening, "client": self._numbers.get(name, 0), "ticket": secret}
            ticket = self.courier.post(address, letters.write(head, {}), seconds)
            if ticket is not None:
                waiting[ticket] = name, secret
        refused = {}
        while waiting and time.monotonic() < deadline:
            for arrived in self.courier.collect(list(waiting)):
                name, secret = waiting.pop(arrived.ticket)
                try:
                    guest = self._guest(name, arrived, secret)
                except (WireError, DataError) as error:
                    if not arrived.again:
                        refused[name] = str(error)
                        self.tell(f"{name} is not taken in: {error}")
                    continue
                self.guests[name] = guest
                self.tell(f"{name} is there with {sum(guest.sizes.values()):,} examples of {len(guest.sizes)} clients")
            time.sleep(POLL)
        return refused

    def _guest(self, name: str, arrived: Arrived, secret: str) -> Guest:
        if arrived.raw is None:
            raise DataError(arrived.why)
        head, _ = letters.read(arrived.raw)
        if (head.get("kind"), head.get("run"), head.get("ticket")) != ("opened", self.name, secret):
            raise WireError("its answer is to something else")
        if head.get("refused"):
            raise DataError(str(head["refused"])[:500])
        try:
            sizes = {int(client): int(size) for client, size in head["sizes"].items()}
            if min(sizes.values(), default=0) < 0:
                raise ValueError("sizes below zero")
            return Guest(str(head["tier"])[:64], sizes)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise WireError(f"its answer cannot be read ({error})") from error

    def present(self) -> frozenset[int] | None:
        """The clients that can be asked now; None for all of them."""
        if self.anywhere:
            return None
        online = self.courier.sites()
        return frozenset(client for name in online if name in self.guests for client in self.guests[name].sizes)

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        """See ``Engine.run``: all are sent at once; answers are handed on in the order of jobs as they come."""
        deadline = time.monotonic() + self.rules.round_timeout
        enough = max(self.min_clients, int(len(jobs) / self.over_sample + 1e-9))
        secret = secrets.token_hex(8)
        online = self.courier.sites()
        errands = []
        for number, job in enumerate(jobs):
            site = sorted(online)[number % max(1, len(online))] if self.anywhere else self._site_of(job.client)
            left = deadline - time.monotonic()
            errands.append(_Errand(site, letters.of_job(job, self.name, f"{secret}-{number}", left)))
            self._post(errands[-1], online, left)
        replies: dict[int, Reply] = {}
        counted = 0
        for place, job in enumerate(jobs):
            while place not in replies and counted < enough and time.monotonic() < deadline:
                for number, arrived in self._collect(errands, deadline):
                    if counted < enough:
                        replies[number] = self._read(arrived, jobs[number], f"{secret}-{number}", errands[number].site)
                        counted += replies[number].raw is not None
            if place not in replies:  # as far as anyone here knows, it remembers what it did
                self.tell(f"client {job.client} ({errands[place].site}) is late; its answer is dropped")
                replies[place] = Reply(None, job.memory, 0.0, heard=False)
            yield replies.pop(place)
            errands[place].raw = b""

    def _site_of(self, client: int) -> str:
        """Where a client lives; empty if its site has not come yet."""
        return next((name for name, guest in self.guests.items() if client in guest.sizes), "")

    def _post(self, errand: _Errand, online: Mapping[str, int], seconds: float) -> None:
        address = online.get(errand.site)
        ticket = None if address is None else self.courier.post(address, errand.raw, seconds)
        if ticket is None:
            errand.lost_since = errand.lost_since or time.monotonic()
            errand.why = errand.why or "its site is gone"
        else:
            errand.tickets.append(ticket)
            errand.lost_since = None

    def _collect(self, errands: list[_Errand], deadline: float) -> list[tuple[int, Arrived]]:
        """What has come, after a short rest if nothing has; letters to lost sites go again."""
        out = {ticket: number for number, each in enumerate(errands) if not each.arrived for ticket in each.tickets}
        done: list[tuple[int, Arrived]] = []
        for arrived in self.courier.collect(list(out)) if out else ():
            number = out[arrived.ticket]
            errand = errands[number]
            if errand.arrived:
                continue
            errand.tickets.remove(arrived.ticket)
            if arrived.again:
                errand.why = arrived.why
                errand.lost_since = errand.lost_since or time.monotonic()
                self.tell(f"{errand.site} was lost ({arrived.why}); it is asked again when it is back")
            else:
                errand.arrived = arrived
                done.append((number, arrived))
        lost = [(number, each) for number, each in enumerate(errands) if each.lost_since and not each.arrived]
        online = self.courier.sites() if lost else {}
        for number, errand in lost:
            if errand.tickets:  # the older letter may still be answered
                continue
            if errand.site in online:
                self._post(errand, online, max(1.0, deadline - time.monotonic()))
            elif time.monotonic() - (errand.lost_since or 0.0) > self.rules.rejoin_timeout:
                errand.arrived = Arrived("", None, errand.why)
                done.append((number, errand.arrived))
        if not done:
            time.sleep(POLL)
        return done

    def _read(self, arrived: Arrived, job: Job, secret: str, site: str) -> Reply:
        try:
            if arrived.raw is None:
                raise WireError(arrived.why)
            return letters.to_reply(arrived.raw, job, self.name, secret)
        except WireError as error:
            self.tell(f"the answer of {site} is refused: {error}")
            return Reply(None, ClientState(), 0.0, f"{site}: {error}", heard=False)

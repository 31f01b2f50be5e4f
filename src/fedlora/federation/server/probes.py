"""Detects lost messages where the transport does not report the loss.

A site replies to its messages in order, so a reply to a later message means that no reply to an earlier one will come.
A site that has been silent for long is sent a small probe, so that there is a later message. A SuperLink that stops
between recording a delivery and completing it loses the message permanently, in either direction.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.transport import Received, Transport

FIRST_SILENCE = 20.0
"""Seconds of silence after which a site is first probed; doubled for each further probe."""
LIFE = 86400.0
"""Lifetime of a probe message in seconds."""


@dataclass
class _Site:
    """The message traffic between the server and a site.

    Args:
        answered: sequence number of the latest envelope it replied to.
        since: time of the last message in either direction.
        patience: seconds of silence before it is probed.
    """

    answered: int = 0
    since: float = 0.0
    patience: float = FIRST_SILENCE


class Probing(Transport):
    """A transport that reports which messages of the wrapped transport were lost.

    Args:
        transport: delivers messages to a site in order, each after the reply to the previous one.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sent: dict[str, tuple[int, int]] = {}
        self._probes: set[str] = set()
        self._known: dict[int, _Site] = {}
        self._count = 0

    def sites(self) -> Mapping[str, int]:
        return self._transport.sites()

    def send(self, address: int, raw: bytes, seconds: float) -> str | None:
        ticket = self._transport.send(address, raw, seconds)
        if ticket is not None:
            self._count += 1
            self._sent[ticket] = address, self._count
            site = self._known.setdefault(address, _Site())
            site.since, site.patience = time.monotonic(), FIRST_SILENCE
        return ticket

    def collect(self, tickets: Sequence[str]) -> list[Received]:
        """See ``Transport.collect``; messages overtaken by the reply to a later one are reported as lost."""
        # a reply may arrive between two pulls of one call, so overtaken messages are pulled once more
        overtaken = [ticket for ticket in (*tickets, *self._probes) if self._is_overtaken(ticket)]
        received = []
        for each in self._transport.collect([*tickets, *self._probes]):
            address, place = self._sent.pop(each.ticket)
            if each.raw is not None or not each.again:
                site = self._known[address]
                site.answered = max(site.answered, place)
                site.since, site.patience = time.monotonic(), FIRST_SILENCE
            if each.ticket in self._probes:
                self._probes.remove(each.ticket)
            else:
                received.append(each)
        for ticket in overtaken:
            if ticket in self._sent:
                del self._sent[ticket]
                if ticket in self._probes:
                    self._probes.remove(ticket)
                    continue
                received.append(Received(ticket, None, "a message to it or its reply was lost", again=True))
        self._probe({self._sent[ticket][0] for ticket in tickets if ticket in self._sent})
        return received

    def _is_overtaken(self, ticket: str) -> bool:
        address, place = self._sent[ticket]
        return place < self._known[address].answered

    def _probe(self, addresses: set[int]) -> None:
        """Sends a small envelope to sites that owe a reply and have been silent for long."""
        for address in addresses:
            site = self._known[address]
            if time.monotonic() - site.since > site.patience:
                patience = 2 * site.patience
                head = {"kind": "probe", "ticket": secrets.token_hex(8)}
                ticket = self.send(address, envelopes.write(head, {}), LIFE)
                if ticket is not None:
                    self._probes.add(ticket)
                site.since, site.patience = time.monotonic(), patience

"""Detects messages that were lost on the way, where the transport does not report it.

A site answers its messages in order: a reply to a later one means that no reply to an earlier one will come. A site
that has been silent for long is sent a small probe, so that there is a later message. A SuperLink that stops between
recording a hand-over and completing it loses the message for good, in either direction.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.federation.protocol import envelopes
from fedlora.federation.protocol.transport import Received, Transport

FIRST_SILENCE = 20.0
"""Seconds after which a site is probed for the first time; twice as long each next time."""
LIFE = 86400.0
"""Seconds for which a probe is carried."""


@dataclass
class _Site:
    """What passed between the server and a site.

    Args:
        answered: the place of the latest envelope that it answered.
        since: when something last passed.
        patience: seconds of silence until it is probed.
    """

    answered: int = 0
    since: float = 0.0
    patience: float = FIRST_SILENCE


class Probing(Transport):
    """A transport that says which messages of another are lost.

    Args:
        transport: hands a site its messages in their order, each after the last was answered.
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
        """See ``Transport.collect``; messages that a later one's answer overtook come back as lost."""
        # an answer may come between two looks of one call, so that what is overtaken is looked for once more
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
                received.append(Received(ticket, None, "a message to it or its answer was lost on the way", again=True))
        self._probe({self._sent[ticket][0] for ticket in tickets if ticket in self._sent})
        return received

    def _is_overtaken(self, ticket: str) -> bool:
        address, place = self._sent[ticket]
        return place < self._known[address].answered

    def _probe(self, addresses: set[int]) -> None:
        """Sends a small envelope to those that owe an answer and have been silent for long."""
        for address in addresses:
            site = self._known[address]
            if time.monotonic() - site.since > site.patience:
                patience = 2 * site.patience
                head = {"kind": "probe", "ticket": secrets.token_hex(8)}
                ticket = self.send(address, envelopes.write(head, {}), LIFE)
                if ticket is not None:
                    self._probes.add(ticket)
                site.since, site.patience = time.monotonic(), patience

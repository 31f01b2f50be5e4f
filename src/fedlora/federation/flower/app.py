"""Integration through Flower's public interface: envelopes as Flower messages, a site as a client app."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import httpx
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora import config
from fedlora.core.errors import WireError, plain
from fedlora.federation.deploy.flower_versions import PUBLIC, check_flower
from fedlora.federation.protocol.policies import ServerPolicy, SiteConfig
from fedlora.federation.protocol.transport import Received, Transport
from fedlora.federation.site.site import Site

check_flower(PUBLIC)
CHUNK = 1 << 20
"""Size of an array in bytes: larger ones time out over slow links."""
LARGEST = 1 << 33
"""Maximum size of an envelope in bytes."""
SITE_FILE = "FEDLORA_SITE"
"""The environment variable that names a site's file."""
TRANSPORT: tuple[type[Exception], ...] = (httpx.HTTPError, OSError)
"""Connection errors, as opposed to malformed replies."""
BATCHES = 32
"""Maximum number of batches in which replies are pulled."""
_TYPE = "fedlora.envelope/1"
_AT_FAULT = 2
"""Flower's error code for an app that raised; all others mean that a message was lost."""


def pack(raw: bytes) -> RecordDict:
    """A message as a Flower record: one array per mebibyte."""
    pieces = (raw[first : first + CHUNK] for first in range(0, max(1, len(raw)), CHUNK))
    arrays = {f"{number:06d}": Array("uint8", (len(piece),), _TYPE, piece) for number, piece in enumerate(pieces)}
    return RecordDict({"envelope": ArrayRecord(arrays)})


def unpack(record: RecordDict) -> bytes:
    """The inverse of ``pack``.

    Raises:
        WireError: the record does not contain an envelope.
    """
    found = record.get("envelope")
    if list(record) != ["envelope"] or not isinstance(found, ArrayRecord):
        raise WireError("a message does not contain an envelope")
    if list(found) != [f"{number:06d}" for number in range(len(found))]:
        raise WireError("the chunks of a message are out of order")
    if any(array.stype != _TYPE for array in found.values()) or sum(len(a.data) for a in found.values()) > LARGEST:
        raise WireError("a message is of an unknown kind, or too long")
    return b"".join(array.data for array in found.values())


class GridTransport(Transport):
    """A transport over a Flower grid.

    Args:
        grid: Flower's grid.
        addresses: returns the sites that are online: node id by name.
        check: raises if no message can be received any more.
    """

    def __init__(
        self, grid: Grid, addresses: Callable[[], Mapping[str, int]], check: Callable[[], None] = lambda: None
    ) -> None:
        self._grid = grid
        self._addresses = addresses
        self._check = check

    def sites(self) -> Mapping[str, int]:
        self._check()
        return self._addresses()

    def send(self, address: int, raw: bytes, seconds: float) -> str | None:
        message = Message(pack(raw), dst_node_id=address, message_type="train", ttl=max(1.0, seconds))
        # grid implementations differ in what they return for a node that is gone
        tickets = [ticket for ticket in self._grid.push_messages([message]) if ticket]
        return tickets[0] if tickets else None

    def collect(self, tickets: Sequence[str]) -> list[Received]:
        self._check()
        done = []
        size = max(1, len(tickets) // BATCHES)
        # in small batches, so that a reply that Flower cannot read invalidates few others
        for first in range(0, len(tickets), size):
            asked = tickets[first : first + size]
            try:
                found = list(self._grid.pull_messages(list(asked)))
            except TRANSPORT:
                raise
            except Exception as error:
                logging.getLogger("fedlora").warning("a reply cannot be read", exc_info=error)
                why = f"a reply that Flower cannot read ({type(error).__name__})"
                done += [Received(ticket, None, why) for ticket in asked]
                continue
            for message in found:
                # an error of the connection itself carries no ticket
                ticket = message.metadata.reply_to_message_id or (asked[0] if size == 1 else "")
                if ticket in asked:
                    done.append(self._received(ticket, message))
        return done

    def _received(self, ticket: str, message: Message) -> Received:
        if message.has_error():
            reason = plain(re.sub(r"\s+", " ", message.error.reason or "no reason given"), 300)
            again = message.error.code != _AT_FAULT
            return Received(ticket, None, f"Flower's code {message.error.code}: {reason}", again)
        try:
            return Received(ticket, unpack(message.content))
        except WireError as error:
            return Received(ticket, None, str(error))


def nodes_of(grid: Grid) -> Mapping[str, int]:
    """The nodes of a simulation, by their ids."""
    return {str(node): node for node in sorted(grid.get_node_ids())}


def answer(site: Site, message: Message) -> Message:
    """A site's reply to a message."""
    return Message(pack(site.answer(unpack(message.content))), reply_to=message)


@lru_cache(maxsize=1)
def _site(file: str) -> Site:
    return Site(SiteConfig.load(Path(file)))


client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Replies as the site whose file is named by the environment variable ``SITE_FILE``."""
    return answer(_site(os.environ[SITE_FILE]), message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment given by the Flower run's configuration: the paths ``config`` and ``folder``."""
    from fedlora.federation.deploy.federate import federate

    experiment = config.load(Path(str(context.run_config["config"])))
    folder = Path(str(context.run_config["folder"]))
    result = federate(experiment, folder, GridTransport(grid, lambda: nodes_of(grid)), ServerPolicy(), anywhere=True)
    logging.getLogger("fedlora").info("finished: %s", result.after)

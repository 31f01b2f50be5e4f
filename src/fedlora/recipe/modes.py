"""The training modes, and how they differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """A training mode.

    Args:
        sends: whether messages are exchanged between a server and clients; if not, one client trains, no bytes are
            counted, and it keeps its optimiser.
        pools: whether that client holds the rows of all clients.
        separate: whether each client trains its own model, in a separate run.
    """

    sends: bool = False
    pools: bool = False
    separate: bool = False


MODES = {"federated": Mode(sends=True), "centralised": Mode(pools=True), "local": Mode(separate=True)}

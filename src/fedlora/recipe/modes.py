"""The ways to train, and what differs between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Args:
        sends: messages travel between a server and clients; where not, one client trains, nothing of its bytes counts,
            and it keeps its optimiser.
        pools: that client holds the rows of all.
        separate: each client trains a model of its own, in a run of its own.
    """

    sends: bool = False
    pools: bool = False
    separate: bool = False


MODES = {"federated": Mode(sends=True), "centralised": Mode(pools=True), "local": Mode(separate=True)}

"""Estimates a run's duration over a given network: bytes over bandwidth, and the work of the slowest client."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fedlora.core.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.rounds.ledger import RoundRecord

_BITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}
_SECONDS = {"s": 1.0, "ms": 1e-3}
_EXAMPLE = "down=10Mbit,up=1Mbit,latency=50ms"


class Turn(NamedTuple):
    """One client's turn.

    Args:
        tier: its tier's name, empty without tiers.
        down_bytes: bytes that the client receives.
        up_bytes: bytes that it sends.
        work: seconds of computation.
    """

    tier: str
    down_bytes: float
    up_bytes: float
    work: float


@dataclass(frozen=True)
class Network:
    """The network between the server and each client.

    A round takes ``2 latency + 8 down_bytes / down + work + 8 up_bytes / up`` seconds of its slowest client; clients
    work in parallel, and the server's own time is ignored.

    Args:
        down: bits per second to a client.
        up: bits per second from a client.
        latency: one-way delay in seconds.

    >>> Network(down=8e6, up=8e5, latency=0.05).seconds(1_000_000, 100_000, work=2.0)
    4.1
    """

    down: float
    up: float
    latency: float = 0.0

    def seconds(self, down_bytes: float, up_bytes: float, work: float) -> float:
        """The duration of one client's turn, from the first byte the server sends to the last it receives.

        Args:
            down_bytes: bytes that the client receives.
            up_bytes: bytes that it sends.
            work: seconds of computation.
        """
        return 2 * self.latency + 8 * down_bytes / self.down + work + 8 * up_bytes / self.up

    def round_seconds(self, row: RoundRecord) -> float:
        """The duration of a ledger's round: the slowest tier, with its mean message and the longest of its turns."""
        cohort = sum(row.references.values())  # names may be secret
        if not cohort:  # nothing was sent
            return row.slowest_seconds
        tiers = row.tiers or {"": {"down_bytes": row.down_bytes, "up_bytes": row.up_bytes}}
        turns = []
        for name, tier in tiers.items():
            num = tier["clients"]["num"] if name else cohort
            down, up = (sum(tier[way].values()) / num for way in ("down_bytes", "up_bytes"))
            turns.append(self.seconds(down, up, row.tier_seconds.get(name, row.slowest_seconds)))
        return max(turns)


def seconds_to(
    rows: Sequence[RoundRecord], network: Network | None, metric: str, target: float, higher_is_better: bool
) -> float | None:
    """Seconds until an evaluation first reached ``target``; None if no evaluation did.

    Args:
        rows: the rounds of a ledger.
        network: the network between the server and every client; None for the one in the run's configuration.
        metric: the name of the metric.
        target: the value to reach.
        higher_is_better: whether values above the target are better.

    Raises:
        ConfigError: no network is given and the ledger has no times.
    """
    passed = 0.0
    for row in rows:
        if network is None and row.network_seconds is None and row.round:
            raise ConfigError(
                "the run's configuration has no clients.network, or its cohorts are secret and tiers have networks of "
                "their own; name a network with --link"
            )
        passed += network.round_seconds(row) if network else row.network_seconds or 0.0
        value = row.metrics.get(metric)
        if value is not None and (value >= target if higher_is_better else value <= target):
            return passed
    return None


def slowest_seconds(networks: Mapping[str, Network], turns: Sequence[Turn]) -> float | None:
    """The duration of a round: its longest client turn, each over its own network; None without networks."""
    if not networks:
        return None
    return max((networks[turn.tier].seconds(turn.down_bytes, turn.up_bytes, turn.work) for turn in turns), default=0.0)


def parse_network(text: str) -> Network:
    """Parses a network such as ``down=10Mbit,up=1Mbit,latency=50ms``.

    Raises:
        ConfigError: the text does not have this form.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(down|up|latency)\s*=\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)\s*", part)
        units = _SECONDS if match and match[1] == "latency" else _BITS
        if not match or match[3] not in units or match[1] in found:
            raise ConfigError(
                f"a network: {part.strip()!r} is not understood; write {_EXAMPLE}, with {', '.join(_BITS)} a second "
                f"and {', '.join(_SECONDS)}"
            )
        found[match[1]] = float(match[2]) * units[match[3]]
    if not (found.get("down") and found.get("up") and all(map(math.isfinite, found.values()))):
        raise ConfigError(f"a network needs finite down and up above zero, such as {_EXAMPLE}")
    return Network(found["down"], found["up"], found.get("latency", 0.0))

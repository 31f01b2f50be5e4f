"""The transport interface: messages to sites, and their replies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Received(NamedTuple):
    """The outcome of a message: a reply, or the reason why there is none.

    Args:
        ticket: the ticket returned by ``Transport.send``.
        raw: the reply; None if there is none.
        why: in that case, a sentence with the reason.
        again: whether a retry is worthwhile: the site or a message was lost, but the site is not at fault.
    """

    ticket: str
    raw: bytes | None
    why: str = ""
    again: bool = False


class Transport(ABC):
    """Carries messages to sites and replies back."""

    @abstractmethod
    def sites(self) -> Mapping[str, int]:
        """The sites that are online: address by name."""

    @abstractmethod
    def send(self, address: int, raw: bytes, seconds: float) -> str | None:
        """Sends a message that expires after ``seconds``; returns its ticket, or None if the site is gone."""

    @abstractmethod
    def collect(self, tickets: Sequence[str]) -> list[Received]:
        """The outcomes of these messages since the last call."""

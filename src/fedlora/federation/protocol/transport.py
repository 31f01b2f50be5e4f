"""What carries messages to sites and answers back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Received(NamedTuple):
    """What came of a message: an answer, or why there is none.

    Args:
        ticket: what ``Transport.post`` gave.
        raw: the answer; None if there is none.
        why: a sentence then.
        again: whether it is worth asking again, as the site or a message was lost rather than the site at fault.
    """

    ticket: str
    raw: bytes | None
    why: str = ""
    again: bool = False


class Transport(ABC):
    """Carries messages to sites and answers back."""

    @abstractmethod
    def sites(self) -> Mapping[str, int]:
        """The sites that are there now: an address by name."""

    @abstractmethod
    def send(self, address: int, raw: bytes, seconds: float) -> str | None:
        """Sends a message that is worth nothing after ``seconds``; its ticket, or None where the site is gone."""

    @abstractmethod
    def collect(self, tickets: Sequence[str]) -> list[Received]:
        """What has come of these messages since the last call."""

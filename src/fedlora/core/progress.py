"""Progress of a long step: its stages go to the logger ``fedlora``, and parts done to a listener if there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
LOG = logging.getLogger("fedlora")
"""What a command prints, or writes into its log file; a program that uses the library adds handlers of its own."""

_listener: ContextVar[Callable[[int, int], None] | None] = ContextVar("listener", default=None)


def stage(text: str) -> None:
    """Reports what is being loaded or prepared; terminals show it, other streams do not."""
    LOG.info(text, extra={"stage": True})


def counted(parts: Sequence[T]) -> Iterator[T]:
    """The parts of a step in order; after each one the listener is called with the number done and their total."""
    listener = _listener.get()
    for number, part in enumerate(parts, start=1):
        yield part
        if listener is not None:
            listener(number, len(parts))


@contextmanager
def listening(listener: Callable[[int, int], None]) -> Iterator[None]:
    """Calls ``listener(done, total)`` after each part that is counted within the context."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)

"""Ends a process whose work takes too long, whatever it is stuck in."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 30.0
"""Seconds beyond the limit that training has for ending by itself, between two steps."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Ends this process, with a traceback of all threads, ``GRACE`` after ``seconds``; None for no limit.

    A thread of faulthandler's own, which needs no interpreter lock: neither a regular expression nor a driver that
    hangs can hold it up. ``fedlora join`` starts the process again.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)  # type: ignore[arg-type]
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()

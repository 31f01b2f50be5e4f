"""Flower's SuperNode, patched: ``python -m fedlora.federation.flower.supernode SECONDS ARGUMENTS``.

Unpatched, it sleeps three seconds between polls, which would dominate short rounds; and if a run ends while a message
is being received, it passes the incomplete message to its worker, which then waits two hours for the rest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedlora.federation.flower.uploads import believe

_connected = start_client_internal._init_connection


@contextmanager
def _connection(**settings: Any) -> Iterator[tuple[Any, ...]]:
    """Flower's connection, in which pulling from a finished run raises an error, so that the SuperNode cleans up."""
    with _connected(**settings) as (*others, pull_object, push_object, confirm_message_received):
        yield *others, _plainly(pull_object), push_object, _plainly(confirm_message_received)


def _plainly(ask: Callable[[int, str], Any]) -> Callable[[int, str], Any]:
    def asked(run: int, name: str) -> Any:
        try:
            return ask(run, name)
        except RunNotRunningException as error:  # not derived from Exception, so nothing would clean up
            raise RuntimeError("the run is over") from error

    return asked


def main() -> None:
    """Starts the SuperNode."""
    longest = float(sys.argv.pop(1))
    clock = SimpleNamespace(**vars(time))
    clock.sleep = lambda seconds: time.sleep(min(seconds, longest))
    vars(start_client_internal).update(time=clock, _init_connection=_connection)
    believe(FleetHttpClient)
    flower_supernode()


if __name__ == "__main__":
    main()

"""Flower's SuperNode, mended: ``python -m fedlora.federation.flower.supernode SECONDS ARGUMENTS``.

By itself it rests three seconds between two looks, which would be most of a short round; and where a run ends while a
message comes, it hands its worker the half of it, which then waits for the rest for two hours.
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
    """Flower's connection; what is pulled of a run that is over is an error, after which it tidies up."""
    with _connected(**settings) as (*others, pull_object, push_object, confirm_message_received):
        yield *others, _plainly(pull_object), push_object, _plainly(confirm_message_received)


def _plainly(ask: Callable[[int, str], Any]) -> Callable[[int, str], Any]:
    def asked(run: int, name: str) -> Any:
        try:
            return ask(run, name)
        except RunNotRunningException as error:  # no Exception, and nobody would tidy up
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

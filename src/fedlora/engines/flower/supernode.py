"""Flower's SuperNode that asks for work more often: ``python -m fedlora.engines.flower.supernode SECONDS ARGUMENTS``.

By itself it rests three seconds between two looks, which would be most of a short round.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode


def main() -> None:
    """Starts the SuperNode."""
    longest = float(sys.argv.pop(1))
    clock = SimpleNamespace(**vars(time))
    clock.sleep = lambda seconds: time.sleep(min(seconds, longest))
    vars(start_client_internal)["time"] = clock
    flower_supernode()


if __name__ == "__main__":
    main()

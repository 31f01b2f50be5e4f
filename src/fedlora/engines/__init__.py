"""Where clients run: the slot ``Engine``.

An engine turns jobs into replies in their order; it does not know what a round makes of them.
"""

from collections.abc import Callable

from fedlora.client.workspace import Workspace
from fedlora.engines.base import Engine
from fedlora.engines.serial import Serial
from fedlora.population.clients import Population

AnyEngine = Engine | Callable[[Workspace, Population], Engine]
"""An engine, or what makes one of the resident model and the population, as its class does."""

__all__ = ["AnyEngine", "Engine", "Serial"]

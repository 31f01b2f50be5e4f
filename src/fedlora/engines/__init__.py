"""Where clients run: the slot ``Engine``.

An engine turns jobs into replies, in order; how a round uses the replies is outside its scope.
"""

from collections.abc import Callable

from fedlora.client.workspace import Workspace
from fedlora.engines.base import Engine
from fedlora.engines.processes import Processes
from fedlora.engines.serial import Serial
from fedlora.population.clients import Population

AnyEngine = Engine | Callable[[Workspace, Population], Engine]
"""An engine, or a factory (such as its class) that builds one from the resident model and the population."""

__all__ = ["AnyEngine", "Engine", "Processes", "Serial"]

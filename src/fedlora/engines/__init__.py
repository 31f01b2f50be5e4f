"""Where clients run: the slot ``Engine``.

An engine turns jobs into replies in their order; it does not know what a round makes of them.
"""

from fedlora.engines.base import Engine
from fedlora.engines.serial import Serial

__all__ = ["Engine", "Serial"]

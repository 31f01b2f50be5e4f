"""Where clients run: the slot ``Engine``.

An engine takes jobs and gives replies in their order; it knows nothing of what a round makes of them.
"""

from fedlora.engines.base import Engine
from fedlora.engines.serial import Serial

__all__ = ["Engine", "Serial"]

"""The slot ``Engine`` and its table."""

from __future__ import annotations

from fedlora.engines.base import Engine
from fedlora.engines.remote import Remote
from fedlora.engines.serial import Serial

ENGINES: dict[str, type[Engine]] = {"serial": Serial, "flower-simulation": Remote}
"""What ``fedlora run --engine`` takes; real sites are reached by ``fedlora serve``."""

__all__ = ["ENGINES", "Engine", "Serial"]

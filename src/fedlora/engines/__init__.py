"""The slot ``Engine`` and its table."""

from __future__ import annotations

from fedlora.engines.base import Engine
from fedlora.engines.serial import Serial

ENGINES: dict[str, type[Engine]] = {"serial": Serial}

__all__ = ["ENGINES", "Engine", "Serial"]

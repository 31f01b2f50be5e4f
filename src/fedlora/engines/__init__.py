"""The slot ``Engine`` and its table.

Names are imported when they are first used: Flower's own processes live in here too, and need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.engines.base import Engine
    from fedlora.engines.serial import Serial

    ENGINES: dict[str, type[Engine]]
    """What ``fedlora run --engine`` takes; real sites are reached by ``fedlora serve``."""

__all__ = ["ENGINES", "Engine", "Serial"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedlora.engines' has no attribute {name!r}")
    from fedlora.engines.base import Engine
    from fedlora.engines.remote import Remote
    from fedlora.engines.serial import Serial

    globals().update(Engine=Engine, Serial=Serial, ENGINES={"serial": Serial, "flower-simulation": Remote})
    return globals()[name]

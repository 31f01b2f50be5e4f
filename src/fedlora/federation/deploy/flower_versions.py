"""The tested versions of Flower, and the error for all others."""

from __future__ import annotations

from importlib import metadata

from fedlora.core.errors import ConfigError

PUBLIC = ("1.29", "2")
"""Versions of Flower whose public interface ``flower/app.py`` uses: minimum (inclusive) and maximum (exclusive)."""
PRIVATE = ("1.41", "1.43")
"""Versions whose internals the other files of ``flower/`` and ``deploy/simulate.py`` rely on, likewise."""


def check_flower(versions: tuple[str, str]) -> None:
    """Refuses to start if Flower is missing or its version is untested.

    Args:
        versions: minimum (inclusive) and maximum (exclusive).

    Raises:
        ConfigError: saying what to install.
    """
    try:
        found = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        raise ConfigError("Flower is not installed; pip install 'fedlora[flower]'") from None
    first, beyond = (tuple(map(int, text.split("."))) for text in versions)
    have = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:3])
    if not first <= have < beyond:
        raise ConfigError(
            f"Flower {found} is installed, and this needs {versions[0]} or newer, below {versions[1]}; "
            "pip install 'fedlora[flower]'"
        )

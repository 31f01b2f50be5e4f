"""Which versions of Flower were tried, and a sentence for all others."""

from __future__ import annotations

from importlib import metadata

from fedlora.core.errors import ConfigError

PUBLIC = ("1.29", "2")
"""Versions of Flower whose public interface ``flower/app.py`` speaks: from, and below."""
PRIVATE = ("1.41", "1.42")
"""Versions whose insides the other files of ``flower/`` and ``deploy/simulate.py`` know: from, and below."""


def check_flower(versions: tuple[str, str]) -> None:
    """Refuses to start with a Flower that is not there, or of a version that was not tried.

    Args:
        versions: from, and below.

    Raises:
        ConfigError: telling what to install.
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

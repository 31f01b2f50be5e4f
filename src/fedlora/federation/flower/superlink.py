"""Flower's SuperLink, fixed for paths with spaces: ``python -m fedlora.federation.flower.superlink ARGUMENTS``.

Unpatched, it splits its installation path at spaces, and its database is then created without tables.
"""

from __future__ import annotations

from typing import Any

from flwr.supercore.state.alembic import utils
from flwr.superlink.cli import flower_superlink

_configured = utils.build_alembic_config


def _whole_paths(engine: Any) -> Any:
    """The configuration of the database migrations, with a path separator that cannot occur in a path."""
    config = _configured(engine)
    for option in ("path_separator", "version_path_separator"):
        config.set_main_option(option, "os")
    return config


def main() -> None:
    """Starts the SuperLink."""
    vars(utils)["build_alembic_config"] = _whole_paths
    flower_superlink()


if __name__ == "__main__":
    main()

"""Flower's SuperLink where paths have spaces: ``python -m fedlora.federation.flower.superlink ARGUMENTS``.

By itself it splits the path of its own installation at spaces, and then its database has no tables.
"""

from __future__ import annotations

from typing import Any

from flwr.supercore.state.alembic import utils
from flwr.superlink.cli import flower_superlink

_configured = utils.build_alembic_config


def _whole_paths(engine: Any) -> Any:
    """The configuration of the database's migrations, with paths apart by what no path has in it."""
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

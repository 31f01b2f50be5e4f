"""Experiment trackers to which a run's figures are sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from fedlora.core.component import MODEL_CONFIG, Field, dataclass


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Track:
    """A tracker, which receives the configuration, every row of the ledger, the result and the adapter.

    Args:
        kind: its name, as in ``fedlora list track``, or ``package.module:Class``.
        project: the project or experiment in the tracker.
        name: the run's name there; the name of the run's folder if absent.
        options: further arguments of the tracker's own start function, such as ``mode = "offline"`` for W&B.
    """

    kind: str
    project: str = "fedlora"
    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


def as_tracks(value: Any) -> Any:
    """A single tracker as a sequence of one; anything else unchanged."""
    return (value,) if isinstance(value, Track | Mapping) else value


Tracks = Annotated[tuple[Track, ...], BeforeValidator(as_tracks, json_schema_input_type=Track | tuple[Track, ...])]
"""Several trackers, or a single one."""

"""What every configurable thing shares: ``@dataclass(frozen=True, kw_only=True, config=STRICT)`` of pydantic."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
"""Unknown fields are errors and wrong values are refused, from TOML and from Python alike."""


def by_kind(union: Any) -> dict[str, Any]:
    """The classes of ``Annotated[A | B, Field(discriminator="kind")]`` by their ``kind``, in its order."""
    return {cls.kind: cls for cls in get_args(get_args(union)[0])}

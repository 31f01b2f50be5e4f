"""What every configurable thing shares: ``@dataclass(frozen=True, kw_only=True, config=STRICT)`` of pydantic."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
"""Unknown fields are errors and wrong values are refused, from TOML and from Python alike."""

"""The one decorator behind every configurable thing: a frozen, keyword-only, validated dataclass."""

from __future__ import annotations

import functools

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

component = functools.partial(
    dataclass, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False)
)
"""Frozen, so that a value can be hashed, compared and saved; unknown fields are errors; wrong values are refused."""

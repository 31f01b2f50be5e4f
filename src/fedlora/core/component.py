"""The base of setting dataclasses: ``@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

__all__ = [
    "MODEL_CONFIG",
    "Count",
    "Field",
    "Fraction",
    "NonNegative",
    "Part",
    "Positive",
    "Share",
    "Whole",
    "by_kind",
    "dataclass",
    "without_defaults",
]

MODEL_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
"""Unknown fields and invalid values are refused, from TOML and from Python alike."""

Count = Annotated[int, Field(ge=1)]
"""1, 2, 3 and so on."""
Whole = Annotated[int, Field(ge=0)]
"""0, 1, 2 and so on."""
Positive = Annotated[float, Field(gt=0)]
"""Above 0."""
NonNegative = Annotated[float, Field(ge=0)]
"""0 or more."""
Share = Annotated[float, Field(gt=0, le=1)]
"""Above 0, at most 1."""
Fraction = Annotated[float, Field(gt=0, lt=1)]
"""Above 0 and below 1."""
Part = Annotated[float, Field(ge=0, lt=1)]
"""0 or more, below 1."""


def by_kind(union: Any) -> dict[str, Any]:
    """The classes of ``Annotated[A | B, Slot(...)]`` by their ``kind``, in its order."""
    return {cls.kind: cls for cls in get_args(get_args(union)[0])}


def without_defaults(value: Any, write: Callable[[Any], dict[str, Any]], later: tuple[str, ...]) -> dict[str, Any]:
    """A component as TOML values, without the keys of ``later`` that have their defaults.

    Versions without these keys wrote the same, so that configurations keep their digests. For a component's wrapping
    ``model_serializer``.

    Args:
        value: the component.
        write: pydantic's own serializer.
        later: keys that were added after the component was first released.
    """
    written = write(value)
    fields = {field.name: field for field in dataclasses.fields(value)}
    for name in later:
        field = fields[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(value, name) == default:
            written.pop(name, None)
    return written

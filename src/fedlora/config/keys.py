"""The dotted keys of a configuration, and suggestions for mistyped ones."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.config.experiment import Experiment
from fedlora.config.explain import bare_type, fields_of, members_of
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS
from fedlora.recipe import Recipe

TOP = (*(field.name for field in dataclasses.fields(Experiment)), "method")
"""The top-level keys of a configuration."""


def check_key(path: str, document: Mapping[str, Any]) -> None:
    """Rejects a key whose first part is unknown, if the key exists elsewhere or resembles a top-level key.

    Args:
        path: the dotted key.
        document: the document it is meant for; an argument of its method may be the closer match.

    Raises:
        ConfigError: naming the keys that may be meant.
    """
    first, dot, rest = path.partition(".")
    if first in (*TOP, *_keys_of_methods()):
        return
    meant = [key for key in _dotted_keys() if key.endswith(f".{path}")]
    if not meant:
        near = difflib.get_close_matches(first, [*TOP, *_keys_of(document)], n=1)
        if not near or near[0] not in TOP:
            return
        meant = [near[0] + dot + rest]
    raise ConfigError(
        f"unknown key {path!r}, did you mean {' or '.join(map(repr, meant[:4]))}; known here: {', '.join(TOP)}, and "
        "the keys of the method"
    )


def _keys_of(document: Mapping[str, Any]) -> list[str]:
    """The keys accepted by the method of a document."""
    method = document.get("method")
    function = METHODS.get(str(method.get("kind"))) if isinstance(method, Mapping) else None
    return [*(inspect.signature(function).parameters if function else ()), *inspect.signature(Recipe).parameters]


@functools.cache
def _keys_of_methods() -> frozenset[str]:
    """The keys accepted by any method."""
    own = {name for function in METHODS.values() for name in inspect.signature(function).parameters}
    return frozenset({"kind", "preset", *own, *inspect.signature(Recipe).parameters})


@functools.cache
def _dotted_keys() -> tuple[str, ...]:
    """Every nested key of a configuration and of a recipe, for every possible value of its slots."""
    return tuple(dict.fromkeys((*_below(Experiment, "", ()), *_below(Recipe, "", ()))))


def _below(kind: Any, prefix: str, above: tuple[Any, ...]) -> Iterator[str]:
    bare = bare_type(kind)
    for member in members_of(bare) or (bare,):
        # a data source may contain another one
        if dataclasses.is_dataclass(member) and member not in above:
            for name, inner in fields_of(member).items():
                yield prefix + name
                yield from _below(inner, f"{prefix}{name}.", (*above, member))

"""The part of a configuration that differs from the defaults."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.config.experiment import parse, resolved
from fedlora.core.errors import ConfigError


def essential(document: Mapping[str, Any]) -> dict[str, Any]:
    """A minimal document that parses to the same experiment: every key that can be omitted is removed.

    Keys are removed one at a time, whole tables first, and a removal is kept only if the document still parses to the
    same experiment; no other rule applies.

    Args:
        document: the content of a TOML file.

    Raises:
        ConfigError: the document cannot be read.
    """
    wanted = resolved(parse(document))
    kept = copy.deepcopy(dict(document))
    for table, key in _entries(kept):
        value = table.pop(key)
        if not _says(kept, wanted):
            table[key] = value
    return kept


def _says(document: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    try:
        return resolved(parse(document)) == wanted
    except ConfigError:
        return False


def _entries(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every key of a document with its enclosing table, parents first; children of removed keys are skipped."""
    if isinstance(value, list):
        for one in value:
            yield from _entries(one)
    elif isinstance(value, dict):
        for key in [*value]:
            yield value, key
            # parts of a key that was kept may still be removable
            if key in value:
                yield from _entries(value[key])

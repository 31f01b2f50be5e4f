"""What of a configuration is not at its default."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from fedlora.config.experiment import parse, resolved
from fedlora.core.errors import ConfigError


def essential(document: Mapping[str, Any]) -> dict[str, Any]:
    """The least of a document that still says the same: what can be left out is.

    Keys are tried one by one, whole tables first, so the result follows from no rule but that it is read as the same
    experiment.

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
    """Every key of a document with the table that it is in, each before what is below it, unless it was taken out."""
    if isinstance(value, list):
        for one in value:
            yield from _entries(one)
    elif isinstance(value, dict):
        for key in [*value]:
            yield value, key
            # what was kept may have parts that can go
            if key in value:
                yield from _entries(value[key])

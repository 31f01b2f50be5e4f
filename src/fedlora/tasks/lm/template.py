"""Prompts written from the columns of a row: ``{column}`` in a template, and ``{{`` and ``}}`` for braces."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedlora.core.errors import ConfigError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_PLAIN = {"{{": "{", "}}": "}"}


def columns_of(template: str) -> list[str]:
    """The columns that a template names, each once, in order.

    Raises:
        ConfigError: a brace is neither around a name nor doubled, or no column or the answer is named.

    >>> columns_of("{instruction} {{json}} {input} {instruction}")
    ['instruction', 'input']
    """
    names: dict[str, None] = {}
    for piece in _PIECE.finditer(template):
        if piece[1] is not None:
            names[piece[1]] = None
        elif piece[0] not in _PLAIN:
            raise ConfigError(
                f"task.template = {template!r} has the brace {piece[0]!r} at character {piece.start()}, which is not "
                "around the name of a column: write {{ or }} for a brace that is text"
            )
    if "answer" in names:
        raise ConfigError(
            f"task.template = {template!r} has the answer in the text before the answer: take {{answer}} out of it"
        )
    if not names:
        raise ConfigError(
            f"task.template = {template!r} has no place for the prompt: put {{prompt}} or another column into it, or "
            "use chat"
        )
    return list(names)


def filled(template: str, row: Mapping[str, str]) -> str:
    """A template with the values of a row; braces in values mean nothing.

    >>> filled("{a} {{a}} {b}", {"a": "{b}", "b": "2"})
    '{b} {a} 2'
    """
    return _PIECE.sub(lambda piece: _PLAIN[piece[0]] if piece[1] is None else row[piece[1]], template)

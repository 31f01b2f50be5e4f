"""Reads docstrings, for tables and schemas generated from them."""

from __future__ import annotations

import inspect
import re
from typing import Any

__all__ = ["arguments", "first_sentence"]


def first_sentence(value: Any) -> str:
    """The first paragraph of a docstring as one line without markup; empty if there is none."""
    return _plain((inspect.getdoc(value) or "").split("\n\n")[0])


def arguments(value: Any) -> dict[str, str]:
    """The description of each argument under ``Args``, as one line without markup.

    Args:
        value: a function or a class; arguments that a class does not describe are read from its bases.
    """
    found: dict[str, str] = {}
    for one in reversed(inspect.getmro(value)) if inspect.isclass(value) else [value]:
        section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.cleandoc(one.__doc__ or ""), re.MULTILINE)
        entries = re.findall(r"^    (\w+): (.*\n?(?:     .*\n?)*)", section.group(1) if section else "", re.MULTILINE)
        found |= {name: _plain(text) for name, text in entries}
    return found


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("``", "")

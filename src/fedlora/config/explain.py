"""Pydantic validation errors as sentences that name the key, the closest known key, and all known keys."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any

from pydantic import ValidationError


def explain(error: ValidationError, root: Any, prefix: str, beside: Sequence[str] = ()) -> str:
    """The first five problems as sentences.

    Args:
        error: the error raised by pydantic.
        root: the class or function that was validated.
        prefix: the dotted path to it; empty at the top level.
        beside: keys accepted at the top level in addition to its fields.
    """
    sentences = []
    problems = error.errors(include_url=False)
    # rejected entries are not counted, so the list is reported as too short too, which is not a second mistake
    problems = [one for one in problems if one["type"] != "too_short"] or problems
    for problem in problems[:5]:
        location = problem["loc"]
        path, fields, kind = _walk(root, location)
        dotted = ".".join(filter(None, [prefix, *path]))
        if problem["type"] == "unexpected_keyword_argument":
            wrong = str(location[-1])
            known = [*fields] if path[1:] else [*fields, *beside]
            meant = _below(wrong, fields) or nearest(wrong, known)
            sentences.append(f"unknown key {dotted!r}{meant}; known here: {', '.join(known)}")
        elif problem["type"] == "union_tag_invalid":
            tags = str(problem["ctx"]["expected_tags"])
            wrong = str(problem["ctx"]["tag"])
            names = [tag.strip().strip("'") for tag in tags.split(",")]
            sentences.append(
                f"{dotted}.kind = {wrong!r} is not known{nearest(wrong, names)}; known: {', '.join(names)}"
            )
        elif problem["type"] == "union_tag_not_found":
            kinds = ", ".join(member.kind for member in members_of(kind))
            sentences.append(f"{dotted} needs a kind, one of: {kinds}")
        elif problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            sentences.append(f"{dotted} is missing")
        else:
            sentences.append(f"{dotted} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "; ".join(sentences)


def nearest(wrong: str, known: Sequence[str]) -> str:
    """``, did you mean 'x'`` if a known key resembles ``wrong``; empty otherwise."""
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}" if near else ""


def _below(wrong: str, fields: Mapping[str, Any]) -> str:
    """``, did you mean 'x.wrong'`` if values of the fields have that key; empty otherwise."""
    kinds = {name: bare_type(inner) for name, inner in fields.items()}
    meant = [
        name for name, kind in kinds.items() if any(wrong in fields_of(one) for one in members_of(kind) or (kind,))
    ]
    return f", did you mean {' or '.join(repr(f'{name}.{wrong}') for name in meant[:3])}" if meant else ""


def _walk(kind: Any, location: Sequence[int | str]) -> tuple[list[str], dict[str, Any], Any]:
    """An error's dotted path without the tags inserted by unions, the fields known at its last step, and its type."""
    path: list[str] = []
    fields = fields_of(kind)
    for step in location:
        fields = fields_of(kind)
        members = members_of(kind)
        if members and not fields:
            # a union of components inserts the tag of the chosen one into the path
            chosen = [member for member in members if getattr(member, "kind", None) == step]
            kind = chosen[0] if chosen else kind
            continue
        path.append(str(step))
        kind = bare_type(typing.get_args(kind)[0] if isinstance(step, int) else fields.get(step, Any))
    return path, fields, kind


def bare_type(kind: Any) -> Any:
    """A type without its metadata, and without None if exactly one other type remains."""
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    members = [member for member in members_of(kind) if member is not type(None)]
    return bare_type(members[0]) if len(members) == 1 else kind


def members_of(kind: Any) -> tuple[Any, ...]:
    """The member types of a union; empty for any other type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (UnionType, typing.Union) else ()


def fields_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields or of a function's arguments, by name; empty for anything else."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    if inspect.isfunction(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {name: hints[name] for name in inspect.signature(kind).parameters}
    return {}

"""Rows of JSON files: JSON lines, a list of rows, rows under a key, and the official form of SQuAD."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedlora.core.errors import DataError, shown
from fedlora.core.later import datasets
from fedlora.tasks.data.opening import Reading, read_lines
from fedlora.tasks.data.tables import DEEPEST, of_objects

Rows = Iterator[tuple[str, Any]]
"""Where each row is, and the row."""


def read_json(file: Path, reading: Reading, by_line: bool) -> datasets.Dataset:
    """The rows of a JSON file; NaN is a missing value.

    Args:
        file: the file.
        reading: how it is read.
        by_line: whether a file of one object is one row, as in JSON lines; else that object may have rows under a key.

    Raises:
        DataError: it is not JSON, or does not hold rows.
    """
    name = str(file)
    if by_line:
        first = next((line for line in read_lines(file, reading) if line.strip()), "")
        by_line = not first.lstrip().startswith("[")
    value = _LINES if by_line else _document("".join(read_lines(file, reading, any_length=True)), name)
    rows = _by_line(read_lines(file, reading), name) if value is _LINES else _below(value, name)
    return of_objects(_expanded(rows, name), name)


_LINES: Any = object()


def _document(text: str, name: str) -> Any:
    """The one value of a document, or ``_LINES`` if another value follows the first."""
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _LINES
        raise _no_json(error, f"line {error.lineno}", name) from error
    except (ValueError, RecursionError) as error:
        raise _no_json(error, "the content", name) from error


def _by_line(lines: Iterable[str], name: str) -> Rows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"line {number}"
            try:
                yield where, _parsed(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(error, where, name) from error


def _below(value: Any, name: str) -> Rows:
    """The rows of a document: a list, or what an object has under its one key with objects."""
    if isinstance(value, dict):
        keys = [] if any(map(_is_chat, value.values())) else [key for key in value if _are_objects(value[key])]
        if len(keys) > 1:
            raise DataError(
                f"'{name}' has rows under several keys ({', '.join(keys)}), but they are read from one: write a file "
                "for each"
            )
        value = value[keys[0]] if keys else [value]
    if not isinstance(value, list):
        raise DataError(
            f"'{name}' holds {shown(value)}, but rows were expected: write a list of objects, or one on each line"
        )
    return ((f"row {number}", row) for number, row in enumerate(value))


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)


def _is_chat(value: Any) -> bool:
    """Whether a value is the turns of a conversation, which are objects but no rows."""
    return _are_objects(value) and any(
        isinstance(one, dict) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
        for one in value
    )


def _expanded(rows: Rows, name: str) -> Rows:
    """The questions of articles in the form that SQuAD is published in; other rows unchanged."""
    for where, row in rows:
        paragraphs: Any = row.get("paragraphs") if isinstance(row, dict) else None
        if _are_objects(paragraphs) and any("qas" in one for one in paragraphs):
            yield from ((where, question) for question in _questions(row, where, name))
        else:
            yield where, row


def _questions(article: dict[str, Any], where: str, name: str) -> Iterator[dict[str, Any]]:
    try:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                found = asked.get("answers")
                yield {
                    "id": asked.get("id"),
                    "title": article.get("title"),
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": found if found is None else _columns(found),
                }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} of '{name}' has paragraphs, but not in SQuAD's form (paragraphs, each with context and qas, each "
            "of these with question and answers): correct it, or write rows with context, question and answers"
        ) from error


def _columns(answers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [one[key] for one in answers] for key in ("text", "answer_start")}


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(one for one in names if names.count(one) > 1)!r} stands twice in one object")
    return found


# one for all lines: json.loads() would make one for each
_parsed = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_object).decode


def _no_json(error: Exception, where: str, name: str) -> DataError:
    if isinstance(error, RecursionError):
        return DataError(
            f"{where} of '{name}' has more than {DEEPEST} lists or objects inside each other, which no row needs: "
            "correct it"
        )
    reason = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(
        f"'{name}' cannot be read as json ({where}: {reason}): correct the file or use the ending of its format"
    )

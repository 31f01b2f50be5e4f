"""Tables of rows whose columns get one type each from all of their values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from fedlora.core.errors import DataError
from fedlora.core.later import datasets, pyarrow
from fedlora.tasks.data.opening import LONGEST_ROW

DEEPEST = 64
"""The most lists and objects inside each other in a row."""

_ROWS = 20_000
_CHARACTERS = 64 << 20
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def of_fields(names: Sequence[str], rows: Iterable[Sequence[str | None]]) -> datasets.Dataset:
    """A table of text alone, as of a csv.

    Its columns are ``large_string``, by which ``columns.typed`` finds text that may stand for numbers.

    Args:
        names: of the columns.
        rows: the fields of each row; None is a missing value.
    """
    text = pyarrow.large_string()
    chunks, pending, size = [], [], 0
    for row in rows:
        pending.append(row)
        size += sum(len(field) for field in row if field)
        if len(pending) == _ROWS or size > _CHARACTERS:
            chunks.append([pyarrow.array(column, text) for column in zip(*pending, strict=True)])
            pending, size = [], 0
    if pending:
        chunks.append([pyarrow.array(column, text) for column in zip(*pending, strict=True)])
    columns = [pyarrow.chunked_array([chunk[place] for chunk in chunks], text) for place in range(len(names))]
    return dataset_of(pyarrow.table(dict(zip(names, columns, strict=True))))


def of_objects(rows: Iterable[tuple[str, Any]], name: str) -> datasets.Dataset:
    """A table of rows that are dicts; a key that a row lacks is a missing value.

    A column of lists or objects that do not share one type holds each value as JSON text.

    Args:
        rows: where each row is, for messages, and the row.
        name: of the file, for messages.

    Raises:
        DataError: a row is no dict, too deep or too long, or a column mixes types.
    """
    columns: dict[str, _Column] = {}
    count, pending, size = 0, [], 0
    for where, row in rows:
        size += _characters(row, where, name)
        pending.append(row)
        if len(pending) == _ROWS or size > _CHARACTERS:
            _extend(columns, pending, count, name)
            count, pending, size = count + len(pending), [], 0
    _extend(columns, pending, count, name)
    count += len(pending)
    return dataset_of(pyarrow.table({key: column.whole(count) for key, column in columns.items()}))


def dataset_of(table: Any) -> datasets.Dataset:
    """A ``pyarrow.Table`` in memory as a ``datasets.Dataset``."""
    # else its fingerprint, which names files that nothing here writes, would be a hash of all rows
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=fingerprint)


def _extend(columns: dict[str, _Column], rows: Sequence[dict[str, Any]], before: int, name: str) -> None:
    for key in dict.fromkeys(key for row in rows for key in row):
        columns.setdefault(key, _Column(key, name)).add([row.get(key) for row in rows], before)


class _Column:
    """The values of a column, in blocks of rows that each have a type.

    Args:
        key: its name.
        file: the file's name, for messages.
    """

    def __init__(self, key: str, file: str) -> None:
        self._key, self._file = key, file
        self._blocks: list[Any] = []
        self._rows = 0
        self._first: dict[str, int] = {}

    def add(self, values: list[Any], before: int) -> None:
        """Adds the values of rows, the first of which is row number ``before``."""
        if before > self._rows:
            self._append(pyarrow.nulls(before - self._rows))
        kinds = list(map(type, values))
        for kind in dict.fromkeys(kinds):
            if kind is not type(None):
                self._first.setdefault(_KINDS[kind], before + kinds.index(kind))
        if len(self._first) > 1 and not self._first.keys() <= {"a list", "an object"}:
            raise self._mixed()
        self._append(self._block(values))

    def whole(self, count: int) -> Any:
        """All of them as one ``pyarrow.ChunkedArray`` of ``count`` rows."""
        if count > self._rows:
            self._append(pyarrow.nulls(count - self._rows))
        one = self._common() if len(self._first) < 2 else None
        if one is None:
            nested = [block.to_pylist() for block in self._blocks]
            return pyarrow.chunked_array([_as_json(block) for block in nested], pyarrow.string())
        return pyarrow.chunked_array([block.cast(one) for block in self._blocks], one)

    def _block(self, values: list[Any]) -> Any:
        kinds = {type(value) for value in values if value is not None}
        try:
            return pyarrow.array(values)
        except pyarrow.ArrowException:
            if kinds <= {list, dict}:
                return _as_json(values)
            raise self._unfit() from None
        except (OverflowError, UnicodeError):
            raise self._unfit() from None

    def _append(self, block: Any) -> None:
        self._blocks += block.chunks if isinstance(block, pyarrow.ChunkedArray) else [block]
        self._rows += len(block)

    def _common(self) -> Any:
        """The type that all blocks can have, or None if there is none."""
        schemas = [pyarrow.schema([("x", block.type)]) for block in self._blocks]
        try:
            return pyarrow.unify_schemas(schemas, promote_options="permissive").field("x").type
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            return None

    def _mixed(self) -> DataError:
        (one, first), (other, second), *_ = self._first.items()
        return DataError(
            f"column '{self._key}' of '{self._file}' holds {one} in row {first} and {other} in row {second}, but all "
            "values of a column have one type: write them alike"
        )

    def _unfit(self) -> DataError:
        return DataError(
            f"column '{self._key}' of '{self._file}' has a number beyond 64 bits or half of a surrogate pair, which no "
            "table can hold: write it as text, or correct it"
        )


def _as_json(values: list[Any]) -> Any:
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pyarrow.array(texts, pyarrow.string())


def _characters(row: Any, where: str, name: str) -> int:
    """The characters of a row's texts, after a look at its form."""
    if not isinstance(row, dict):
        raise DataError(
            f"{where} of '{name}' is {_KINDS.get(type(row), 'empty')}, but a row is an object, as in "
            '{"text": "...", "label": "..."}: write each row so'
        )
    total, level = 0, []
    for value in row.values():
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, list | dict):
            level.append(value)
    if total > LONGEST_ROW:
        raise DataError(
            f"{where} of '{name}' has more than {LONGEST_ROW:,} characters, but a row is no longer than that: split or "
            "remove it"
        )
    # the row itself is the first of them
    for _ in range(DEEPEST - 1):
        if not level:
            return total
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    raise DataError(
        f"{where} of '{name}' has more than {DEEPEST} lists or objects inside each other, which no row needs: "
        "correct it"
    )

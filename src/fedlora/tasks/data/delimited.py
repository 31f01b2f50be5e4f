"""Rows of csv and tsv files, all fields as text."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.core.errors import DataError, shown
from fedlora.core.later import datasets
from fedlora.tasks.data.opening import LONGEST_ROW, Reading, read_lines
from fedlora.tasks.data.tables import of_fields

_END = "\0end of file\0"
_OTHERS = {";": ";", "\t": "\\t", "|": "|", ",": ","}
_UNNAMED = "Unnamed: "
_WEB_PAGE = re.compile(r"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_EXCEL = re.compile(r"sep=(.)\s*", re.IGNORECASE)


def read_delimited(file: Path, reading: Reading, delimiter: str) -> datasets.Dataset:
    """The rows below a header; an empty field is a missing value.

    Blanks around names in the header are cut, and those before fields too where the header has them after delimiters.
    Empty lines are skipped, and empty fields beyond the header ignored.

    Args:
        file: the file.
        reading: how it is read.
        delimiter: the character between fields, unless ``reading`` names one.

    Raises:
        DataError: a name stands twice in the header, or a row has more or fewer fields than it.
    """
    lines = read_lines(file, reading, newline="")
    first = next(lines, "")
    if reading.delimiter is None and (excel := _EXCEL.fullmatch(first)):
        delimiter, first, skipped = excel[1], next(lines, ""), 1
    else:
        delimiter, skipped = reading.delimiter or delimiter, 0
    if not first:
        return of_fields([], [])
    if _WEB_PAGE.match(first):
        raise DataError(f"'{file}' is a web page, as a failed download leaves it: fetch the file again")
    rows = _fields(first, lines, delimiter, file, skipped)
    _, header = next(rows, (1, []))
    names = _names(header, file, delimiter, reading.delimiter is not None)
    return of_fields(names, (_fitted(row, len(names), number, file, delimiter) for number, row in rows))


def _fields(
    first: str, lines: Iterator[str], delimiter: str, file: Path, skipped: int
) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its first line."""

    # the last line becomes part of a field if a quote is open
    ended = itertools.chain([first], lines, [_END])
    blank = any(name.startswith(" ") for name in _header(first, delimiter)[1:])
    reader = csv.reader(ended, delimiter=delimiter, skipinitialspace=blank, strict=True)
    number, row = 1 + skipped, [""]
    with _long_fields():
        try:
            for row in reader:
                if row != [_END] and any(_END in field for field in row):
                    raise _open_quote(number, file)
                if row and row != [_END]:
                    yield number, row
                number = reader.line_num + 1 + skipped
        except csv.Error as error:
            of = _quoted_wrongly if "expected after" in str(error) else _open_quote
            raise of(number, file) from error


def _header(first: str, delimiter: str) -> list[str]:
    """The fields of the first line as they stand; none if it is no line by itself."""
    try:
        return next(csv.reader([first], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return first.split(delimiter)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Permits fields as long as a row within the block; the limit of the ``csv`` module holds for a process."""
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _open_quote(number: int, file: Path) -> DataError:
    return DataError(
        f"line {number} of '{file}' has a quote that is not closed: close it, or write a quote inside a field twice "
        "and the whole field in quotes"
    )


def _quoted_wrongly(number: int, file: Path) -> DataError:
    return DataError(
        f"line {number} of '{file}' has text after the quote that closes a field: write a quote inside a field twice "
        '(""), not as \\", and nothing between the closing quote and the next field'
    )


def _names(header: list[str], file: Path, delimiter: str, chosen: bool) -> list[str]:
    """The columns' names; a column without one is called by its number."""
    if len(header) == 1 and not chosen:
        other = next((one for one in _OTHERS if one != delimiter and one in header[0]), None)
        if other:
            raise DataError(
                f"the header of '{file}' is one field, {shown(header[0])}, since fields are separated by "
                f'{shown(delimiter)}: set data.delimiter = "{_OTHERS[other]}"'
            )
    while header and not header[-1].strip():
        header = header[:-1]
    names = [name.strip() or f"{_UNNAMED}{place}" for place, name in enumerate(header)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"the header of '{file}' has the name {twice[0]!r} twice, but each column needs its own: rename one"
        )
    return names


def _fitted(row: list[str], width: int, number: int, file: Path, delimiter: str) -> list[str | None]:
    """A row's fields, None for empty ones."""
    if len(row) > width and not any(row[width:]):
        row = row[:width]
    if len(row) != width:
        fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
        raise DataError(
            f"line {number} of '{file}' has {fields}, but the header has {width}: put a field that contains "
            f"{shown(delimiter)} in quotes, or complete the row"
        )
    return [field or None for field in row]

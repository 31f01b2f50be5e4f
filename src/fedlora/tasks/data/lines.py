"""Rows of plain text and of CoNLL files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedlora.core.errors import DataError
from fedlora.core.later import datasets
from fedlora.tasks.data.opening import Reading, read_lines
from fedlora.tasks.data.tables import of_objects

_BLANKS = re.compile(r"[ \t]+")


def read_texts(source: Path | IO[bytes], reading: Reading) -> list[str]:
    """The lines of a text file without their ends; lines of blanks alone are left out.

    Raises:
        DataError: it cannot be read as text.
    """
    return [line.removesuffix("\n") for line in read_lines(source, reading) if line.strip()]


def read_text_rows(file: Path, reading: Reading) -> datasets.Dataset:
    """A row with the column ``text`` for each line that is not blank, as ``datasets`` reads text.

    Raises:
        DataError: the file cannot be read as text.
    """
    texts = enumerate(read_texts(file, reading))
    return of_objects(((f"row {number}", {"text": text}) for number, text in texts), str(file))


def read_conll(file: Path, reading: Reading) -> datasets.Dataset:
    """A row for each sentence: ``tokens`` is the first column of the file, and ``tags`` the last one.

    Columns are separated by blanks or tabs, sentences by blank lines. The columns between are ``column_2`` and so on.
    Lines ``-DOCSTART-`` and comments before a sentence are left out.

    Raises:
        DataError: a line has more or fewer columns than the first one.
    """
    return of_objects(((f"sentence {number}", one) for number, one in enumerate(_sentences(file, reading))), str(file))


def _sentences(file: Path, reading: Reading) -> Iterator[dict[str, Any]]:
    width = 0
    words: list[list[str]] = []
    for number, line in enumerate(read_lines(file, reading), 1):
        columns = _BLANKS.split(line.strip())
        if columns[0] in ("", "-DOCSTART-"):  # a new document ends a sentence too
            if words:
                yield _sentence(words, width)
            words = []
        elif not words and _is_comment(columns, width):
            continue
        elif len(columns) != (width := width or len(columns)) or width == 1:
            raise DataError(
                f"line {number} of '{file}' has {len(columns)} columns, but each word is on a line with its tag, and "
                f"all lines have {max(2, width)} columns: correct the line"
            )
        else:
            words.append(columns)
    if words:
        yield _sentence(words, width)


def _is_comment(columns: list[str], width: int) -> bool:
    """Whether a line before a sentence is a comment: the word ``#`` with as many columns as others is none."""
    return columns[0].startswith("#") and (len(columns) != (width or 2) or "=" in columns[-1])


def _sentence(words: list[list[str]], width: int) -> dict[str, Any]:
    names = ["tokens", *(f"column_{place}" for place in range(2, width)), "tags"]
    return dict(zip(names, map(list, zip(*words, strict=True)), strict=True))

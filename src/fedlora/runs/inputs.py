"""Inputs for predictions: a text, the rows of a data file, the lines of a text file, or standard input."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from fedlora.core.errors import DataError
from fedlora.tasks import Prepared
from fedlora.tasks.data.columns import rename
from fedlora.tasks.data.files import is_data_file, read_rows
from fedlora.tasks.data.folders import PICTURES
from fedlora.tasks.data.lines import read_texts
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.data.tables import of_objects


def read_inputs(given: str, task: Prepared, columns: Mapping[str, str], reading: Reading) -> list[str]:
    """The inputs that an argument of the command line stands for.

    Args:
        given: ``-`` for standard input; a file that ``Files`` reads; a text file with an input per line; a picture,
            which is an input itself, as is anything that is no file.
        task: takes inputs from rows.
        columns: column name used by the task -> name in the file, if different.
        reading: how files are read.

    Raises:
        DataError: the file does not exist, cannot be read, or is empty.
    """
    if given == "-":
        inputs = _standard_input(task, columns, reading)
    elif (file := _file(given)) is None:
        inputs = [_text(given)] if given.strip() else []
    elif is_data_file(file) or reading.format not in (None, "txt"):
        inputs = task.inputs_of(rename(read_rows(str(file), reading, "test"), columns, given), given)
    else:
        inputs = read_texts(file, reading)
    if not inputs:
        raise DataError("there is no text to predict; give a text, or a file with a text per line")
    return inputs


def _file(given: str) -> Path | None:
    """The file that an argument names, or None if it is an input itself."""
    file = Path(given)
    try:
        file = file.expanduser()
        if file.is_file() or (file.is_dir() and is_data_file(file)):
            return None if file.suffix.lower() in PICTURES else file
        is_name = (file.suffix.lower() == ".txt" or is_data_file(file)) and not given.split()[1:]
    except (OSError, ValueError, RuntimeError):  # a text that is too long for a name, or holds what no name does
        return None
    if is_name:
        raise DataError(f"there is no file {given}; name one with an input per line, or give the input itself")
    return None


def _text(given: str) -> str:
    """An argument as text: in the locale C, Python does not decode bytes beyond ASCII."""
    try:
        return given.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise DataError(
            f"the input {given[:60]!a} is no UTF-8 text, which an input is: write it so, or into a file and name "
            "its --encoding"
        ) from error


def _standard_input(task: Prepared, columns: Mapping[str, str], reading: Reading) -> list[str]:
    """The rows of JSON lines, if each line is an object and the task reads it as a row; else a text on each line."""
    if sys.stdin is None:
        raise DataError("standard input is closed, but inputs were to be read from it; name a file, or give the input")
    lines = read_texts(io.BufferedReader(io.BytesIO(sys.stdin.buffer.read())), reading)
    try:
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return lines
    if not rows or not all(isinstance(row, dict) for row in rows):
        return lines
    table = of_objects(((f"line {number}", row) for number, row in enumerate(rows, 1)), "standard input")
    return task.inputs_of(rename(table, columns, "standard input"), "standard input")

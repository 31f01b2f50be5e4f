"""Rows of local files of every format, of several files, and of folders written by ``save_to_disk``."""

from __future__ import annotations

import difflib
import glob
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from fedlora.core.errors import DataError, first_line
from fedlora.core.files import new_file
from fedlora.core.later import datasets, pyarrow
from fedlora.tasks.data.columnar import check_arrow, check_parquet
from fedlora.tasks.data.columns import class_names
from fedlora.tasks.data.delimited import read_delimited
from fedlora.tasks.data.json_rows import read_json
from fedlora.tasks.data.lines import read_conll, read_text_rows
from fedlora.tasks.data.opening import Reading, open_bytes
from fedlora.tasks.data.tables import dataset_of

Reader = Callable[[Path, Reading], Any]


def read_rows(paths: str | Sequence[str], reading: Reading, split: str = "train") -> datasets.Dataset:
    """The rows of one or several files in one of ``FORMATS``.

    Args:
        paths: files, patterns such as ``part-*.jsonl`` whose files are read in sorted order, or folders written by
            ``save_to_disk``; ``~`` is the home folder.
        reading: how files are read.
        split: the split of a ``DatasetDict``.

    Raises:
        DataError: there is no such file, it cannot be read, is named twice, has no rows, or has other columns than the
            others.
    """
    given = [paths] if isinstance(paths, str) else paths
    files = [file for path in given for file in _matching(path)]
    if twice := [file for file, count in Counter(file.absolute() for file in files).items() if count > 1]:
        raise DataError(
            f"'{twice[0]}' is named twice, by itself or by a pattern, and each of its rows would count twice: name it "
            "once"
        )
    parts = [(file, _rows_of(file, reading, split)) for file in files]
    return parts[0][1] if len(parts) == 1 else _joined(parts)


def is_data_file(path: Path) -> bool:
    """Whether a path is that of a file or folder with rows, by its ending or content, ``.txt`` excepted."""
    return is_saved(path) or _ending(path) in FORMATS.keys() - {".txt"}


def is_saved(path: Path) -> bool:
    """Whether a path is a folder that ``save_to_disk`` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_splits(path: str) -> list[str]:
    """The names of the splits in a folder that ``DatasetDict.save_to_disk`` wrote; none for anything else."""
    folder = Path(path).expanduser()
    if not (folder / "dataset_dict.json").is_file():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())


def _matching(path: str) -> list[Path]:
    """The files that a path or pattern stands for."""
    file = Path(path).expanduser()
    if file.is_file() or is_saved(file):
        return [file]
    if file.is_dir():
        raise DataError(
            f"'{path}' is a folder, but not one that save_to_disk wrote: name its files, as in '{path.rstrip('/')}/"
            "*.jsonl'"
        )
    if os.path.lexists(file):
        what = (
            "is a link to a file that is not there" if file.is_symlink() and not file.exists() else "is no plain file"
        )
        raise DataError(f"'{path}' {what}, but rows were to be read from it: name a file")
    if any(one in path for one in "*?["):
        found = [Path(one) for one in sorted(glob.glob(str(file), recursive=True))]
        if found := [one for one in found if one.is_file()]:
            return found
        raise DataError(f"no file is called '{path}', but rows were to be read from such: correct the pattern")
    if not path.isprintable():
        raise DataError(
            f"there is no file {path!r}, whose name has a character that a backslash wrote: write the path with / or "
            "in single quotes, '...'"
        )
    near = difflib.get_close_matches(file.name, _names_in(file.parent), n=1)
    hint = f"did you mean '{near[0]}'?" if near else "correct the path"
    raise DataError(f"there is no file '{path}', but rows were to be read from it: {hint}")


def _rows_of(file: Path, reading: Reading, split: str) -> datasets.Dataset:
    if file.is_dir():
        rows = _saved(file, split)
    else:
        ending = _ending(file)
        if reading.format and ending not in FORMATS.keys() - {".txt"}:
            ending = f".{reading.format}"
        if ending not in FORMATS:
            raise DataError(
                f"'{file}' ends in '{file.suffix}', but files are read by their ending: use one of "
                f'{", ".join(FORMATS)}, each also with .gz, or name the format, as in data.format = "csv"'
            )
        if not file.stat().st_size:
            raise DataError(f"'{file}' is empty, but rows were to be read from it: fill it or name another file")
        rows = FORMATS[ending](file, reading)
    if not len(rows):
        what = "has no rows" if rows.column_names else "is empty"
        raise DataError(f"'{file}' {what}, but one row at least is needed: fill it or name another file")
    return rows


def _joined(parts: Sequence[tuple[Path, datasets.Dataset]]) -> datasets.Dataset:
    """The rows of several files, whose columns are the same."""
    (first, one), *others = parts
    for file, rows in others:
        if other := sorted(set(one.column_names) ^ set(rows.column_names)):
            raise DataError(
                f"one of '{first}' and '{file}' has the column '{other[0]}' and the other not, but files that are read "
                "together have the same columns: make them alike"
            )
        if any(class_names(one, name) != class_names(rows, name) for name in one.column_names):
            raise DataError(f"'{first}' and '{file}' declare other classes: use files of one data set")
    try:
        if all(rows.features == one.features for _, rows in others):
            return datasets.concatenate_datasets([rows for _, rows in parts])
        tables = [rows.with_format("arrow")[:] for _, rows in parts]
        return dataset_of(pyarrow.concat_tables(tables, promote_options="permissive").replace_schema_metadata(None))
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"'{first}' and the files after it do not make one table ({first_line(error)}), but a column has one type: "
            "make them alike"
        ) from error


def _saved(folder: Path, split: str) -> datasets.Dataset:
    """The rows of a folder written by ``save_to_disk``, a split of those of a ``DatasetDict``."""
    splits = saved_splits(str(folder))
    if splits and split not in splits:
        if len(splits) > 1:
            raise DataError(
                f"'{folder}' has the splits {', '.join(splits)}, but none called '{split}': name the folder of one, as "
                f"in '{folder / splits[0]}'"
            )
        split = splits[0]
    place = folder / split if splits else folder
    return _by_library(place, "a folder of save_to_disk", lambda: datasets.load_from_disk(str(place)))


def _delimited(delimiter: str) -> Reader:
    return lambda file, reading: read_delimited(file, reading, delimiter)


def _json(by_line: bool) -> Reader:
    return lambda file, reading: read_json(file, reading, by_line)


def _parquet(file: Path, reading: Reading) -> datasets.Dataset:
    def read() -> datasets.Dataset:
        plain = _unpacked(file, reading)
        check_parquet(plain, file, reading)
        # load_dataset() would announce the reader's name to the Hub, and wait for an answer
        return datasets.Dataset.from_parquet(str(plain))

    return _by_library(file, "parquet", read)


def _arrow(file: Path, reading: Reading) -> datasets.Dataset:
    def read() -> datasets.Dataset:
        plain = _unpacked(file, reading)
        if check_arrow(plain, file, reading):
            return dataset_of(pyarrow.ipc.open_file(pyarrow.memory_map(str(plain))).read_all())
        return datasets.Dataset.from_file(str(plain))

    return _by_library(file, "arrow", read)


FORMATS: dict[str, Reader] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".json": _json(by_line=False),
    ".jsonl": _json(by_line=True),
    ".ndjson": _json(by_line=True),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": read_text_rows,
    ".conll": read_conll,
}
"""The reader for each ending, in small letters or large; each may be followed by ``.gz``."""


def _by_library(path: Path, form: str, read: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """What a library reads, its errors as one sentence."""
    try:
        with quiet():
            rows = read()
        rows.data.validate(full=True)  # a damaged text would be found where it is used
        return rows
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            f"'{path}' cannot be read as {form} ({first_line(error.__cause__ or error)}): correct the file or use the "
            "ending of its format"
        ) from error


def _unpacked(file: Path, reading: Reading) -> Path:
    """The file itself, or a plain copy in the cache, named by content: the cache's own copies are named by path."""
    if file.suffix.lower() != ".gz":
        return file.resolve()
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "fedlora"
    target = folder / f"{xxhash.xxh3_128_hexdigest(file.read_bytes())}{_ending(file)}"
    if not target.exists():
        with open_bytes(file, reading) as packed, new_file(target) as temporary, temporary.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return target


def _ending(file: Path) -> str:
    """The ending that names a file's format, in small letters, without ``.gz``."""
    plain = Path(file.stem) if file.suffix.lower() == ".gz" else file
    return plain.suffix.lower()


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


@contextmanager
def quiet() -> Iterator[None]:
    """Disables the progress bars and log lines of ``datasets`` within the block, and restores them afterwards."""
    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()

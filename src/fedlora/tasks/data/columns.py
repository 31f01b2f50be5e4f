"""Rows in the form that tasks need: columns renamed and checked, and test rows held out by content."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fedlora.core.component import Count
from fedlora.core.errors import ConfigError, DataError, shown
from fedlora.core.later import datasets
from fedlora.core.state import named_seed

_SHOWN = 20
"""The most names that a message lists."""
_WHOLE = re.compile(r"\s*(?:0|-?[1-9][0-9]{0,17})\s*")


class Raw(NamedTuple):
    """Rows as returned by a source.

    Args:
        train: training rows.
        test: test rows, or None to hold out part of the training rows.
        test_fraction: the share to hold out.
        seed: seed of the hash that selects it.
        final: share and seed of the final test rows, which are among the training rows and are dropped first; None if
            there are none.
        max_train: the most training rows to keep; None for all.
        max_test: the most test rows to keep; None for all.
    """

    train: datasets.Dataset
    test: datasets.Dataset | None
    test_fraction: float
    seed: int
    final: tuple[float, int] | None = None
    max_train: int | None = None
    max_test: int | None = None

    @property
    def sides(self) -> list[tuple[datasets.Dataset, str]]:
        """The rows that there are, and what to call them in messages."""
        named = ((self.train, "training"), (self.test, "test"))
        return [(rows, which) for rows, which in named if rows is not None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A place that rows come from.

    Args:
        max_train: the most training rows to keep: a draw by the source's seed, in the order of the rows, after test
            rows are held out; None for all.
        max_test: the same for test rows.
    """

    max_train: Count | None = None
    max_test: Count | None = None

    def raw(self) -> Raw:
        """The rows as ``load`` returns them, with the caps on their numbers, which ``split`` applies.

        Raises:
            DataError: see ``load``; or it returned something else.
        """
        raw = self.load()
        if not isinstance(raw, Raw) or not all(isinstance(rows, datasets.Dataset) for rows, _ in raw.sides):
            raise DataError(
                f"load of the source {type(self).__name__} returned {shown(raw)}, but a Raw with a datasets.Dataset on "
                "each side was expected: correct it"
            )
        return raw._replace(max_train=self.max_train or raw.max_train, max_test=self.max_test or raw.max_test)

    @property
    def adds(self) -> frozenset[str]:
        """The columns that are there whether or not a task reads them."""
        return frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what lies there and is not read."""
        return ()

    @abstractmethod
    def load(self) -> Raw:
        """Read the rows.

        Returns:
            The rows as they came, columns under the names that tasks use.

        Raises:
            DataError: if the data are missing, empty or not of the stated form.
        """


class Splits(NamedTuple):
    """Training and test rows in the form that a task asked for."""

    train: datasets.Dataset
    test: datasets.Dataset


def rename(rows: datasets.Dataset, columns: Mapping[str, str], which: str) -> datasets.Dataset:
    """Gives columns the names that tasks use.

    Args:
        rows: the rows as they came.
        columns: name that the task uses -> name in the data.
        which: what the rows are, for messages.

    Raises:
        DataError: there is no such column, or another one has the new name.
        ConfigError: one column is named for two uses.
    """
    if len(set(columns.values())) < len(columns):
        raise ConfigError(
            f"columns = {dict(columns)} names one column twice, but each has its own use: name different ones"
        )
    for use, given in columns.items():
        check_column(rows, given, which, use)
        if use != given and use in rows.column_names and use not in columns.values():
            raise DataError(
                f"column '{given}' is to become '{use}', but the {which} rows have another column of that name: "
                "rename one of them"
            )
    new_names = {given: use for use, given in columns.items() if use != given}
    return rows.rename_columns(new_names) if new_names else rows


def check_column(rows: datasets.Dataset, name: str, which: str, use: str = "") -> None:
    """Refuses rows without a column.

    Args:
        rows: which ought to have it.
        name: of the column.
        which: what the rows are, for messages.
        use: what the task calls it, if that is another name.

    Raises:
        DataError: with the nearest name there is.
    """
    if name not in rows.column_names:
        near = difflib.get_close_matches(name, rows.column_names, n=1)
        use = use or name
        other = f'data.columns = {{ {use} = "..." }}, or `-c {use}=...` of evaluate and predict, names another'
        hint = f"did you mean '{near[0]}'?" if near else other
        names = ", ".join(rows.column_names[:_SHOWN]) + ", ..." * (len(rows.column_names) > _SHOWN)
        raise DataError(f"the {which} rows have no column '{name}', only {names}: {hint}{_by_columns(rows)}")


def _by_columns(rows: datasets.Dataset) -> str:
    """A hint for a table of one row, which JSON gives that holds columns and not rows."""
    return "; of JSON by columns, write a list of rows, as pandas does with orient='records'" if len(rows) == 1 else ""


def check_rows(rows: datasets.Dataset, needed: Sequence[str], which: str) -> None:
    """Refuses an empty table, and columns that are absent or have gaps.

    Raises:
        DataError: with the first row at fault.
    """
    if not len(rows):
        raise DataError(f"there are no {which} rows, but one at least is needed: give a file or split with rows")
    for name in needed:
        check_column(rows, name, which)
        missing = [row for row, bad in enumerate(_arrow(rows, name).is_null(nan_is_null=True).to_pylist()) if bad]
        if missing:
            raise DataError(
                f"column '{name}' has no value in {len(missing)} of {len(rows)} {which} rows (first: row {missing[0]})"
                ", but every row needs one: fill or remove them"
            )


def check_texts(rows: datasets.Dataset, names: Sequence[str], which: str) -> None:
    """Refuses columns that hold anything but text.

    Raises:
        DataError: a column holds something else.
    """
    for name in names:
        found = _arrow(rows, name).type
        if str(found) not in ("string", "large_string", "string_view"):
            raise DataError(
                f"column '{name}' of the {which} rows holds {found}, not text: name a column of text{_by_columns(rows)}"
            )


def split_by_content(rows: datasets.Dataset, key: str, test_fraction: float, seed: int) -> Splits:
    """Holds out rows by a hash of their content: rows with equal content are on the same side, in any order.

    Args:
        rows: all rows.
        key: the column to hash: text, or anything that JSON can hold.
        test_fraction: share of contents to hold out.
        seed: of the hash.

    Returns:
        Both sides, in the order of ``rows``.

    Raises:
        DataError: if a side is left without rows.
    """
    limit = test_fraction * 2.0**64
    values = [value if isinstance(value, str) else json.dumps(value, default=repr) for value in values_of(rows, key)]
    is_test = [xxhash.xxh3_64_intdigest(f"{seed}:{value}".encode()) < limit for value in values]
    train = [row for row, held_out in enumerate(is_test) if not held_out]
    test = [row for row, held_out in enumerate(is_test) if held_out]
    if not train or not test:
        different = len(set(values))
        equal = f" of {different} different contents, which each stay on one side," if different < len(rows) else ""
        raise DataError(
            f"holding out {test_fraction:g} of {len(rows)} rows{equal} leaves {len(train)} for training and "
            f"{len(test)} for testing, but both need one at least: give more rows, another test_fraction, or test rows "
            "of their own"
        )
    return Splits(rows.select(train), rows.select(test))


def split(raw: Raw, key: str) -> Splits:
    """The two sides of ``raw``, capped; rows are held out by ``key`` where there are no test rows."""
    sides = Splits(raw.train, raw.test) if raw.test is not None else _held_out(raw, key)
    return Splits(capped(sides.train, raw.max_train, raw.seed), capped(sides.test, raw.max_test, raw.seed))


def capped(rows: datasets.Dataset, most: int | None, seed: int) -> datasets.Dataset:
    """At most so many rows, drawn by ``seed``, in their order: the first ones could all be of one class or client."""
    if most is None or len(rows) <= most:
        return rows
    drawn = np.random.default_rng(named_seed(seed, "cap")).permutation(len(rows))[:most]
    return rows.select(np.sort(drawn))


def _held_out(raw: Raw, key: str) -> Splits:
    rows = raw.train
    if raw.final:
        # the same rows as in the final run, of which some are held out here
        rows = capped(split_by_content(rows, key, *raw.final).train, raw.max_train, raw.final[1])
    return split_by_content(rows, key, raw.test_fraction, raw.seed)


def fingerprint(dataset: datasets.Dataset, columns: Sequence[str] | None = None) -> str:
    """A hash of the content that is the same wherever the same rows come in the same order.

    Args:
        dataset: the rows.
        columns: which columns count; all where None. Their order does not matter.

    Returns:
        32 hexadecimal digits (XXH3, 128 bit) over names, class names, and values.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(columns or dataset.column_names):
        digest.update(ascii((name, class_names(dataset, name), len(dataset))).encode())
        for chunk in _arrow(dataset, name).chunks:
            for start in range(0, len(chunk), 1000):
                values = chunk.slice(start, 1000).to_pylist()
                digest.update("".join(f"{value!a};" for value in values).encode())
    return digest.hexdigest()


def class_names(rows: datasets.Dataset, name: str) -> list[str] | None:
    """The names of a column's declared classes; of the entries' classes where it holds lists; None without any."""

    feature = rows.features[name]
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def values_of(rows: datasets.Dataset, name: str) -> list[Any]:
    """A column as Python values, nothing decoded."""
    values: list[Any] = _arrow(rows, name).to_pylist()
    return values


def typed(rows: datasets.Dataset, name: str) -> list[Any]:
    """A column as Python values; fields of a csv that are all whole numbers in their plain form as these.

    ``007`` is not in plain form, as it is another text than ``7``.
    """
    values = values_of(rows, name)
    if not is_field(rows, name) or not all(value is None or _WHOLE.fullmatch(value) for value in values):
        return values
    return [value if value is None else int(value) for value in values]


def is_field(rows: datasets.Dataset, name: str) -> bool:
    """Whether a column holds fields of a csv, which are text whatever they mean."""
    return str(_arrow(rows, name).type) == "large_string"


def _arrow(rows: datasets.Dataset, name: str) -> Any:
    # with_format() would copy the data set and hash its state for each column
    table = datasets.formatting.query_table(rows.data.select([name]), slice(0, len(rows)), indices=rows._indices)
    return table.column(name)

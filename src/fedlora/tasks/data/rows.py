"""Rows passed in from Python: tables of ``datasets`` and ``pandas``, lists of dicts, or these by client."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from fedlora.core.component import MODEL_CONFIG, Fraction, dataclass
from fedlora.core.errors import DataError, first_line, shown
from fedlora.core.handed import Handed, HandedField, with_keywords
from fedlora.core.later import datasets
from fedlora.tasks.data.columns import Raw, Source, fingerprint, rename
from fedlora.tasks.data.files import quiet

CLIENT = "fedlora: client"
"""The column that names each row's client if rows were passed in by client."""

_MARK = "rows:"
_NUMBER = re.compile(r"u?int\d+|float\d+")
_SPLITS = {"train", "test", "validation", "valid", "dev"}
_FORMS = "a datasets.Dataset, a pandas.DataFrame, a list of dicts, or a mapping of clients to these"


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Rows(Source):
    """Rows passed in from Python.

    Each side is a ``datasets.Dataset``, a ``pandas.DataFrame``, a list of dicts, or a mapping of clients to these; for
    both sides at once ``train`` is a ``datasets.DatasetDict`` with ``train`` and optionally ``test``. The training rows
    of a mapping belong to natural clients with its keys as names, unless ``clients.partition`` is set. Rows are copied
    in their current state. A configuration in TOML records a fingerprint of their content instead.

    Args:
        train: the training rows.
        test: the test rows; if None, ``test_fraction`` of the training rows, chosen by a hash of their content, so that
            rows with equal content are on the same side.
        test_fraction: used only if ``test`` is None.
        seed: seed of that hash.
        columns: name that the task uses -> name in the data, for columns with other names.

    Raises:
        DataError: an argument has none of these forms, or does not form a table.
    """

    kind: Literal["rows"] = "rows"
    train: HandedField
    test: HandedField | None = None
    test_fraction: Fraction = 0.2
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _converted(cls, given: Any) -> Any:
        return with_keywords(given, _converted)

    @property
    def by_client(self) -> bool:
        """Whether each training row belongs to a client that was named with it."""
        return self.train.value is not None and CLIENT in self.train.value.column_names

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({CLIENT})

    def load(self) -> Raw:
        train = rename(self.train.here("data.train"), self.columns, "training")
        test = None if self.test is None else rename(self.test.here("data.test"), self.columns, "test")
        return Raw(train, test, self.test_fraction, self.seed)


def as_source(given: Any) -> Any:
    """A source, or the table of one, as it is; anything else as ``Rows``.

    Raises:
        DataError: it is no table of rows.
    """
    if isinstance(given, Mapping):
        return Rows(train=given) if given and all(map(_is_table, given.values())) else given
    return given if isinstance(given, Source) else Rows(train=given)


def _converted(values: dict[str, Any]) -> dict[str, Any]:
    """The keywords of ``Rows`` with tables of ``datasets`` in place of what was handed over."""
    train: Any = values.get("train")
    if _is_a(train, "datasets", "DatasetDict"):
        if "train" not in train:
            raise DataError(
                f"the DatasetDict has the splits {', '.join(map(str, train))}, but none called 'train': choose them, "
                "as in fedlora.Rows(train=splits['a'], test=splits['b'])"
            )
        values = {"test": train.get("test"), **values, "train": train["train"]}
    columns = values.get("columns")
    label = columns.get("label", "label") if isinstance(columns, Mapping) else "label"
    for side, which in (("train", "training"), ("test", "test")):
        if side in values and (side == "train" or values[side] is not None):
            values[side] = _handed(values[side], label, which)
    return values


def _handed(given: Any, label: str, which: str) -> Handed:
    if isinstance(given, Handed):
        return given
    if isinstance(given, str):
        if given.startswith(_MARK):
            return Handed(given)
        raise DataError(
            f"the {which} rows are {shown(given)}, but {_FORMS} was expected: a path is read by "
            'fedlora.Files(train=...), kind = "files"'
        )
    by_client = isinstance(given, Mapping)
    with quiet():
        rows = _of_clients(given, label, which) if by_client else _table(given, label, f"the {which} rows")
    return Handed(_MARK + fingerprint(rows), rows)


def _of_clients(given: Mapping[Any, Any], label: str, which: str) -> datasets.Dataset:
    """All rows of a mapping, client by client; those for training with the column ``CLIENT``."""
    if given and set(given) <= _SPLITS:
        raise DataError(
            f"a mapping of rows has a client for each key, and {', '.join(map(repr, given))} look like splits: use "
            "fedlora.Rows(train=..., test=...)"
        )
    names = [str(name) for name in given]
    if len(set(names)) < len(names) or not names:
        raise DataError(
            f"a mapping of {len(names)} clients to {which} rows was passed, but at least one was expected, each "
            "with a name of its own: give them names that differ as text"
        )
    if all(isinstance(rows, list | tuple) for rows in given.values()):
        for name, rows in given.items():
            _check_dicts(rows, f"the {which} rows of client {name!r}")
        one = _of_dicts([row for rows in given.values() for row in rows], f"the {which} rows")
        sizes = [len(rows) for rows in given.values()]
    else:
        tables = [_table(rows, label, f"the {which} rows of client {name!r}") for name, rows in given.items()]
        try:
            one = datasets.concatenate_datasets(_promoted(tables))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"the clients' {which} rows do not make one table ({first_line(error)}), but the same columns "
                "with the same types and classes were expected: give all tables the same columns"
            ) from error
        sizes = [len(table) for table in tables]
    if 0 in sizes:
        raise DataError(f"client {names[sizes.index(0)]!r} has no {which} rows: leave it out, or give it some")
    if which != "training":
        return one
    owners = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    return one.add_column(CLIENT, owners)


def _promoted(tables: list[datasets.Dataset]) -> list[datasets.Dataset]:
    """The tables with their columns of numbers in one type, as pandas and NumPy promote them."""
    for name in tables[0].column_names:
        kinds = [table.features.get(name) for table in tables]
        types = {kind.dtype for kind in kinds if isinstance(kind, datasets.Value) and _NUMBER.fullmatch(kind.dtype)}
        if len(types) > 1 and all(type(kind) is datasets.Value for kind in kinds):
            common = datasets.Value(str(np.result_type(*types)))
            tables = [table.cast_column(name, common) for table in tables]
    return tables


def _table(given: Any, label: str, what: str) -> datasets.Dataset:
    """Rows in one of the forms as a table of ``datasets``."""
    try:
        if _is_a(given, "datasets", "Dataset"):
            rows = given.with_format(None)
        elif _is_a(given, "pandas", "DataFrame"):
            rows = _of_frame(given, label, what)
        elif isinstance(given, list | tuple):
            _check_dicts(given, what)
            rows = _of_dicts(given, what)
        else:
            raise DataError(f"{what} are of type {type(given).__name__}, but {_FORMS} was expected: pass one of these")
    except (ValueError, TypeError, OverflowError) as error:
        raise _no_table(what, error) from error
    if CLIENT in rows.column_names:
        raise DataError(f"{what} have a column {CLIENT!r}, which is a reserved name of fedlora: rename it")
    return rows


def _check_dicts(given: Sequence[Any], what: str) -> None:
    for number, row in enumerate(given):
        if not isinstance(row, Mapping):
            raise DataError(
                f"entry {number} of {what} is of type {type(row).__name__}, but a list of dicts was expected, one for "
                "each row: a table of columns becomes rows with datasets.Dataset.from_dict(...)"
            )


def _of_dicts(given: Sequence[Mapping[str, Any]], what: str) -> datasets.Dataset:
    if not given:
        raise DataError(f"{what} are an empty list, but one row at least is needed: pass some rows")
    names = dict.fromkeys(name for row in given for name in row)  # a row may lack what others have
    columns = {name: [row.get(name) for row in given] for name in names}
    try:
        return datasets.Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError) as error:
        # as in JSON files, lists and objects that have no type in common are JSON text
        nested = {name: values for name, values in columns.items() if _are_nested(values)}
        try:
            as_text = {name: [None if one is None else json.dumps(one) for one in nested[name]] for name in nested}
            return datasets.Dataset.from_dict(columns | as_text)
        except (ValueError, TypeError, OverflowError):
            raise _no_table(what, error) from error


def _are_nested(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, list | dict) for value in values)


def _of_frame(frame: Any, label: str, what: str) -> datasets.Dataset:
    """A ``pandas.DataFrame``; a categorical label keeps its classes and their order, others become their values."""
    plain, names = {}, None
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise DataError(f"{what} have the column {twice!r} twice, but one was expected: rename or drop the other")
    for name in frame.columns:
        column = frame[name]
        if str(column.dtype) != "category":
            continue
        if name == label:
            names = [str(category) for category in column.cat.categories]
            codes = column.cat.codes.astype("Int64")
            plain[name] = codes.mask(codes < 0)
        else:
            plain[name] = column.astype(object)
    rows = datasets.Dataset.from_pandas(frame.assign(**plain), preserve_index=False)
    return rows if names is None else rows.cast_column(label, datasets.ClassLabel(names=names))


def _no_table(what: str, error: Exception) -> DataError:
    return DataError(
        f"{what} do not make a table ({first_line(error)}), but each column needs values of one type: convert them"
    )


def _is_table(given: Any) -> bool:
    """Whether something may be the rows of a side or of a client."""
    return isinstance(given, list | tuple) or _is_a(given, "pandas", "DataFrame") or _is_a(given, "datasets", "Dataset")


def _is_a(given: Any, library: str, name: str) -> bool:
    """Whether something is of a library's class; the library is not imported for it."""
    found = ((base.__module__.split(".")[0], base.__name__) for base in type(given).__mro__)
    return (library, name) in found

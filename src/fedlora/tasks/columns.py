"""The form in which every source hands its rows over: ``text``, maybe ``text_pair``, ``label``, and the rest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from fedlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets


class Splits(NamedTuple):
    """Training and test rows with the columns ``text``, maybe ``text_pair``, ``label``, and all others untouched."""

    train: datasets.Dataset
    test: datasets.Dataset


class Columns(NamedTuple):
    """What the needed columns are called in the data at hand."""

    text: str
    text_pair: str | None
    label: str
    label_name: str | None


def prepare(
    train: datasets.Dataset, test: datasets.Dataset | None, columns: Columns, test_fraction: float, seed: int
) -> Splits:
    """Check rows as they came and give them the columns ``text``, maybe ``text_pair``, and ``label``.

    Args:
        train: training rows.
        test: test rows, or None to hold a part of the training rows out.
        columns: what the needed columns are called in both.
        test_fraction: the part to hold out.
        seed: of the hash that holds out.

    Returns:
        Both sides with the same classes.

    Raises:
        DataError: for missing columns, values or classes.
        ConfigError: if one column is named for two uses.
    """
    for rows, which in ((train, "training"), (test, "test")):
        if rows is not None:
            _check(rows, columns, which)
    names = _label_names(train, columns)
    train = _encode(train, columns, names, "training")
    if test is None:
        return split_by_text(train, "text", test_fraction, seed)
    return Splits(train, _encode(test, columns, names, "test"))


def split_by_text(dataset: datasets.Dataset, text: str, test_fraction: float, seed: int) -> Splits:
    """Hold out the rows whose text's hash is small, so that equal texts fall on one side, whatever their order.

    Args:
        dataset: all rows.
        text: the column to hash.
        test_fraction: share of texts to hold out.
        seed: of the hash.

    Returns:
        Both sides, in the order of ``dataset``.

    Raises:
        DataError: if a side is left without rows.
    """
    limit = test_fraction * 2.0**64
    is_test = [
        xxhash.xxh3_64_intdigest(f"{seed}:{value}".encode()) < limit for value in _arrow(dataset, text).to_pylist()
    ]
    train = [row for row, held_out in enumerate(is_test) if not held_out]
    test = [row for row, held_out in enumerate(is_test) if held_out]
    if not train or not test:
        raise DataError(
            f"holding out {test_fraction:g} of {len(dataset)} rows leaves {len(train)} for training and {len(test)} "
            "for testing, but both need one at least: give more rows, another test_fraction, or test rows of their own"
        )
    return Splits(dataset.select(train), dataset.select(test))


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
        digest.update(ascii((name, _class_names(dataset, name), len(dataset))).encode())
        for chunk in _arrow(dataset, name).chunks:
            for start in range(0, len(chunk), 1000):
                values = chunk.slice(start, 1000).to_pylist()
                digest.update("".join(f"{value!a};" for value in values).encode())
    return digest.hexdigest()


def _check(rows: datasets.Dataset, columns: Columns, which: str) -> None:
    if not len(rows):
        raise DataError(f"there are no {which} rows, but one at least is needed: give a file or split with rows")
    wanted = [name for name in columns if name is not None]
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"the columns {wanted} name one column twice, but each has its own use: name different ones")
    for name in wanted:
        if name not in rows.column_names:
            near = difflib.get_close_matches(name, rows.column_names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "name one of these"
            have = ", ".join(rows.column_names)
            raise DataError(f"the {which} rows have no column '{name}', only {have}: {hint}")
        values = _arrow(rows, name)
        missing = [row for row, bad in enumerate(values.is_null(nan_is_null=True).to_pylist()) if bad]
        if missing:
            raise DataError(
                f"column '{name}' has no value in {len(missing)} of {len(rows)} {which} rows (first: row {missing[0]})"
                ", but every row needs one: fill or remove them"
            )
        is_text = str(values.type) in ("string", "large_string")
        if name in (columns.text, columns.text_pair) and not is_text:
            raise DataError(f"column '{name}' of the {which} rows holds {values.type}, not text: name a column of text")
    for given, target in ((columns.text, "text"), (columns.text_pair, "text_pair"), (columns.label, "label")):
        if given not in (None, target) and target in set(rows.column_names) - set(wanted):
            raise DataError(
                f"column '{given}' is to become '{target}', but the {which} rows have another column of that name: "
                "rename one of them"
            )


def _label_names(rows: datasets.Dataset, columns: Columns) -> dict[Any, str]:
    """The name of each value of the label column, in the order of the class numbers."""
    declared = _class_names(rows, columns.label)
    if declared is not None:
        return dict(enumerate(declared))
    values = _values(rows, columns.label)
    if columns.label_name is None:
        return {value: str(value) for value in sorted(set(values))}
    pairs = sorted({*zip(values, map(str, _values(rows, columns.label_name)), strict=True)})
    names = dict(pairs)
    if not len(pairs) == len(names) == len(set(names.values())):
        raise DataError(
            f"columns '{columns.label}' and '{columns.label_name}' disagree ({len(names)} classes, "
            f"{len(set(names.values()))} names, {len(pairs)} pairs), but each class needs one name: mend the names"
        )
    return names


def _encode(rows: datasets.Dataset, columns: Columns, names: dict[Any, str], which: str) -> datasets.Dataset:
    import datasets

    declared = _class_names(rows, columns.label)
    if declared is not None and declared != list(names.values()):
        raise DataError(f"the {which} rows declare other classes than the training rows: use files of one data set")
    values = _values(rows, columns.label)
    unknown = sorted({value for value in values if value not in names})
    if unknown and declared is not None:
        raise DataError(
            f"{sum(value in unknown for value in values)} of {len(rows)} {which} rows carry the label {unknown[0]}, "
            "which means 'not given', but every row needs a class: choose a split with labels"
        )
    if unknown:
        raise DataError(
            f"the {which} rows have {len(unknown)} labels that no training row has (such as {unknown[0]!r}), but a "
            "class must be seen to be learned: add training rows of it or remove these"
        )
    index = {value: position for position, value in enumerate(names)}
    feature = datasets.ClassLabel(names=list(names.values()))
    rest = [name for name in rows.column_names if name not in (columns.text, columns.text_pair, columns.label)]
    rows = rows.remove_columns(columns.label).add_column("label", [index[value] for value in values], feature=feature)
    renames = {columns.text: "text"} | ({columns.text_pair: "text_pair"} if columns.text_pair else {})
    return rows.rename_columns(renames).select_columns([*renames.values(), "label", *rest])


def _values(rows: datasets.Dataset, name: str) -> list[Any]:
    """The values of a label column: strings or integers."""
    values: list[Any] = _arrow(rows, name).to_pylist()
    kinds = {type(value) for value in values}
    if kinds == {float} and all(value.is_integer() for value in values):
        return [int(value) for value in values]
    if kinds == {bool}:
        return [str(value) for value in values]
    if kinds not in ({str}, {int}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"column '{name}' holds {found}, but labels are strings or whole numbers: name another column")
    return values


def _arrow(rows: datasets.Dataset, name: str) -> Any:
    return rows.select_columns([name]).with_format("arrow")[:].column(name)


def _class_names(rows: datasets.Dataset, name: str) -> list[str] | None:
    import datasets

    feature = rows.features[name]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

"""A column of classes: its values, the classes' names, and class numbers in place of the values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedlora.core.errors import DataError, shown
from fedlora.core.later import datasets
from fedlora.tasks.data.columns import Raw, class_names, is_field, typed

_WHOLE_FLOAT = re.compile(r"\s*(?:0|-?[1-9][0-9]{0,14})(?:\.0+)?\s*")


def with_classes(raw: Raw, label: str, label_name: str | None) -> Raw:
    """The same rows with ``label`` as a ``datasets.ClassLabel`` of the same classes on both sides.

    Labels may be strings (classes are the sorted distinct strings, without blanks around them), integers (classes are
    the sorted distinct numbers) or a ``ClassLabel`` (kept; test rows may then have its names or numbers).

    Args:
        raw: the rows.
        label: the column of classes.
        label_name: a column with a name for each class, or None.

    Raises:
        DataError: labels are of another type, blank, or unknown, or their names disagree.
    """
    names = _label_names(raw.train, label, label_name)
    train = _encode(raw.train, label, names, "training")
    return raw._replace(train=train, test=None if raw.test is None else _encode(raw.test, label, names, "test"))


def known_classes(rows: datasets.Dataset, label: str, names: Sequence[str], which: str = "given") -> datasets.Dataset:
    """``rows`` with ``label`` as classes that are known already, given by name or number.

    Raises:
        DataError: a label is neither.
    """
    declared = class_names(rows, label)
    known = class_numbers(names, declared, by_number=True)
    values = _values(rows, label, which)
    values = values if declared is not None else [str(value) for value in values]
    unknown = sorted({str(value) for value in values if value not in known})
    if unknown:
        raise DataError(
            f"the {which} rows have labels that the model lacks: {', '.join(unknown[:5])}; it has "
            f"{', '.join(names[:20])}: correct or remove them"
        )
    rows = rows.remove_columns(label)
    return rows.add_column(label, [known[value] for value in values], feature=datasets.ClassLabel(names=list(names)))


def class_numbers(names: Sequence[str], declared: Sequence[str] | None, by_number: bool = False) -> dict[Any, int]:
    """The class that a value stands for, by value.

    Args:
        names: the classes that are known, in order.
        declared: the classes of a column that declares its own: values are numbers of these. None for a column of words
            or numbers, whose values are looked up as text.
        by_number: whether the number of a class stands for it too; no number does where the names are numbers.
    """
    known = {name: number for number, name in enumerate(names)}
    if declared is not None:
        return {number: known[name] for number, name in enumerate(declared) if name in known}
    if not by_number or all(name.removeprefix("-").isdigit() for name in names):
        return dict(known)
    return {str(number): number for number in range(len(names))} | known


def class_value(value: Any) -> Any:
    """A label in its plain form: text without blanks around it, whole numbers as integers, True and False as text.

    >>> [class_value(value) for value in (" red ", 2.0, True, 0.5)]
    ['red', 2, 'True', 0.5]
    """
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def check_not_blank(values: Iterable[Any], label: str, which: str, blank: Callable[[Any], bool]) -> None:
    """Refuses rows whose label is text of blanks alone.

    Raises:
        DataError: with the number of such rows, and the first of them.
    """
    rows = [row for row, value in enumerate(values) if blank(value)]
    if rows:
        raise DataError(
            f"column '{label}' is blank in {len(rows)} of the {which} rows (first: row {rows[0]}), but a class has a "
            "name: fill or remove them"
        )


def unknown_classes(unknown: Sequence[str], which: str, what: str) -> DataError:
    """The error about classes that no training row has.

    Args:
        unknown: their names.
        which: the rows that have them.
        what: what the rows have: ``labels`` or ``classes``.
    """
    some = ", ".join(map(repr, unknown[:5]))
    return DataError(
        f"the {which} rows have {len(unknown)} {what} that no training row has (such as {some}), but a "
        "class must be seen to be learned: add training rows of it or remove these"
    )


def _label_names(rows: datasets.Dataset, label: str, label_name: str | None) -> dict[Any, str]:
    """The name of each value of the label column, in the order of the class numbers; values that no class declares as
    text, since a csv has no numbers."""
    declared = class_names(rows, label)
    if declared is not None:
        return dict(enumerate(declared))
    values = _values(rows, label, "training")
    if label_name is None:
        return {str(value): str(value) for value in sorted(set(values))}
    pairs = sorted({*zip(values, map(str, _values(rows, label_name, "training")), strict=True)})
    names = {str(value): name for value, name in pairs}
    if not len(pairs) == len(names) == len(set(names.values())):
        raise DataError(
            f"columns '{label}' and '{label_name}' disagree ({len(names)} classes, "
            f"{len(set(names.values()))} names, {len(pairs)} pairs), but each class needs one name: correct the names"
        )
    return names


def _encode(rows: datasets.Dataset, label: str, names: dict[Any, str], which: str) -> datasets.Dataset:
    declared = class_names(rows, label)
    if declared is not None and declared != list(names.values()):
        raise DataError(f"the {which} rows declare other classes than the training rows: use files of one data set")
    of_declared = all(isinstance(value, int) for value in names)
    by_name = class_numbers(list(names.values()), declared, by_number=of_declared)
    index = by_name if of_declared or declared is not None else {value: n for n, value in enumerate(names)}
    values = _values(rows, label, which)
    values = values if declared is not None else [str(value) for value in values]
    unknown = sorted({value for value in values if value not in index})
    if unknown and declared is not None:
        raise DataError(
            f"{sum(value in unknown for value in values)} of {len(rows)} {which} rows carry the label {unknown[0]}, "
            "which means 'not given', but every row needs a class: choose a split with labels"
        )
    if unknown:
        raise unknown_classes(unknown, which, "labels")
    feature = datasets.ClassLabel(names=list(names.values()))
    return rows.remove_columns(label).add_column(label, [index[value] for value in values], feature=feature)


def _values(rows: datasets.Dataset, name: str, which: str) -> list[Any]:
    """The values of a label column: strings or integers."""
    values = typed(rows, name)
    if is_field(rows, name) and all(isinstance(one, str) and _WHOLE_FLOAT.fullmatch(one) for one in values):
        values = [float(value) for value in values]  # a csv of pandas writes so if a row had no label
    values = [class_value(value) for value in values]
    kinds = {type(value) for value in values}
    if kinds == {str}:
        check_not_blank(values, name, which, lambda value: value == "")
    elif kinds != {int}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        mend = "name another column"
        if kinds == {list}:
            mend = (
                f"for lists of classes or vectors of zeros and ones, as {shown(values[0], 40)}, set task.problem = "
                '"multi"; for a row of one class, give that class'
            )
        elif kinds <= {int, float}:
            mend = 'set task.problem = "regression" for numbers'
        raise DataError(f"column '{name}' holds {found}, but labels are strings or whole numbers: {mend}")
    return values

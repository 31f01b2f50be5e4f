"""Labels of classifiers: a class, a set of classes as a list in each row, or a number."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.core.later import datasets
from fedlora.tasks.data.columns import (
    Raw,
    class_names,
    class_numbers,
    is_field,
    known_classes,
    typed,
    values_of,
    with_classes,
)
from fedlora.tasks.scores import Problem


def labelled(raw: Raw, problem: Problem) -> tuple[Raw, list[str]]:
    """The same rows with ``label`` as class numbers, as lists of them, or as it is; and the classes' names.

    Raises:
        DataError: labels are not what the problem needs, or there are fewer than two classes.
    """
    if problem == "regression":
        train, *test = (_numbers(rows, which) for rows, which in raw.sides)
        return raw._replace(train=train, test=test[0] if test else None), []
    if problem == "multi":
        raw, names = class_sets(raw, "label")
    else:
        raw = with_classes(raw, "label", "label_name" if "label_name" in raw.train.column_names else None)
        names = list(raw.train.features["label"].names)
    if len(names) < 2:
        found = f"all rows have the class {names[0]!r}" if names else "no row has a class"
        raise DataError(f"{found}, but there must be two or more to tell apart")
    return raw, names


def known_labels(rows: datasets.Dataset, problem: Problem, names: Sequence[str], which: str) -> datasets.Dataset:
    """``rows`` with ``label`` as the classes that the model knows, given by name or number.

    Raises:
        DataError: labels are not what the problem needs, or of other classes.
    """
    if problem == "single":
        return known_classes(rows, "label", names)
    if problem == "multi":
        return class_sets_of(rows, "label", names, which, by_number=True)
    return _numbers(rows, which)


def label_table(rows: datasets.Dataset, problem: Problem, num_classes: int) -> NDArray[Any]:
    """The labels as ``scores.loss`` takes them."""
    if problem == "multi":
        return class_table(rows, "label", num_classes)
    return np.asarray(values_of(rows, "label"), dtype=np.int64 if problem == "single" else np.float32)


def class_sets(raw: Raw, label: str) -> tuple[Raw, list[str]]:
    """The same rows with ``label`` as lists of class numbers, and the classes' names.

    Classes are the declared ones, or the sorted distinct entries of the training rows.

    Args:
        raw: the rows.
        label: the column of lists; an empty list is a row without a class.

    Raises:
        DataError: the column holds no lists, or a class that no training row has.
    """
    declared = class_names(raw.train, label)
    entries = {entry for row in _lists(raw.train, label, "training") for entry in row}
    if len({type(entry) for entry in entries}) > 1:
        raise DataError(f"column '{label}' mixes words and numbers in its lists: use one of the two")
    names = declared or [str(entry) for entry in sorted(entries)]
    train = class_sets_of(raw.train, label, names, "training")
    test = None if raw.test is None else class_sets_of(raw.test, label, names, "test")
    return raw._replace(train=train, test=test), names


def class_sets_of(
    rows: datasets.Dataset, label: str, names: Sequence[str], which: str, by_number: bool = False
) -> datasets.Dataset:
    """``rows`` with ``label`` as lists of class numbers, of classes that are known.

    Args:
        rows: the rows.
        label: the column of lists.
        names: the classes, in order.
        which: what the rows are, for messages.
        by_number: whether a class may be given by its number too.

    Raises:
        DataError: the column holds no lists, or a class that is not among ``names``.
    """

    declared = class_names(rows, label)
    known = class_numbers(names, declared, by_number)
    lists = _lists(rows, label, which)
    if declared is None:
        lists = [[str(entry) for entry in row] for row in lists]
    unknown = sorted({str(entry) for row in lists for entry in row if entry not in known})
    if unknown:
        raise DataError(
            f"the {which} rows have {len(unknown)} classes that no training row has (such as {unknown[0]!r}), but a "
            "class must be seen to be learned: add training rows of it or remove these"
        )
    numbers = [[known[entry] for entry in row] for row in lists]
    feature = datasets.List(datasets.ClassLabel(names=list(names)))
    return rows.remove_columns(label).add_column(label, numbers, feature=feature)


def class_table(rows: datasets.Dataset, label: str, num_classes: int) -> NDArray[np.float32]:
    """Lists of class numbers as ``(rows, num_classes)`` zeros and ones, float32."""
    table = np.zeros((len(rows), num_classes), dtype=np.float32)
    for row, numbers in enumerate(values_of(rows, label)):
        table[row, numbers] = 1.0
    return table


def _numbers(rows: datasets.Dataset, which: str) -> datasets.Dataset:
    """``rows`` with ``label`` as finite numbers."""
    values = typed(rows, "label")
    if is_field(rows, "label"):
        with contextlib.suppress(ValueError):
            values = [value if isinstance(value, int) else float(value) for value in values]
            rows = rows.remove_columns("label").add_column("label", values)
    if not all(isinstance(value, int | float) and np.isfinite(value) for value in values):
        raise DataError(
            f"column 'label' of the {which} rows is not all finite numbers, which problem = \"regression\" needs: mend "
            'the column, or set task.problem = "single"'
        )
    return rows


def _lists(rows: datasets.Dataset, label: str, which: str) -> list[list[Any]]:
    values = values_of(rows, label)
    if not all(isinstance(value, list) for value in values):
        raise DataError(
            f"column '{label}' of the {which} rows holds no lists, but with several classes a row's label is a list of "
            'them: use json or parquet, or set task.problem = "single"'
        )
    wrong = {type(entry).__name__ for value in values for entry in value} - {"str", "int"}
    if wrong:
        raise DataError(
            f"the lists of column '{label}' of the {which} rows hold {', '.join(sorted(wrong))}, but classes are words "
            "or whole numbers: mend the column"
        )
    return values

"""Labels of classifiers: a class, a set of classes as a list in each row, or a number."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError, shown
from fedlora.core.later import datasets
from fedlora.tasks.data.classes import (
    check_not_blank,
    class_numbers,
    class_value,
    known_classes,
    unknown_classes,
    with_classes,
)
from fedlora.tasks.data.columns import Raw, class_names, is_field, typed, values_of
from fedlora.tasks.data.notes import rare
from fedlora.tasks.scores import Problem

LARGEST = 1e18
"""The largest number that is learnt: its square has to be far from the end of float32."""


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
        found = f"all rows have the class {shown(names[0])}" if names else "no row has a class"
        raise DataError(f"{found}, but classification needs two or more")
    return raw, names


def known_labels(rows: datasets.Dataset, problem: Problem, names: Sequence[str], which: str) -> datasets.Dataset:
    """``rows`` with ``label`` as classes of the model, given by name or number.

    Raises:
        DataError: labels are not what the problem needs, or of other classes.
    """
    if problem == "single":
        return known_classes(rows, "label", names, which)
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

    Classes are the declared ones, or the sorted distinct entries of the training rows. If all training rows have lists
    of one length, at least 2, that hold only zeros and ones, these are vectors: entry ``i`` says whether the row has
    class ``i``.

    Args:
        raw: the rows.
        label: the column of lists; an empty list is a row without a class.

    Raises:
        DataError: the column holds no lists, or a class that no training row has.
    """
    declared = class_names(raw.train, label)
    lists = _lists(raw.train, label, "training")
    size = None if declared else vector_size(lists)
    if not size:
        _check_entries(lists, label, "training")
    entries = {class_value(entry) for row in lists for entry in row}
    if len({type(entry) for entry in entries}) > 1:
        raise DataError(f"column '{label}' mixes words and numbers in its lists: use one of the two")
    names = declared or [str(entry) for entry in (range(size) if size else sorted(entries))]
    train = class_sets_of(raw.train, label, names, "training", vectors=bool(size))
    test = None if raw.test is None else class_sets_of(raw.test, label, names, "test", vectors=bool(size))
    return raw._replace(train=train, test=test), names


def class_sets_of(
    rows: datasets.Dataset,
    label: str,
    names: Sequence[str],
    which: str,
    by_number: bool = False,
    vectors: bool | None = None,
) -> datasets.Dataset:
    """``rows`` with ``label`` as lists of class numbers, of classes that are known.

    Args:
        rows: the rows.
        label: the column of lists.
        names: the classes, in order.
        which: what the rows are, for messages.
        by_number: whether a class may be given by its number too.
        vectors: whether the lists are vectors of zeros and ones; if None, those are that cannot be anything else.

    Raises:
        DataError: the column holds no lists, or a class that is not among ``names``.
    """
    declared = class_names(rows, label)
    lists = _lists(rows, label, which)
    size = None if declared else vector_size(lists)
    if vectors is None:
        certain = len(names) > 2 or list(names) == ["0", "1"]
        vectors = size == len(names) and certain
    if vectors:
        if size != len(names):
            raise DataError(
                f"column '{label}' of the {which} rows does not hold vectors of {len(names)} zeros and ones, one for "
                "each class, as the training rows do: write them alike"
            )
        lists = [[number for number, entry in enumerate(row) if entry] for row in lists]
    else:
        _check_entries(lists, label, which)
    known = dict(enumerate(range(len(names)))) if vectors else class_numbers(names, declared, by_number)
    if declared is None and not vectors:
        lists = [[str(class_value(entry)) for entry in row] for row in lists]
    unknown = sorted({str(entry) for row in lists for entry in row if entry not in known})
    if unknown:
        raise unknown_classes(unknown, which, "classes")
    numbers = [[known[entry] for entry in row] for row in lists]
    feature = datasets.List(datasets.ClassLabel(names=list(names)))
    return rows.remove_columns(label).add_column(label, numbers, feature=feature)


def vector_size(lists: Sequence[Sequence[Any]]) -> int | None:
    """The common length of lists that hold only zeros and ones, if it is 2 or more; None for other lists.

    >>> vector_size([[0, 1, 0], [1.0, 1.0, 0.0]]), vector_size([[0, 1], [1]]), vector_size([["0", "1"]])
    (3, None, None)
    """
    sizes = {len(row) for row in lists}
    is_vectors = (
        len(sizes) == 1 and min(sizes) > 1 and all(not isinstance(e, str) and e in (0, 1) for r in lists for e in r)
    )
    return sizes.pop() if is_vectors else None


def given_twice(data: Mapping[Any, datasets.Dataset]) -> list[str]:
    """Sentences about lists of classes that have one twice.

    Args:
        data: rows with class numbers, by split.
    """
    counts = {
        split: sum(isinstance(value, list) and len(set(value)) < len(value) for value in values_of(rows, "label"))
        for split, rows in data.items()
    }
    return [
        f"{count} of {len(data[split])} {split} rows name a class twice, which counts once"
        for split, count in counts.items()
        if count
    ]


def seldom(data: Mapping[Any, datasets.Dataset], problem: Problem, names: Sequence[str]) -> list[str]:
    """Sentences about classes that few training rows have, or none.

    Args:
        data: rows with class numbers, by split.
        problem: what labels are.
        names: the classes.
    """
    if "train" not in data:
        return []
    values = values_of(data["train"], "label")
    if problem == "regression":
        return (
            [f"all training rows have the label {values[0]}: there is nothing to learn"] if len({*values}) == 1 else []
        )
    return rare((one for value in values for one in (value if isinstance(value, list) else [value])), names)


def class_table(rows: datasets.Dataset, label: str, num_classes: int) -> NDArray[np.float32]:
    """Lists of class numbers as ``(rows, num_classes)`` zeros and ones, float32."""
    table = np.zeros((len(rows), num_classes), dtype=np.float32)
    for row, numbers in enumerate(values_of(rows, label)):
        table[row, numbers] = 1.0
    return table


def _numbers(rows: datasets.Dataset, which: str) -> datasets.Dataset:
    """``rows`` with ``label`` as numbers."""
    values = typed(rows, "label")
    if is_field(rows, "label"):
        with contextlib.suppress(ValueError):
            values = [value if isinstance(value, int) else float(value) for value in values]
            rows = rows.remove_columns("label").add_column("label", values)
    wrong = [value for value in values if not _is_learnable(value, is_field(rows, "label"))]
    if wrong:
        raise DataError(
            f"column 'label' of the {which} rows is not all finite numbers, which problem = \"regression\" needs (up "
            f'to {LARGEST:g}), but has {shown(wrong[0])}: correct the column, or set task.problem = "single"'
        )
    return rows


def _is_learnable(value: Any, is_text: bool) -> bool:
    if is_text and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _lists(rows: datasets.Dataset, label: str, which: str) -> list[list[Any]]:
    values = values_of(rows, label)
    if not all(isinstance(value, list) for value in values):
        raise DataError(
            f"column '{label}' of the {which} rows holds no lists, but with several classes a row's label is a list of "
            'them: use json or parquet, or set task.problem = "single"'
        )
    return values


def _check_entries(lists: Sequence[Sequence[Any]], label: str, which: str) -> None:
    """Refuses lists that are no lists of classes."""
    wrong = {type(entry).__name__ for row in lists for entry in row} - {"str", "int"}
    if wrong:
        raise DataError(
            f"the lists of column '{label}' of the {which} rows hold {', '.join(sorted(wrong))}, but classes are "
            "words or whole numbers, or vectors of zeros and ones as long in every row: correct the column"
        )
    check_not_blank(lists, label, which, lambda row: any(isinstance(one, str) and not one.strip() for one in row))
    uneven = [row for row in lists if set(row) <= {0, 1} and len(set(row)) < len(row)]
    if uneven:
        raise DataError(
            f"column '{label}' of the {which} rows has the list {shown(uneven[0])}, which names a class twice, or is a "
            "vector of another length than others: name each class once, or give all vectors one length"
        )

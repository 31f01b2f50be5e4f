"""Labels: lists of classes in every form that files hold, and classes that a model knows already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fedlora.core.errors import DataError
from fedlora.tasks import Files, Rows, TextClassification
from fedlora.tasks.data.classes import known_classes
from fedlora.tasks.data.columns import Raw
from fedlora.tasks.data.labels import class_sets, class_sets_of, class_table, given_twice

LISTS: list[list[Any]] = [["red", "blue"], [], ["green"], ["blue"]]


def rows_of(labels: list[Any], names: list[str] | None = None) -> datasets.Dataset:
    """Rows with these labels, of declared classes if ``names`` are given."""
    rows = datasets.Dataset.from_dict({"text": [f"t{row}" for row in range(len(labels))], "label": labels})
    if names is None:
        return rows
    feature: Any = datasets.ClassLabel(names=names)
    return rows.cast_column("label", datasets.List(feature) if isinstance(labels[0], list) else feature)


def sets(labels: list[Any], test: list[Any] | None = None, names: list[str] | None = None) -> tuple[Raw, list[str]]:
    return class_sets(Raw(rows_of(labels, names), None if test is None else rows_of(test, names), 0.2, 0), "label")


def test_words_in_sorted_order() -> None:
    raw, names = sets(LISTS, [["green", "red"]])
    assert names == ["blue", "green", "red"]
    assert raw.train["label"][:] == [[2, 0], [], [1], [0]]
    assert raw.test is not None
    assert raw.test["label"][:] == [[1, 2]]
    assert raw.train.features == raw.test.features
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    table = class_table(raw.train, "label", 3)
    assert (table.dtype, table.tolist()) == (np.float32, expected)


def test_numbers_in_the_order_of_numbers() -> None:
    raw, names = sets([[10, 9], [-1], [9]])
    assert names == ["-1", "9", "10"]
    assert raw.train["label"][:] == [[2, 1], [0], [1]]


def test_declared_classes_are_kept_even_where_no_row_has_them() -> None:
    raw, names = sets([[2, 0], [0]], [[1]], ["z", "y", "x"])
    assert names == ["z", "y", "x"]
    assert raw.train["label"][:] == [[2, 0], [0]]
    assert raw.test is not None
    assert raw.test["label"][:] == [[1]]


def test_declared_classes_in_another_order_are_told_by_their_names() -> None:
    raw = Raw(rows_of([[0], [1]], ["a", "b"]), rows_of([[0], [1]], ["b", "a"]), 0.2, 0)
    both, names = class_sets(raw, "label")
    assert names == ["a", "b"]
    assert both.test is not None
    assert both.test["label"][:] == [[1], [0]]


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_lists_are_read_from_files(tmp_path: Path, ending: str) -> None:
    records = [{"text": f"t{row}", "label": label} for row, label in enumerate(LISTS * 3)]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        datasets.Dataset.from_list(records).to_parquet(str(path))
    elif ending == "json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    splits, names = TextClassification(problem="multi").read(Files(train=str(path), test=str(path)))
    assert names == ["blue", "green", "red"]
    assert splits.train["label"][:] == splits.test["label"][:] == [[2, 0], [], [1], [0]] * 3


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_numbers_are_read_from_files(tmp_path: Path, ending: str) -> None:
    rows = rows_of([0.5, -2.0, 3.0, 1e-3])
    path = str(tmp_path / f"rows.{ending}")
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[ending](path)
    splits, names = TextClassification(problem="regression").read(Files(train=path, test=path))
    assert names == []
    assert splits.train["label"][:] == [0.5, -2.0, 3.0, 1e-3]


@pytest.mark.parametrize(
    ("problem", "labels", "text"),
    [
        ("multi", ["red", "blue"], "column 'label' of the training rows holds no lists"),
        ("multi", [[["red"]], [["blue"]]], "the lists of column 'label' of the training rows hold list"),
        ("multi", [["red"], [None]], "hold NoneType, but classes are words or whole numbers"),
        ("multi", [[0.5], [1.0]], "hold float"),
        ("multi", [["red"], ["red"]], "all rows have the class 'red'"),
        ("multi", [[], []], "no row has a class"),
        ("multi", [["red"], None], "column 'label' has no value in 1 of 2 training rows"),
        ("single", [["red"], ["blue"]], "column 'label' holds list, but labels are strings or whole numbers"),
        ("regression", ["red", "blue"], 'is not all finite numbers, which problem = "regression" needs'),
        ("regression", [1.0, float("inf")], "is not all finite numbers"),
        ("regression", [1.0, float("nan")], "column 'label' has no value in 1 of 2"),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, problem: Any, labels: list[Any], text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}", "label": label}) + "\n" for n, label in enumerate(labels)))
    with pytest.raises(DataError) as error:
        TextClassification(problem=problem).read(Files(train=str(path), test=str(path)))
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("labels", "declared", "said"),
    [([["red", "violet"]], None, "violet"), ([[0, 2]], ["red", "green", "violet"], "2"), ([[-1]], ["red"], "-1")],
)
def test_a_class_that_the_test_rows_have_alone(labels: list[Any], declared: list[str] | None, said: str) -> None:
    raw, _ = sets([[0], [1]], names=["red", "green"])
    with pytest.raises(DataError, match=f"1 classes that no training row has .such as '{said}'"):
        class_sets(raw._replace(test=rows_of(labels, declared)), "label")


# ---- classes that are known already


def known(labels: list[Any], names: list[str], declared: list[str] | None = None) -> list[int]:
    found: list[int] = known_classes(rows_of(labels, declared), "label", names)["label"][:]
    return found


def test_known_classes_by_name_or_number() -> None:
    assert known(["b", "a"], ["a", "b"]) == [1, 0]
    assert known([1, 0], ["a", "b"]) == [1, 0]
    assert known([1.0, 0.0], ["a", "b"]) == [1, 0]
    assert known([True, False], ["False", "True"]) == [1, 0]


def test_where_the_names_are_numbers_a_number_is_a_name() -> None:
    assert known([2, 1], ["1", "2"]) == [1, 0]
    with pytest.raises(DataError, match="labels that the model lacks: 0; it has 1, 2"):
        known([1, 0], ["1", "2"])


def test_known_classes_that_are_declared_in_another_order() -> None:
    assert known([0, 1, 0], ["a", "b"], ["b", "a"]) == [1, 0, 1]
    with pytest.raises(DataError, match="labels that the model lacks: -1"):
        known([0, -1], ["a", "b"], ["b", "a"])


def test_known_sets_by_name_or_number() -> None:
    def found(labels: list[Any], names: list[str]) -> Any:
        return class_sets_of(rows_of(labels), "label", names, "the file's", by_number=True)["label"][:]

    assert found([["b"], ["a", "b"]], ["a", "b"]) == [[1], [0, 1]]
    assert found([[1], []], ["a", "b"]) == [[1], []]
    with pytest.raises(DataError, match="the file's rows have 1 classes"):
        found([[7]], ["a", "b"])


# ---- forms of labels that files have


def read(labels: list[Any], test: list[Any] | None = None, problem: Any = "single") -> tuple[list[Any], list[str]]:
    """The class numbers of the training rows, and the classes' names."""
    source = Rows(train=rows_of(labels), test=rows_of(labels if test is None else test))
    (train, _), names = TextClassification(problem=problem).read(source)
    return train["label"][:], names


def read_csv(tmp_path: Path, labels: list[str], test: list[str] | None = None) -> tuple[list[Any], list[str]]:
    for name, values in (("train", labels), ("test", test or labels)):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"t{n},{one}\n" for n, one in enumerate(values)))
    files = Files(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"))
    (train, _), names = TextClassification().read(files)
    return train["label"][:], names


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9", "mixed"], ["10", "9", "mixed"]),
        (["01", "1", "10"], ["01", "1", "10"]),
        (["1.0", "0.0"], ["0", "1"]),
        (["1.0", "0.5", "1"], ["0.5", "1", "1.0"]),
        (["True", "False"], ["False", "True"]),
        (["red", "red ", "Red"], ["Red", "red"]),
        ([" 2", "1 "], ["1", "2"]),
    ],
)
def test_classes_of_a_csv(tmp_path: Path, labels: list[str], names: list[str]) -> None:
    assert read_csv(tmp_path, labels)[1] == names


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["False", "True"]),
        (["10", "9"], ["10", "9"]),  # text that is no csv field is in the order of text
        ([10, 9], ["9", "10"]),
        (["red", " red"], None),
    ],
)
def test_classes_of_other_rows(labels: list[Any], names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(DataError, match="all rows have the class 'red'"):
            read(labels)
    else:
        assert read(labels)[1] == names


@pytest.mark.parametrize(
    ("labels", "problem", "message"),
    [
        (["red", " ", "blue"], "single", r"column 'label' is blank in 1 of the training rows \(first: row 1\)"),
        ([["red", ""], ["blue"]], "multi", "column 'label' is blank in 1 of the training rows"),
        ([[0, 1, 0], [1, 0, 0]], "single", r'vectors of zeros and ones, as \[0, 1, 0\], set task.problem = "multi"'),
        ([0.5, 1.0], "single", 'holds float, int, but .* set task.problem = "regression" for numbers'),
        ([[0, 1, 0], [1, 0, 0, 0]], "multi", "names a class twice, or is a vector of another length"),
    ],
)
def test_labels_of_no_class_are_refused(labels: list[Any], problem: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(labels, problem=problem)


@pytest.mark.parametrize("kind", [int, float, bool])
def test_vectors_of_zeros_and_ones_are_sets_of_classes(kind: type) -> None:
    vectors = [[kind(one) for one in row] for row in ([0, 1, 0], [1, 1, 0], [0, 0, 0])]
    numbers, names = read(vectors, problem="multi")
    assert (numbers, names) == ([[1], [0, 1], []], ["0", "1", "2"])
    known = class_sets_of(rows_of(vectors), "label", ["a", "b", "c"], "given", by_number=True)
    assert known["label"][:] == numbers
    with pytest.raises(DataError, match="the test rows does not hold vectors of 3 zeros and ones"):
        read(vectors, [[0, 1]], "multi")


def test_a_class_that_is_named_twice_counts_once() -> None:
    raw, names = sets([["red", "red"], ["blue"]])
    assert class_table(raw.train, "label", len(names)).tolist() == [[0, 1], [1, 0]]
    assert given_twice({"train": raw.train}) == ["1 of 2 train rows name a class twice, which counts once"]
    assert given_twice({"train": sets(LISTS)[0].train}) == []


def test_test_labels_are_names_or_numbers_of_declared_classes() -> None:
    train = rows_of([0, 1], ["red", "blue"])
    for test in (["blue", "red"], [1, 0]):
        (_, rows), names = TextClassification().read(Rows(train=train, test=rows_of(test)))
        assert (rows["label"][:], names) == ([1, 0], ["red", "blue"])


def test_labels_that_training_lacks_are_named() -> None:
    with pytest.raises(DataError, match=r"2 labels that no training row has \(such as 'pink', 'violet'\)"):
        read(["red", "blue"], ["pink", "violet", "red"])

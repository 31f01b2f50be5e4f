"""Partitioners from elsewhere, with and without a data set of their own, and with and without an end."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedlora.core.errors import DataError
from fedlora.population.clients import Population
from fedlora.population.external import from_partitioner

LETTERS = Dataset.from_dict({"text": list("abcdefg")})


class Thirds:
    """As Flower Datasets has it: reading before it is set and setting twice are errors."""

    num_partitions = 3

    def __init__(self, dataset: Any = None, repeat: bool = False) -> None:
        self._dataset = dataset
        self._repeat = repeat

    @property
    def dataset(self) -> Any:
        if self._dataset is None:
            raise AttributeError("The dataset field should be set before using it.")
        return self._dataset

    @dataset.setter
    def dataset(self, dataset: Any) -> None:
        if self._dataset is not None:
            raise ValueError("The dataset should be assigned only once.")
        self._dataset = dataset

    def load_partition(self, partition_id: int) -> Any:
        return self._dataset.select(range(0 if self._repeat else partition_id, len(self._dataset), 3))


class Listed:
    """Two attributes and nothing else: which rows each client gets, and a data set."""

    def __init__(self, hands: list[list[int]], dataset: Any = None, end: type[Exception] = IndexError) -> None:
        self.hands = hands
        self.dataset = dataset
        self.end = end

    def load_partition(self, partition_id: int) -> Any:
        if partition_id >= len(self.hands):
            raise self.end("no such client")
        return self.dataset.select(self.hands[partition_id])


def rows(population: Population) -> list[list[int]]:
    return [population.rows_of(client).tolist() for client in range(len(population))]


def test_a_partitioner_without_a_data_set_is_given_ours() -> None:
    assert rows(from_partitioner(Thirds(), LETTERS)) == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_partitioner_serves_several_runs() -> None:
    partitioner = Thirds()
    first = from_partitioner(partitioner, LETTERS)
    assert rows(from_partitioner(partitioner, LETTERS)) == rows(first)
    # by number, not by content
    listed, alike = Listed([[2, 1], [3, 0]]), Dataset.from_dict({"text": ["x", "y", "x", "x"]})
    for _ in range(2):
        assert rows(from_partitioner(listed, alike)) == [[2, 1], [3, 0]]


def test_rows_dealt_twice_and_empty_clients_are_refused() -> None:
    with pytest.raises(DataError, match="partition 1 has 3 rows that the partitioner assigned more than once"):
        from_partitioner(Thirds(repeat=True), LETTERS)
    with pytest.raises(DataError, match="partition 0 has 1 rows that the partitioner assigned more than once"):
        from_partitioner(Listed([[1, 2, 1]]), LETTERS)
    two = LETTERS.select([0, 1])
    with pytest.raises(DataError, match="1 of 3 clients got no rows"):
        from_partitioner(Thirds(), two)
    assert from_partitioner(Thirds(), two, allow_empty=True).empty == 1


@pytest.mark.parametrize("end", [IndexError, KeyError, ValueError])
def test_clients_end_where_loading_fails(end: type[Exception]) -> None:
    population = from_partitioner(Listed([[5, 0], [6]], end=end), LETTERS)
    assert rows(population) == [[5, 0], [6]]
    assert population.dropped == 4


def test_what_has_no_end_or_no_beginning_is_refused() -> None:
    class Endless(Listed):
        def load_partition(self, partition_id: int) -> Any:
            return self.dataset.select([partition_id] if partition_id < 7 else [])

    with pytest.raises(DataError, match=r"more clients than there are rows \(7\): give it num_partitions"):
        from_partitioner(Endless([]), LETTERS, allow_empty=True)
    with pytest.raises(DataError, match=r"load_partition\(0\) failed \(no such client\)"):
        from_partitioner(Listed([]), LETTERS)


def test_an_error_of_a_counted_partition_is_no_end() -> None:
    class Broken(Thirds):
        def load_partition(self, partition_id: int) -> Any:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        from_partitioner(Broken(), LETTERS)


def test_rows_of_a_data_set_of_its_own_are_recognised_by_content() -> None:
    same = Dataset.from_dict({"text": list("abcdefg"), "note": list("1234567")})
    assert rows(from_partitioner(Thirds(same), LETTERS)) == [[0, 3, 6], [1, 4], [2, 5]]
    assert rows(from_partitioner(Listed([[3, 1], [0, 6, 2]], same), LETTERS)) == [[3, 1], [0, 6, 2]]
    assert same.column_names == ["text", "note"]


def test_rows_that_are_alike_stand_for_each_other_once_each() -> None:
    table = Dataset.from_dict({"text": ["x", "y", "x", "x"]})
    population = from_partitioner(Listed([[2, 1], [3, 0]], table), table)
    assert rows(population) == [[0, 1], [2, 3]]
    with pytest.raises(
        DataError, match="partition 1 has a row that its data set lacks or that the partitioner assigned"
    ):
        from_partitioner(Listed([[0, 2], [3, 0]], table), table)


def test_columns_that_were_encoded_otherwise_do_not_count() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    ours = Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, 1, 1]}, features=features)
    theirs = Dataset.from_dict({"text": ["x", "y", "z"], "label": ["no", "yes", "yes"]})
    assert rows(from_partitioner(Listed([[2], [0, 1]], theirs), ours)) == [[2], [0, 1]]
    ours = Dataset.from_dict({"text": ["x", "x", "z"], "label": [0, 1, 1]}, features=features)
    theirs = Dataset.from_dict({"text": ["x", "x", "z"], "label": ["no", "yes", "yes"]})
    with pytest.raises(DataError, match="rows 0 and 1 differ, but not in text"):
        from_partitioner(Listed([[2], [0, 1]], theirs), ours)


@pytest.mark.parametrize("other", [LETTERS.select(range(6)), LETTERS.select([1, 0, 2, 3, 4, 5, 6])])
def test_other_data_are_refused(other: Any) -> None:
    with pytest.raises(DataError, match=f"holds {len(other)} rows that are not the run's 7 training rows"):
        from_partitioner(Thirds(other), LETTERS)


def test_what_is_no_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="the partitioner's data set is a list"):
        from_partitioner(Thirds(list("abcdefg")), LETTERS)


def test_partitions_must_keep_their_columns() -> None:
    class Forgetful(Listed):
        def load_partition(self, partition_id: int) -> Any:
            return self.dataset.select(self.hands[partition_id]).select_columns(["note"])

    table = Dataset.from_dict({"text": ["x", "y"], "note": ["1", "2"]})
    with pytest.raises(DataError, match="partition 0 came without the column 'fedlora_row'"):
        from_partitioner(Forgetful([[0], [1]]), table)
    with pytest.raises(DataError, match="partition 0 came without the column 'text'"):
        from_partitioner(Forgetful([[0], [1]], table), table)


def test_a_partitioner_that_takes_no_data_set_is_refused() -> None:
    class Fixed:
        num_partitions = 1

        @property
        def dataset(self) -> Any:
            return None

        def load_partition(self, partition_id: int) -> Any:
            return LETTERS

    with pytest.raises(DataError, match="refused the data set"):
        from_partitioner(Fixed(), LETTERS)  # type: ignore[arg-type]

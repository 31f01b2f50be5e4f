"""External partitioners: objects with ``dataset`` and ``load_partition(i)``, such as those of Flower Datasets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from xxhash import xxh3_128_digest

from fedlora.core.errors import DataError
from fedlora.population.clients import Population, population_of
from fedlora.population.partitions import Rows, numbered


class Partitioner(Protocol):
    """The interface required of an external partitioner.

    If it also has ``num_partitions``, it creates that many clients; if not, partitions are loaded from 0 on until
    ``load_partition`` raises ``IndexError``, ``KeyError`` or ``ValueError``.
    """

    dataset: Any
    """If None or unset, fedlora sets it once, with an added column of row numbers. If set, it must be the run's own
    data."""

    def load_partition(self, partition_id: int) -> Any:
        """The rows of one client, as a data set."""


class Table(Protocol):
    """The interface required of the data set given to an external partitioner; ``datasets.Dataset`` has it."""

    column_names: list[str]

    def __len__(self) -> int:
        """The number of rows."""

    def add_column(self, name: str, column: Any) -> Any:
        """A copy with one more column."""

    def with_format(self, type: str) -> Any:
        """A view whose rows are returned in another format."""


ROW_COLUMN = "fedlora_row"
"""The column of row numbers by which ``from_partitioner`` identifies rows."""


def from_partitioner(partitioner: Partitioner, dataset: Table, allow_empty: bool = False) -> Population:
    """The population that an external partitioner creates from a data set.

    A partitioner without a data set is given ``dataset`` with row numbers. One with its own data set must hold the same
    rows in the same order; they are then identified by content, and rows with equal content are interchangeable.

    Args:
        partitioner: see ``Partitioner``.
        dataset: the data set to assign.
        allow_empty: leave clients without rows out and count them, instead of raising.

    Returns:
        The population, with clients named by their partition number.

    Raises:
        DataError: if the partitioner has other data, its rows cannot be identified, it assigns a row twice, creates an
            empty client, or never stops creating clients.
    """
    held = getattr(partitioner, "dataset", None)
    known = _NUMBERED if held is None else _recognise(held, dataset)
    if held is None:
        try:
            partitioner.dataset = dataset.add_column(ROW_COLUMN, np.arange(len(dataset), dtype=np.int64))
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"the partitioner refused the data set ({error}): pass one whose attribute dataset can be set"
            ) from error
    groups: list[Rows] = []
    free = np.ones(len(dataset), dtype=bool)
    for number, part in enumerate(_parts(partitioner, len(dataset))):
        rows = _find(part, known, number)
        repeated = len(rows) - int(free[np.unique(rows)].sum())
        if repeated:
            raise DataError(
                f"partition {number} has {repeated} rows that the partitioner assigned more than once, but a row "
                "belongs to one client: use another partitioner"
            )
        free[rows] = False
        groups.append(rows)
    return population_of(numbered(groups), len(dataset), allow_empty)


class _Known(NamedTuple):
    """The columns by which rows are identified, and the unassigned rows by content."""

    columns: Sequence[str]
    rows: dict[bytes, list[int]]


_NUMBERED = _Known((ROW_COLUMN,), {})


def _recognise(held: Any, dataset: Table) -> _Known:
    try:
        theirs, ours = (_values(held), _values(dataset)) if len(held) == len(dataset) else ({}, {})
    except (AttributeError, TypeError) as error:
        raise DataError(
            f"the partitioner's data set is a {type(held).__name__}, which cannot be read as a datasets.Dataset "
            f"({error}): pass a partitioner without a data set"
        ) from error
    columns = [name for name in ours if theirs.get(name) == ours[name]]
    if not columns:
        raise DataError(
            f"the partitioner holds {len(held)} rows that are not the run's {len(dataset)} training rows: pass a "
            "partitioner without a data set, or with that of "
            "fedlora.config.federated_data.prepare(experiment).task.table()"
        )
    if ROW_COLUMN in theirs:  # an earlier call added the row numbers
        return _NUMBERED
    rows = defaultdict(list)
    for row, digest in reversed([*enumerate(_digests(ours, columns))]):  # rows are popped from the end
        rows[digest].append(row)
    whole = _digests(ours, list(ours))
    for same in rows.values():
        if len({whole[row] for row in same}) > 1:
            raise DataError(
                f"rows {same[-1]} and {same[-2]} differ, but not in {', '.join(columns)}, which is all that the "
                "partitioner's data share with the run's: pass a partitioner without a data set"
            )
    return _Known(columns, rows)


def _find(part: Any, known: _Known, number: int) -> Rows:
    """The row numbers of a partition, (rows,) int64."""
    lacking = [name for name in known.columns if name not in part.column_names]
    if lacking:
        raise DataError(
            f"partition {number} came without the column {lacking[0]!r}, by which its rows are recognised: use a "
            "partitioner that keeps all columns"
        )
    if known is _NUMBERED:
        return np.array(list(part[ROW_COLUMN]), dtype=np.int64)
    found = []
    for digest in _digests(_values(part), known.columns):
        if not known.rows.get(digest):
            raise DataError(
                f"partition {number} has a row that its data set lacks or that the partitioner assigned more "
                "than once, but a row belongs to one client: use another partitioner"
            )
        found.append(known.rows[digest].pop())
    return np.array(found, dtype=np.int64)


def _parts(partitioner: Partitioner, limit: int) -> Iterator[Any]:
    """The partitions in order; without ``num_partitions``, until the partitioner has no more."""
    num = getattr(partitioner, "num_partitions", None)
    for number in range(limit + 1 if num is None else num):
        try:
            part = partitioner.load_partition(number)
        except (IndexError, KeyError, ValueError) as error:
            if num is not None:
                raise
            if number == 0:
                raise DataError(
                    f"load_partition(0) failed ({error}): the first client must have the number 0"
                ) from error
            return
        yield part
    if num is None:
        raise DataError(
            f"the partitioner makes more clients than there are rows ({limit}): give it num_partitions, or let "
            "load_partition raise IndexError after the last one"
        )


def _values(dataset: Any) -> dict[str, list[Any]]:
    """The content of each column as plain Python values."""
    table = dataset.with_format("arrow")[:]
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _digests(table: dict[str, list[Any]], columns: Sequence[str]) -> list[bytes]:
    """A hash of each row's values in some columns."""
    return [xxh3_128_digest(ascii(row).encode()) for row in zip(*(table[name] for name in columns), strict=True)]

"""Partitions: how the rows of a data set are assigned to clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.component import MODEL_CONFIG, Count, Positive, by_kind, dataclass
from fedlora.core.errors import DataError
from fedlora.core.slots import Slot

Rows = NDArray[np.int64]
"""Row numbers of the data set, int64."""
Values = NDArray[Any]

MAX_DRAWS = 1000
"""Maximum number of redraws of a partition with a minimum size before giving up."""


class Assignment(NamedTuple):
    """Rows assigned to clients: ``groups[i]`` are the row numbers of the client named ``names[i]``."""

    groups: list[Rows]
    names: list[str]


class Partition(ABC):
    """Assigns the rows of a data set to clients; every row goes to at most one client."""

    skewed: ClassVar[bool] = False
    """Whether rows are assigned by class, so that at least two classes are needed."""

    @abstractmethod
    def split(self, labels: Values, column: Values | None, num_clients: int, rng: np.random.Generator) -> Assignment:
        """Assigns the rows to clients.

        Args:
            labels: (rows,) integer class numbers, of the classes that ``clients.skew`` defines.
            column: (rows,) the values that name each row's natural client, or None; only ``Natural`` reads it.
            num_clients: number of clients to create.
            rng: the only source of randomness.

        Returns:
            One int64 array of row numbers per client (some may be empty), and the clients' names.

        Raises:
            DataError: if the rows cannot be assigned as specified.
        """


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Iid(Partition):
    """Rows shuffled and split into parts whose sizes differ by at most one: every client sees the same distribution."""

    kind: Literal["iid"] = "iid"

    def split(self, labels: Values, column: Values | None, num_clients: int, rng: np.random.Generator) -> Assignment:
        return numbered(np.array_split(rng.permutation(len(labels)), num_clients))


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Pooled(Partition):
    """One client holds every row, in data set order: centralised training. ``num_clients`` is ignored."""

    kind: Literal["pooled"] = "pooled"

    def split(self, labels: Values, column: Values | None, num_clients: int, rng: np.random.Generator) -> Assignment:
        return Assignment([np.arange(len(labels), dtype=np.int64)], ["0"])


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Dirichlet(Partition):
    """Label skew from Dirichlet draws, by one of three schemes; N rows, K clients, C classes, class proportions p.

    - ``flasc`` (FLASC's code): ``R[k] ~ Dir(alpha 1_C)``, ``R[:, c] /= sum_k R[k, c]``; client k gets
      ``round(R[k, c] * N_c)`` rows of class c, taken from the class in data set order. Sizes are nearly equal; rounding
      drops a few rows (about 2 % with 26 rows per client).
    - ``fednlp`` (FedNLP's and FedPETuning's code): ``q ~ Dir(alpha p)``; each client gets floor(N / K) rows in
      proportions q; if a class is exhausted, the rest is filled from the client's other classes. The last client takes
      the remainder. Concentration per class is alpha / C, so its alpha is about C times that of ``flasc``.
    - ``hsu`` (class over clients, as in most later code): ``q_c ~ Dir(alpha 1_K)`` splits class c over the clients that
      hold fewer than N / K rows so far. Sizes vary widely.

    Args:
        alpha: concentration, > 0; smaller is more skewed. Its meaning depends on the scheme, so always state both.
        scheme: one of the three schemes.
        min_examples: minimum rows per client; ``flasc`` and ``hsu`` redraw until it is met, while ``fednlp`` gives all
            clients equal sizes. Default: 10 for ``hsu``, as in its code, and no minimum for the others.

    References:
        Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution" (arXiv 1909.06335);
        Lin et al., FedNLP (arXiv 2104.08815); Kuo et al., FLASC (arXiv 2406.05233).
    """

    skewed: ClassVar[bool] = True

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: Positive = 0.1
    scheme: Literal["flasc", "fednlp", "hsu"] = "flasc"
    min_examples: Count | None = None

    def split(self, labels: Values, column: Values | None, num_clients: int, rng: np.random.Generator) -> Assignment:
        classes = _by_class(labels)
        counts = np.array([len(rows) for rows in classes], dtype=np.int64)
        draw = {"flasc": self._flasc, "fednlp": self._fednlp, "hsu": self._hsu}[self.scheme]
        least = self.min_examples or (10 if self.scheme == "hsu" else 0)
        table = _redraw(
            lambda: draw(counts, num_clients, rng), least, num_clients, int(counts.sum()), f"alpha = {self.alpha:g}"
        )
        if self.scheme != "flasc":
            classes = [rng.permutation(rows) for rows in classes]
        # owner[j] is the client of the j-th row in class order; -1 means no client
        clients = np.arange(num_clients)
        owner = np.full(int(counts.sum()), -1, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        for index, start in enumerate(starts):
            dealt = np.repeat(clients, table[:, index])
            owner[start : start + len(dealt)] = dealt
        return numbered(_gather(np.concatenate(classes), owner, num_clients))

    def _flasc(self, counts: Rows, num_clients: int, rng: np.random.Generator) -> Rows:
        shares = rng.dirichlet(np.full(len(counts), self.alpha), num_clients)
        totals = shares.sum(axis=0)
        if not totals.all():
            raise DataError(
                f"with alpha = {self.alpha:g} no client drew any of {int((totals == 0).sum())} classes, but "
                "every class must be assigned: use a larger alpha or more clients"
            )
        rounded = np.round(shares / totals * counts).astype(np.int64)
        # counts that were rounded up run out of rows at the end of the class
        table: Rows = np.diff(np.minimum(np.cumsum(rounded, axis=0), counts), axis=0, prepend=0)
        return table

    def _fednlp(self, counts: Rows, num_clients: int, rng: np.random.Generator) -> Rows:
        size = int(counts.sum()) // num_clients
        left = counts.copy()
        table = np.zeros((num_clients, len(counts)), dtype=np.int64)
        for client in range(num_clients):
            table[client] = _fill(rng.dirichlet(self.alpha * counts / counts.sum()), size, left)
            left -= table[client]
        table[-1] += left
        return table

    def _hsu(self, counts: Rows, num_clients: int, rng: np.random.Generator) -> Rows:
        table = np.zeros((num_clients, len(counts)), dtype=np.int64)
        sizes = np.zeros(num_clients, dtype=np.int64)
        for index, count in enumerate(counts):
            hungry = sizes < counts.sum() / num_clients
            shares = rng.dirichlet(np.full(num_clients, self.alpha)) * hungry
            shares = shares if shares.sum() > 0 else hungry.astype(float)
            table[:, index] = _cut(shares / shares.sum(), int(count))
            sizes += table[:, index]
        return table


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Quantity(Partition):
    """Quantity skew: client sizes ``~ Dir(beta 1_K)`` of all rows, ignoring classes.

    Args:
        beta: concentration, > 0; smaller is more unequal.
        min_examples: minimum rows per client; sizes are redrawn until it is met.

    References:
        Li et al., "Federated learning on non-IID data silos" (arXiv 2102.02079).
    """

    kind: Literal["quantity"] = "quantity"
    beta: Positive = 0.5
    min_examples: Count = 10

    def split(self, labels: Values, column: Values | None, num_clients: int, rng: np.random.Generator) -> Assignment:
        def draw() -> Rows:
            return _cut(rng.dirichlet(np.full(num_clients, self.beta)), len(labels))[:, None]

        table = _redraw(draw, self.min_examples, num_clients, len(labels), f"beta = {self.beta:g}")
        return numbered(np.split(rng.permutation(len(labels)), np.cumsum(table[:-1, 0])))


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Shards(Partition):
    """Rows sorted by class and cut into equal shards, assigned at random: each client sees few classes.

    Args:
        shards_per_client: number of shards per client; 2 in the paper.

    References:
        McMahan et al., "Communication-efficient learning of deep networks" (arXiv 1602.05629), section 3.
    """

    skewed: ClassVar[bool] = True

    kind: Literal["shards"] = "shards"
    shards_per_client: Count = 2

    def split(self, labels: Values, column: Values | None, num_clients: int, rng: np.random.Generator) -> Assignment:
        num_shards = num_clients * self.shards_per_client
        if num_shards > len(labels):
            raise DataError(
                f"{num_clients} clients with {self.shards_per_client} shards each need {num_shards} rows or more, but "
                f"there are {len(labels)}: use fewer clients or fewer shards_per_client"
            )
        shards = np.array_split(np.concatenate(_by_class(labels)), num_shards)
        hands = rng.permutation(num_shards).reshape(num_clients, self.shards_per_client)
        return numbered([np.concatenate([shards[shard] for shard in hand]) for hand in hands])


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Natural(Partition):
    """One client per distinct value of a column (an author, a site, a file), in sorted order.

    ``num_clients`` is ignored: the data determine the number of clients. The assignment is deterministic.

    Args:
        column: the column whose value names a row's client.
        min_examples: clients with fewer rows are left out, and their rows are counted as dropped.
    """

    kind: Literal["natural"] = "natural"
    column: str
    min_examples: Count = 1

    def split(self, labels: Values, column: Values | None, num_clients: int, rng: np.random.Generator) -> Assignment:
        if column is None:
            raise DataError(
                f"the natural partition needs the values of column '{self.column}', but got none: pass that column"
            )
        values = np.asarray(column)
        missing = sum(value is None or value != value for value in values.tolist())
        if missing:
            raise DataError(
                f"column '{self.column}' has no value in {missing} of {len(values)} rows, but every row must name its "
                "client: fill or remove those rows"
            )
        distinct, owner = np.unique(values, return_inverse=True)
        groups = _gather(np.arange(len(values), dtype=np.int64), owner.reshape(-1), len(distinct))
        kept = [index for index, group in enumerate(groups) if len(group) >= self.min_examples]
        if not kept:
            raise DataError(
                f"none of the {len(distinct)} clients of column '{self.column}' has min_examples = {self.min_examples} "
                f"rows (the largest has {max(map(len, groups), default=0)}): use a smaller min_examples"
            )
        return Assignment([groups[index] for index in kept], [str(distinct[index]) for index in kept])


if TYPE_CHECKING:
    AnyPartition = Partition
else:
    AnyPartition = Annotated[
        Iid | Pooled | Dirichlet | Quantity | Shards | Natural,
        Slot("partition", Partition),
    ]
"""Any partition, discriminated by ``kind``."""

PARTITIONS: dict[str, type[Partition]] = by_kind(AnyPartition)
"""The partitions by ``kind``."""


def numbered(groups: list[Rows]) -> Assignment:
    """An assignment to clients named ``"0"``, ``"1"`` and so on."""
    return Assignment(groups, [str(index) for index in range(len(groups))])


def _redraw(draw: Callable[[], Rows], least: int, num_clients: int, total: int, setting: str) -> Rows:
    """Redraws a ``(clients, classes)`` count table until each client has ``least`` rows; 0 takes the first draw."""
    problem = f"{num_clients} clients cannot each have min_examples = {least} of {total} rows"
    mend = f"use fewer clients, a larger {setting.split()[0]} or a smaller min_examples"
    if least * num_clients > total:
        raise DataError(f"{problem}, which needs {least * num_clients}: {mend}")
    for _ in range(MAX_DRAWS):
        table = draw()
        if table.sum(axis=1).min() >= least:
            return table
    raise DataError(f"{problem} at {setting} in {MAX_DRAWS} draws: {mend}")


def _cut(shares: NDArray[np.float64], count: int) -> Rows:
    """``count`` rows split at the cumulative ``shares``, (clients,) int64."""
    cuts = (np.cumsum(shares)[:-1] * count).astype(np.int64)
    return np.diff(cuts, prepend=0, append=count)


def _by_class(labels: Values) -> list[Rows]:
    """The rows of each class that occurs, in data set order."""
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[order], return_index=True)
    return np.split(order, starts[1:])


def _gather(rows: Rows, owner: Rows, num_clients: int) -> list[Rows]:
    """``rows`` by client, in their order; owner -1 means no client."""
    dealt = owner >= 0
    order = np.argsort(owner[dealt], kind="stable")
    sizes = np.bincount(owner[dealt], minlength=num_clients)
    return np.split(rows[dealt][order], np.cumsum(sizes)[:-1])


def _fill(shares: NDArray[np.float64], size: int, left: Rows) -> Rows:
    """``size`` rows in ``shares`` of the classes, at most what is ``left`` of each; other classes fill the gap."""
    take = np.zeros_like(left)
    while (need := size - int(take.sum())) > 0:
        room = left - take
        weights = np.where(room > 0, shares, 0.0)
        weights = weights if weights.sum() > 0 else room.astype(float)
        exact = weights / weights.sum() * need
        ask = np.floor(exact).astype(np.int64)
        # largest remainders make the sum exact
        ask[np.argsort(ask - exact, kind="stable")[: need - int(ask.sum())]] += 1
        take += np.minimum(ask, room)
    return take

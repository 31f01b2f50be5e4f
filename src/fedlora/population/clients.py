"""The population that a partition creates from a data set, and the cohort of a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.component import MODEL_CONFIG, Count, Part, dataclass
from fedlora.core.errors import ConfigError, DataError, shown
from fedlora.core.network import Network, parse_network
from fedlora.core.slots import kind_of
from fedlora.population.partitions import AnyPartition, Assignment, Dirichlet, Natural, Pooled, Rows
from fedlora.population.skew import AnySkew, Label
from fedlora.population.tiers import Tier, check_tiers


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Clients:
    """The clients of an experiment: how rows are assigned to them, and how many take part in a round.

    Args:
        partition: how rows are assigned.
        num: number of clients (``Pooled`` creates one, ``Natural`` as many as the data have).
        per_round: number of clients sampled for a round.
        sampling: ``fixed`` draws ``per_round`` clients without replacement; ``poisson`` draws each client independently
            with the same probability, ``per_round`` on average and possibly none, which gives the tightest privacy
            accounting.
        test_clients: share of the natural clients, in [0, 1), held out entirely as the test set; ``Natural`` only.
        allow_empty: leave clients without rows out of the population and count them, instead of raising.
        skew: defines a row's class; ``Dirichlet`` and ``Shards`` assign rows by it, summaries and plots show it.
        holdout: share of each client's rows, in [0, 1), that it keeps out of training as its own test set.
        tiers: classes of clients that deviate from the recipe.
        tier_column: the column read by tiers that use ``values``.
        network: the network between the server and a client, such as ``down=10Mbit,up=1Mbit,latency=50ms``; with it,
            the ledger estimates the duration of each round. Tiers may have others.

    Raises:
        ConfigError: if tier membership is ambiguous, if ``test_clients`` is set without ``Natural``, or if
            ``per_round`` exceeds the number of clients.
    """

    partition: AnyPartition = Dirichlet(alpha=0.1)
    num: Count = 100
    per_round: Count = 10
    sampling: Literal["fixed", "poisson"] = "fixed"
    test_clients: Part = 0.0
    allow_empty: bool = False
    skew: AnySkew = Label()
    holdout: Part = 0.0
    tiers: tuple[Tier, ...] = ()
    tier_column: str | None = None
    network: str = ""

    def __post_init__(self) -> None:
        check_tiers(self.tiers, self.tier_column)
        if not self.network and any(tier.network for tier in self.tiers):
            raise ConfigError("a tier has a network, and the other clients have none; set clients.network too")
        self.networks()
        if isinstance(self.partition, Natural):
            return
        if self.test_clients:
            raise ConfigError(
                f"clients.test_clients = {self.test_clients:g} holds whole users out for testing, which needs a "
                f"natural partition, not '{kind_of(self.partition)}': set it to 0 or use kind = \"natural\""
            )
        check_per_round(self.per_round, 1 if isinstance(self.partition, Pooled) else self.num)

    def networks(self, network: str = "") -> dict[str, Network]:
        """The network of each tier by name, with that of clients without a tier under an empty name; empty without any.

        Args:
            network: the network of all clients, which overrides the settings here.

        Raises:
            ConfigError: the text does not describe a network.
        """
        if not (network or self.network):
            return {}
        own = {tier.name: network or tier.network or self.network for tier in self.tiers}
        return {name: parse_network(words) for name, words in {"": network or self.network, **own}.items()}

    def column(self) -> str | None:
        """The name of the column that the partition reads, or None."""
        return self.partition.column if isinstance(self.partition, Natural) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """All clients, flat in memory: client i holds ``rows[offsets[i]:offsets[i + 1]]``.

    Args:
        names: the clients' names.
        rows: (assigned,) int64, the concatenated row numbers of all clients.
        offsets: (clients + 1,) int64.
        dropped: number of rows of the data set that no client holds (and that are not test rows).
        empty: number of clients left out because they had no rows.
        held_out: number of rows that clients keep out of training, see ``hold_out``.
    """

    names: tuple[str, ...]
    rows: Rows
    offsets: Rows
    dropped: int = 0
    empty: int = 0
    held_out: int = 0

    def __len__(self) -> int:
        """The number of clients."""
        return len(self.names)

    def rows_of(self, client: int) -> Rows:
        """The row numbers of one client, (rows,) int64, a read-only view."""
        return self.rows[self.offsets[client] : self.offsets[client + 1]]

    def sizes(self) -> Rows:
        """The number of rows of each client, (clients,) int64."""
        return np.diff(self.offsets)


class Division(NamedTuple):
    """A population, and the rows of the clients held out for testing ((rows,) int64, ascending) or None."""

    population: Population
    test_rows: Rows | None


def build_population(
    clients: Clients, labels: NDArray[Any] | Sequence[int], column: NDArray[Any] | Sequence[Any] | None, seed: int
) -> Division:
    """Assigns a data set to clients.

    Args:
        clients: the partition and its settings.
        labels: (rows,) integer class numbers, of the classes that ``clients.skew`` defines; zeros without classes.
        column: (rows,) values of ``clients.column()``, or None.
        seed: the same seed gives the same assignment.

    Returns:
        The population, and the rows of held-out test clients if ``clients.test_clients`` is set.

    Raises:
        DataError: if there are no rows, fewer rows than clients, clients without rows, too few classes for label skew,
            labels that are not class numbers, or if the lengths differ.
    """
    labels = np.asarray(labels)
    names = None if column is None else np.asarray(column)
    _check(clients, labels, names)
    rng = np.random.default_rng(seed)
    deal = clients.partition.split(labels, names, clients.num, rng)
    _check_deal(kind_of(clients.partition), deal, len(labels))
    if not clients.test_clients:
        return Division(population_of(deal, len(labels), clients.allow_empty), None)
    if (num := len(deal.groups)) < 2:
        raise DataError(
            f"there are {num} natural clients, but holding some out for testing needs 2 or more: set test_clients = 0"
        )
    train, test_rows = hold_out_clients(deal, clients.test_clients, rng)
    return Division(population_of(train, len(labels) - len(test_rows), clients.allow_empty), test_rows)


def hold_out_clients(deal: Assignment, share: float, rng: np.random.Generator) -> tuple[Assignment, Rows]:
    """Removes a share of the clients, at least one and not all; also returns their rows ((rows,) int64, ascending)."""
    num = len(deal.groups)
    held = set(rng.permutation(num)[: num_held_out(num, share)].tolist())
    rows = np.sort(np.concatenate([deal.groups[client] for client in sorted(held)]))
    kept = [client for client in range(num) if client not in held]
    return Assignment([deal.groups[client] for client in kept], [deal.names[client] for client in kept]), rows


def num_held_out(num: int, share: float) -> int:
    """How many of ``num`` clients a share of them is: at least one and not all; none of the share 0."""
    return min(max(round(share * num), 1), num - 1) if share else 0


def hold_out(population: Population, share: float, seed: int) -> tuple[Population, dict[int, Rows]]:
    """Holds out a share of every client's rows from training, at least one and not all.

    Args:
        population: the clients.
        share: in [0, 1); 0 holds out nothing.
        seed: together with the client's number, it determines which rows are held out.

    Returns:
        The clients with their training rows, and the rows ((rows,) int64, ascending) that each client holds out; a
        client with one row trains on it and holds out none.
    """
    if not share:
        return population, {}
    trained, held = [], {}
    for client in range(len(population)):
        rows = population.rows_of(client)
        num = min(max(round(share * len(rows)), 1), len(rows) - 1)
        chosen = np.zeros(len(rows), dtype=bool)
        chosen[np.random.default_rng([seed, client]).choice(len(rows), num, replace=False)] = True
        trained.append(rows[~chosen])
        if num:
            held[client] = np.sort(rows[chosen])
    # clients without rows were removed already, and every client keeps at least one
    left = population_of(Assignment(trained, list(population.names)), len(population.rows), allow_empty=False)
    return dataclasses.replace(
        left, dropped=population.dropped, empty=population.empty, held_out=sum(map(len, held.values()))
    ), held


def draw_cohort(
    population: Population, per_round: int, seed: int, sampling: Literal["fixed", "poisson"] = "fixed"
) -> tuple[int, ...]:
    """Samples a cohort: ``per_round`` clients without replacement, or each with probability ``per_round / clients``.

    Args:
        population: the population to sample from.
        per_round: number of clients, or its expectation.
        seed: the same seed draws the same clients in the same order.
        sampling: ``fixed`` or ``poisson``.

    Returns:
        Client numbers in the order they were drawn.

    Raises:
        ConfigError: if there are fewer clients than ``per_round``.
    """
    check_per_round(per_round, len(population))
    rng = np.random.default_rng(seed)
    if sampling == "poisson":
        drawn = np.flatnonzero(rng.random(len(population)) < per_round / len(population))
    else:
        drawn = rng.choice(len(population), size=per_round, replace=False)
    return tuple(int(client) for client in drawn)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Size and skew of a population's clients.

    Args:
        num_clients: number of clients with rows.
        num_examples: total number of their rows.
        min_size: rows of the smallest client.
        median_size: median rows of a client.
        max_size: rows of the largest client.
        top_class_share: median over clients of the share of the client's most frequent class, in [0, 1].
        effective_classes: median over clients of exp(entropy of the client's classes), from 1 to ``num_classes``.
        num_single_class: number of clients with a single class.
        num_empty: number of clients without rows.
        dropped: number of rows that no client holds.
        held_out: number of rows that clients keep out of training; the other figures describe their training rows.
    """

    num_clients: int
    num_examples: int
    min_size: int
    median_size: float
    max_size: int
    top_class_share: float
    effective_classes: float
    num_single_class: int
    num_empty: int
    dropped: int
    held_out: int

    def as_dict(self) -> dict[str, int | float]:
        """The figures by name."""
        return dataclasses.asdict(self)


def summarise(population: Population, labels: NDArray[Any] | Sequence[int], num_classes: int) -> Summary:
    """Size and skew of a population's clients.

    Args:
        population: the clients.
        labels: (rows,) class numbers of the whole data set, in [0, num_classes).
        num_classes: number of classes.

    Returns:
        The figures; clients without rows count only in ``num_empty``.
    """
    sizes = population.sizes()
    owner = np.repeat(np.arange(len(population)), sizes)
    cells = owner * num_classes + np.asarray(labels)[population.rows]
    counts = np.bincount(cells, minlength=len(population) * num_classes).reshape(-1, num_classes)[sizes > 0]
    shares = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    filled = sizes[sizes > 0]
    return Summary(
        num_clients=len(filled),
        num_examples=int(filled.sum()),
        min_size=int(filled.min()),
        median_size=float(np.median(filled)),
        max_size=int(filled.max()),
        top_class_share=float(np.median(shares.max(axis=1))),
        effective_classes=float(np.median(np.exp(entropy))),
        num_single_class=int(((counts > 0).sum(axis=1) == 1).sum()),
        num_empty=population.empty + int((sizes == 0).sum()),
        dropped=population.dropped,
        held_out=population.held_out,
    )


def check_per_round(per_round: int, num: int) -> None:
    """Refuses cohorts larger than the population.

    Raises:
        ConfigError: ``per_round`` exceeds ``num``.
    """
    if per_round > num:
        raise ConfigError(
            f"clients.per_round = {per_round} exceeds the {num} client{'s' * (num != 1)} there are: set it to {num} "
            "or less"
        )


def population_of(deal: Assignment, total: int, allow_empty: bool) -> Population:
    """The population of an assignment.

    Args:
        deal: rows by client.
        total: number of rows to assign.
        allow_empty: leave clients without rows out and count them, instead of raising.

    Raises:
        DataError: a client has no rows although ``allow_empty`` is not set, or no client has any.
    """
    kept = [index for index, group in enumerate(deal.groups) if len(group)]
    empty = len(deal.groups) - len(kept)
    if (empty and not allow_empty) or not kept:
        raise DataError(
            f"{empty} of {len(deal.groups)} clients got no rows, but each needs one at least: use fewer clients or a "
            "larger alpha, or set clients.allow_empty = true to leave them out"
        )
    groups = [deal.groups[index] for index in kept]
    rows = np.concatenate(groups).astype(np.int64)
    offsets = np.cumsum([0, *map(len, groups)], dtype=np.int64)
    rows.flags.writeable = offsets.flags.writeable = False
    return Population(tuple(deal.names[index] for index in kept), rows, offsets, total - len(rows), empty)


def _check_deal(partition: str, deal: Assignment, num_rows: int) -> None:
    """Rejects an assignment that is none, as a partition of the user's own may return it."""
    if not isinstance(deal, Assignment):
        raise DataError(
            f"the partition {partition!r} returned {shown(deal)}, but Assignment(groups, names) was expected: correct "
            "the class"
        )
    groups = [np.asarray(group) for group in deal.groups]
    filled = [group for group in groups if len(group)]
    rows = np.concatenate(filled or [np.zeros(0, dtype=np.int64)])
    if odd := [group.dtype for group in filled if not np.issubdtype(group.dtype, np.integer)]:
        problem = f"has rows of type {odd[0]}, but their numbers were expected, as np.flatnonzero gives them"
    elif len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
        problem = f"has rows {rows.min()} to {rows.max()}, but there are rows 0 to {num_rows - 1} only"
    elif (num := len(np.unique(rows))) < len(rows):
        problem = f"has {len(rows)} rows of which {num} differ, but a row belongs to one client"
    elif not len(groups) == len(deal.names) == len(set(deal.names)):
        problem = f"has {len(groups)} clients with {len(set(deal.names))} names, but each needs one of its own"
    else:
        return
    raise DataError(f"the assignment of the partition {partition!r} {problem}: correct the class")


def _check(clients: Clients, labels: NDArray[Any], column: NDArray[Any] | None) -> None:
    if labels.ndim != 1 or not len(labels):
        raise DataError(f"labels of shape {labels.shape} were given, but one per row of a non-empty data set is needed")
    if column is not None and len(column) != len(labels):
        raise DataError(f"the client column has {len(column)} rows and the labels {len(labels)}: they must agree")
    partition = clients.partition
    if not isinstance(partition, Natural | Pooled) and clients.num > len(labels):
        raise DataError(
            f"{clients.num} clients were asked for, but there are only {len(labels)} rows: use fewer clients"
        )
    if not partition.skewed:
        return
    if not np.issubdtype(labels.dtype, np.integer) or int(labels.min()) < 0:
        raise DataError(
            f"the '{kind_of(partition)}' partition needs class numbers from 0 for labels: use kind = \"iid\""
        )
    if int(labels.min()) == int(labels.max()):
        raise DataError(
            f"all {len(labels)} rows have class {int(labels[0])}, but the '{kind_of(partition)}' partition skews "
            'classes and needs two or more: set clients.skew to { kind = "clusters" } or to a column, or use '
            'kind = "iid"'
        )

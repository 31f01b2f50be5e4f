"""Heterogeneous clients: tiers that deviate from the recipe, such as weaker devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora.core.component import MODEL_CONFIG, Count, Field, Positive, Share, dataclass
from fedlora.core.errors import ConfigError, DataError
from fedlora.core.rates import LrScale
from fedlora.recipe import Recipe
from fedlora.recipe.refusals import check_tier
from fedlora.transport import Link, RankSlice

_VIEWS = {"dense", "newcomer", "client_mean", "client_worst_tenth", "client_spread"}
"""Prefixes of metrics of models other than the tiers'."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Tier:
    """A class of clients and its deviations from the recipe; settings that are None are as in the recipe.

    One of ``share``, ``values`` and ``clients`` defines its members; all tiers of a run must use the same one.

    Args:
        name: name in the ledger and in metrics.
        share: fraction of all clients; they are assigned in turn, so three tiers with equal shares give client ``i``
            tier ``i mod 3``, as in FLASC's code.
        values: values of the column ``clients.tier_column``; a client belongs by the value that most of its rows have.
        clients: names of its clients.
        rank: number of ranks of each adapter that are sent and trained, out of the recipe's.
        rank_by: which ranks these are: the first ones (``order``), or those of largest norm (``norm``).
        down: the tier's downlink.
        up: the tier's uplink.
        max_steps: the tier's maximum number of optimiser steps.
        batch_size: the tier's batch size.
        lr_scale: the tier's learning rate multipliers of groups and factors on the client.
        compute: the tier's number format of the forward pass.
        timeout_seconds: the tier's time limit for local training.
        network: the tier's network, instead of ``clients.network``.

    Raises:
        ConfigError: metrics with this name would be mistaken for others, or ``rank_by`` has no effect.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")]
    share: Share | None = None
    values: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    rank: Count | None = None
    rank_by: Literal["order", "norm"] = "order"
    down: Link | None = None
    up: Link | None = None
    max_steps: Count | None = None
    batch_size: Count | None = None
    lr_scale: LrScale | None = None
    compute: Literal["fp32", "bf16"] | None = None
    timeout_seconds: Positive | None = None
    network: str = ""

    def __post_init__(self) -> None:
        if self.name in _VIEWS:
            raise ConfigError(
                f"the metrics of a tier {self.name!r} would be mistaken for other metrics; give it another name"
            )
        if self.rank is None and self.rank_by != "order":
            raise ConfigError(
                f"tier {self.name!r} has rank_by, which has no effect without a rank; set rank, or leave it out"
            )

    @property
    def chosen_by(self) -> str:
        """Which of ``share``, ``values`` and ``clients`` is set; empty unless exactly one is."""
        given = [key for key in ("share", "values", "clients") if getattr(self, key)]
        return given[0] if len(given) == 1 else ""

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe for the tier's clients.

        Raises:
            ConfigError: the tier cannot be combined with this recipe.
        """
        check_tier(self, recipe)
        down, rank = self.down or recipe.down, self.rank
        if rank is not None and rank < recipe.tuning.adapter_rank:
            down = replace(down, sparsify=RankSlice(rank=rank, by=self.rank_by))
        keys = ("max_steps", "batch_size", "lr_scale", "compute", "timeout_seconds")
        changes = {key: value for key in keys if (value := getattr(self, key)) is not None}
        return replace(recipe, down=down, up=self.up or recipe.up, local=replace(recipe.local, **changes))


def check_tiers(tiers: Sequence[Tier], column: str | None) -> None:
    """Refuses tiers whose membership is ambiguous.

    Raises:
        ConfigError: the tiers do not define their members in one and the same way.
    """
    if not tiers:
        if column is not None:
            raise ConfigError("clients.tier_column has no effect without clients.tiers; set both, or leave it out")
        return
    way = tiers[0].chosen_by
    if not way or {tier.chosen_by for tier in tiers} != {way}:
        raise ConfigError("each of clients.tiers needs one of share, values and clients, all of them the same one")
    if len({tier.name for tier in tiers}) != len(tiers):
        raise ConfigError("two of clients.tiers have the same name")
    total = sum(tier.share or 0 for tier in tiers)
    if way == "share" and abs(total - 1) > 1e-6:
        raise ConfigError(f"the shares of clients.tiers add up to {total:g}, not to 1")
    members = [member for tier in tiers for member in (*tier.values, *tier.clients)]
    if twice := sorted({member for member in members if members.count(member) > 1}):
        raise ConfigError(f"{twice[0]!r} is named twice in clients.tiers; each client belongs to one tier")
    if (way == "values") != (column is not None):
        raise ConfigError("tiers by values read a column: set clients.tier_column, and only then")


def assign_tiers(
    tiers: Sequence[Tier], names: Sequence[str], rows: Sequence[NDArray[np.int64]], column: NDArray[Any] | None
) -> dict[int, Tier]:
    """The tier of every client, by client number; empty if there are no tiers.

    Args:
        tiers: the tiers, as accepted by ``check_tiers``.
        names: names of the clients.
        rows: row numbers of each client.
        column: values of ``clients.tier_column`` for all rows, or None.

    Raises:
        DataError: a client belongs to no tier, or a named client does not exist.
    """
    if not tiers:
        return {}
    if tiers[0].share is not None:
        return _in_turn(tiers, len(names))
    members: dict[str, Tier] = {}
    for tier in tiers:
        members.update(dict.fromkeys((*tier.values, *tier.clients), tier))
    keys = list(names) if column is None else [_most_frequent(column[own]) for own in rows]
    if column is None and (strange := sorted(set(members) - set(names))):
        raise DataError(f"clients.tiers names the client {strange[0]!r}, which does not exist; there is {names[0]!r}")
    if without := [name for name, key in zip(names, keys, strict=True) if key not in members]:
        raise DataError(f"{len(without)} clients belong to no tier, such as {without[0]!r}; name all in clients.tiers")
    return {client: members[key] for client, key in enumerate(keys)}


def _in_turn(tiers: Sequence[Tier], num: int) -> dict[int, Tier]:
    """Assigns each client to the tier that is furthest below its share so far; ties go to the first."""
    counts = [0] * len(tiers)
    found: dict[int, Tier] = {}
    for client in range(num):
        lacks = [round((tier.share or 0) * (client + 1) - count, 9) for tier, count in zip(tiers, counts, strict=True)]
        chosen = lacks.index(max(lacks))
        counts[chosen] += 1
        found[client] = tiers[chosen]
    return found


def _most_frequent(values: NDArray[Any]) -> str:
    found, counts = np.unique(values.astype(str), return_counts=True)
    return str(found[np.argmax(counts)])


def recipes_of(tiers: Mapping[int, Tier], recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each tier by name."""
    return {tier.name: tier.applied(recipe) for tier in {tier.name: tier for tier in tiers.values()}.values()}

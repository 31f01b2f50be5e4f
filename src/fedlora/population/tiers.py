"""Unequal clients: which of them get and do less than the recipe says."""

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
"""What metrics of other models than the tiers' begin with."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Tier:
    """A kind of client, and what differs for it from the recipe; what is None is as there.

    One of ``share``, ``values`` and ``clients`` says who belongs to it, the same one for all tiers of a run.

    Args:
        name: in the ledger and in metrics.
        share: of all clients; they are dealt out in turn, so equal shares of three tiers give client ``i`` tier
            ``i mod 3``, as FLASC's code has it.
        values: of the column ``clients.tier_column``, which most of a client's rows have.
        clients: their names.
        rank: the first so many ranks of each adapter are sent and trained, of those that the recipe has.
        rank_by: which ranks these are: the first by ``order``, or those of the largest ``norm``.
        down: another downlink.
        up: another uplink.
        max_steps: another number of optimiser steps at most.
        batch_size: another batch size.
        lr_scale: other learning rates of groups and factors on the client.
        compute: another number format of the forward pass.
        timeout_seconds: another limit of a turn.
        network: another network than ``clients.network``.

    Raises:
        ConfigError: metrics with this name would be taken for others, or ``rank_by`` has no effect.
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
            raise ConfigError(f"the metrics of a tier {self.name!r} would be taken for others; give it another name")
        if self.rank is None and self.rank_by != "order":
            raise ConfigError(f"tier {self.name!r} has rank_by, which is read for its rank; set rank, or leave it out")

    @property
    def chosen_by(self) -> str:
        """Which of ``share``, ``values`` and ``clients`` is set; empty unless it is one."""
        given = [key for key in ("share", "values", "clients") if getattr(self, key)]
        return given[0] if len(given) == 1 else ""

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe of its clients.

        Raises:
            ConfigError: the tier cannot go with this recipe.
        """
        check_tier(self, recipe)
        down, rank = self.down or recipe.down, self.rank
        if rank is not None and rank < recipe.tuning.adapter_rank:
            down = replace(down, sparsify=RankSlice(rank=rank, by=self.rank_by))
        keys = ("max_steps", "batch_size", "lr_scale", "compute", "timeout_seconds")
        changes = {key: value for key in keys if (value := getattr(self, key)) is not None}
        return replace(recipe, down=down, up=self.up or recipe.up, local=replace(recipe.local, **changes))


def check_tiers(tiers: Sequence[Tier], column: str | None) -> None:
    """Refuses tiers of which it is not clear who belongs to them.

    Raises:
        ConfigError: the tiers do not say in one way who belongs to them.
    """
    if not tiers:
        if column is not None:
            raise ConfigError("clients.tier_column is read for clients.tiers, and there are none")
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
    """The tier of every client, by its number; nothing if there are no tiers.

    Args:
        tiers: whose membership is clear.
        names: of the clients.
        rows: numbers of each client's rows.
        column: values of ``clients.tier_column`` for all rows, or None.

    Raises:
        DataError: a client belongs to no tier, or a named client is not there.
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
        raise DataError(f"clients.tiers names the client {strange[0]!r}, and there is none; there is {names[0]!r}")
    if without := [name for name, key in zip(names, keys, strict=True) if key not in members]:
        raise DataError(f"{len(without)} clients belong to no tier, such as {without[0]!r}; name all in clients.tiers")
    return {client: members[key] for client, key in enumerate(keys)}


def _in_turn(tiers: Sequence[Tier], num: int) -> dict[int, Tier]:
    """Each client to the tier that lacks most of its share so far, the first of equals."""
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

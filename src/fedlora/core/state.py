"""The values that change from round to round, and the seeds they are drawn with."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.core.schema import Schema
from fedlora.core.store import EMPTY, Memory, Store
from fedlora.core.tree import Tree

SEED_BITS = 48


def named_seed(run_seed: int, purpose: str, *numbers: int) -> int:
    """A seed of its own for every purpose, so that one more draw here never moves a draw there.

    Args:
        run_seed: the seed of the run.
        purpose: what the draw is for (``"cohort"``, ``"client"``, ``"noise"``).
        numbers: round, client, and whatever else tells two draws apart.

    Returns:
        An integer in ``[0, 2**48)``.
    """
    text = "/".join([str(run_seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=SEED_BITS // 8).digest(), "little")


def generator(seed: int) -> torch.Generator:
    """A CPU generator that starts at ``seed``."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Fold:
    """An edit of frozen weights: ``W[m] += scale * B @ A``, or ``W[m] += D``.

    Args:
        factors: module name to ``(B, A)`` of shapes ``(out, r)`` and ``(r, in)``, the same ``r`` for all; the layer
            knows its scale.
        dense: parameter name to a tensor of the parameter's own shape.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dense: Tree = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.factors or self.dense)


@dataclass(frozen=True)
class Folds:
    """All folds of a phase's rounds together, as the server or a client holds them.

    Args:
        version: how many there were.
        total: module name to the sum of ``B @ A``, ``(out, in)``; nothing before the first.
        recent: the last of them, as long as they are smaller than their sum: module name and ``.B`` or ``.A`` to a
            factor. The server's alone.
    """

    version: int = 0
    total: Tree = field(default_factory=dict)
    recent: tuple[Tree, ...] = ()

    @staticmethod
    def of(store: Store) -> Folds:
        """Those that a store holds."""
        if not store:
            return NO_FOLDS
        recent = sorted(int(name) for name in store.trees if name != "total")
        places = tuple(store.trees[str(place)] for place in recent)
        return Folds(store.values.get("version", 0), store.trees.get("total", {}), places)

    def store(self) -> Store:
        """As a store."""
        trees = {"total": self.total, **{str(place): fold for place, fold in enumerate(self.recent)}}
        return Store(trees if self.version else {}, {"version": self.version or None})


NO_FOLDS = Folds()
"""One value for all that know of none."""


class Update(NamedTuple):
    """What one client answered: where it started, what it changed, and how much its word weighs."""

    start: Tree
    delta: Tree
    weight: float


class Change(NamedTuple):
    """What a cohort's updates become.

    Args:
        delta: a step of the trained parameters.
        fold: an edit of the frozen ones.
        store: what the aggregator remembers for the next round.
    """

    delta: Tree
    fold: Fold
    store: Store = EMPTY


class PhaseHandover(NamedTuple):
    """What a phase hands to the next one.

    Args:
        delta: name of a pre-trained parameter to its accumulated change, dense, in the parameter's shape.
        head: the task head's trained values.
    """

    delta: Tree
    head: Tree


@dataclass(frozen=True)
class ClientState:
    """What a client remembers between rounds.

    Args:
        has_setup: whether it holds this phase's setup.
        parts: what the parts of its turn remember.
        kept: what a site calls the rest, where the client's memory is on a site; the server then knows ``has_setup``
            and how many folds there are, and no more.
    """

    has_setup: bool = False
    parts: Memory = field(default_factory=Memory)
    kept: str = ""

    def __bool__(self) -> bool:
        return self.has_setup or bool(self.parts) or bool(self.kept)

    @property
    def folds(self) -> Folds:
        """The edits of frozen weights that it made."""
        return Folds.of(self.parts.store("base"))


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows between two rounds; saving it and loading it changes nothing.

    Args:
        phase: index of the running phase.
        round: rounds finished in all phases together.
        params: the trained parameters, dense, float32.
        init: where this phase started; public.
        schema: what each of them is.
        setup: the message that tells a client of the frozen part (residual, fold, mask seed).
        setup_bytes: its size by kind.
        steps: server steps taken in this phase.
        parts: what the server's parts remember.
        known: what the server remembers of each client, by client number.
        clients: what clients remember, by client number; a simulation keeps it for them.
    """

    phase: int
    round: int
    params: Tree
    init: Tree
    schema: Schema
    setup: bytes = b""
    setup_bytes: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    parts: Memory = field(default_factory=Memory)
    known: Mapping[int, Memory] = field(default_factory=dict)
    clients: Mapping[int, ClientState] = field(default_factory=dict)

    @property
    def folds(self) -> Folds:
        """The edits of frozen weights in this phase's rounds."""
        return Folds.of(self.parts.store("base"))

    def without(self, clients: Collection[int]) -> ServerState:
        """The state in which nothing is known of some clients, so that they are told everything anew."""
        return replace(
            self,
            known={one: memory for one, memory in self.known.items() if one not in clients},
            clients={one: memory for one, memory in self.clients.items() if one not in clients},
        )

"""The state that changes from round to round, and the seeds used in it."""

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
    """A separate seed for every purpose, so that an additional draw for one does not affect the draws for another.

    A generator of PyTorch uses the lower 32 bits (see ``generator``), one of NumPy all 48.

    Args:
        run_seed: the seed of the run.
        purpose: what the draw is for (``"cohort"``, ``"client"``, ``"noise"``).
        numbers: round, client, and whatever else distinguishes two draws.

    Returns:
        An integer in ``[0, 2**48)``.
    """
    text = "/".join([str(run_seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=SEED_BITS // 8).digest(), "little")


def generator(seed: int) -> torch.Generator:
    """A CPU generator that starts at the lower 32 bits of ``seed``: PyTorch's Mersenne Twister ignores the others.

    So two of a run's draws coincide with a probability of ``2 ** -32``. Noise that is to protect data comes from the
    system's secure source, unless a seed is set for tests.
    """
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Fold:
    """An edit of frozen weights: ``W[m] += scale * B @ A``, or ``W[m] += D``.

    Args:
        factors: module name to ``(B, A)`` of shapes ``(out, r)`` and ``(r, in)``, the same ``r`` for all; the layer
            holds its scale.
        dense: parameter name to a tensor of the parameter's own shape.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dense: Tree = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.factors or self.dense)


@dataclass(frozen=True)
class Folds:
    """The accumulated folds of a phase's rounds, as held by the server or a client.

    Args:
        version: the number of folds so far.
        total: module name to the sum of ``B @ A``, ``(out, in)``; empty before the first fold.
        recent: the most recent folds, as long as they are smaller than their sum: module name and ``.B`` or ``.A`` to
            a factor. Held only by the server.
    """

    version: int = 0
    total: Tree = field(default_factory=dict)
    recent: tuple[Tree, ...] = ()

    @staticmethod
    def of(store: Store) -> Folds:
        """Reads the folds from a store."""
        if not store:
            return NO_FOLDS
        recent = sorted(int(name) for name in store.trees if name != "total")
        places = tuple(store.trees[str(place)] for place in recent)
        return Folds(store.values.get("version", 0), store.trees.get("total", {}), places)

    def store(self) -> Store:
        """The folds as a store."""
        trees = {"total": self.total, **{str(place): fold for place, fold in enumerate(self.recent)}}
        return Store(trees if self.version else {}, {"version": self.version or None})


NO_FOLDS = Folds()
"""The shared value for the absence of folds."""


class Update(NamedTuple):
    """One client's update: its initial values, its change, and its weight."""

    start: Tree
    delta: Tree
    weight: float


class Change(NamedTuple):
    """The aggregate of a cohort's updates.

    Args:
        delta: a step of the trained parameters.
        fold: an edit of the frozen ones.
        store: the aggregator's state for the next round.
    """

    delta: Tree
    fold: Fold
    store: Store = EMPTY


class PhaseHandover(NamedTuple):
    """What a phase passes on to the next one.

    Args:
        delta: name of a pre-trained parameter to its accumulated change, in the parameter's shape; a sparse tensor
            (COO) for a large matrix of which few entries were trained.
        head: the task head's trained values.
    """

    delta: Tree
    head: Tree


@dataclass(frozen=True)
class ClientState:
    """What a client remembers between rounds.

    Args:
        has_setup: whether it holds this phase's setup.
        parts: the state of the parts of its turn.
        kept: a site's identifier for the rest, if the client's memory is on a site; the server then has only
            ``has_setup`` and the number of folds.
    """

    has_setup: bool = False
    parts: Memory = field(default_factory=Memory)
    kept: str = ""

    def __bool__(self) -> bool:
        return self.has_setup or bool(self.parts) or bool(self.kept)

    @property
    def folds(self) -> Folds:
        """The edits of frozen weights that the client has applied."""
        return Folds.of(self.parts.store("base"))


@dataclass(frozen=True)
class ServerState:
    """The server's complete state between two rounds; saving and loading it is lossless.

    Args:
        phase: index of the running phase.
        round: rounds finished in all phases together.
        params: the trained parameters, dense, float32.
        init: the initial values of this phase; public. Empty where ``rounds.phases.without_start`` dropped them.
        schema: the leaf of each of them.
        setup: the message that sends a client the frozen part (residual, fold, mask seed).
        setup_bytes: its size by kind.
        steps: server steps taken in this phase.
        parts: the state of the server's parts.
        known: the server's state about each client, by client number.
        clients: the clients' own state, by client number; a simulation keeps it for them.
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
        """The edits of frozen weights made by this phase's rounds."""
        return Folds.of(self.parts.store("base"))

    def without(self, clients: Collection[int]) -> ServerState:
        """The state without the memory of some clients, so that everything is sent to them again."""
        return replace(
            self,
            known={one: memory for one, memory in self.known.items() if one not in clients},
            clients={one: memory for one, memory in self.clients.items() if one not in clients},
        )

"""Edits of frozen weights between rounds, and how clients get to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fedlora.core import tree
from fedlora.core.errors import WireError
from fedlora.core.state import Fold, Folds
from fedlora.core.tree import Tree
from fedlora.transport import wire

Shapes = Mapping[str, tuple[int, int]]
"""``(out, in)`` by module name."""


class FoldMessage(NamedTuple):
    """What brings a client up to the server's folds.

    Args:
        raw: the bytes.
        sizes: their number by kind.
        version: how many folds the client knows afterwards.
        ranks: of the folds that it lacks, in order; nothing if the message holds the sum of all since the start.
    """

    raw: bytes
    sizes: dict[str, int]
    version: int
    ranks: tuple[int, ...]


def extended(folds: Folds, fold: Fold) -> Folds:
    """``folds`` and one more; what is larger than the sum is forgotten.

    Args:
        folds: those before.
        fold: the new one, as factors.

    Raises:
        ValueError: the fold is dense, which only a phase's start can be.
    """
    if fold.dense:
        raise ValueError("a fold between rounds must come as factors")
    newest: Tree = {}
    for name, (b, a) in fold.factors.items():
        newest |= {f"{name}.A": a, f"{name}.B": b}
    newest = dict(sorted(newest.items()))
    total = _added(folds.total, newest)
    recent = (*folds.recent, newest)
    while recent and sum(map(tree.num_entries, recent)) >= tree.num_entries(total):
        recent = recent[1:]
    return Folds(folds.version + 1, total, recent)


def message(folds: Folds, version: int) -> FoldMessage | None:
    """What a client needs that knows of the first ``version`` folds, or None if it knows all.

    Factors of those that it lacks, or the sum of all, whichever has fewer entries. Both travel in float32, so that
    clients and the server hold the same bits.
    """
    if version == folds.version:
        return None
    lacking = folds.recent[version - folds.version :]
    if len(lacking) == folds.version - version:
        named = {f"{place}.{name}": value for place, fold in enumerate(lacking) for name, value in fold.items()}
        ranks = tuple(next(value for name, value in fold.items() if name.endswith(".A")).shape[0] for fold in lacking)
    else:
        named, ranks = folds.total, ()
    packet = wire.pack({"fold": named}, {}, trees=False)
    return FoldMessage(packet.raw, packet.sizes, folds.version, ranks)


def received(told: FoldMessage, known: Folds, shapes: Shapes) -> Folds:
    """The folds after a message.

    Args:
        told: the message; only its bytes are not to be trusted, and its ranks.
        known: what the client knew.
        shapes: of the weights that may be edited.

    Raises:
        WireError: the message is of another form, or larger than the sum of all folds.
    """
    if any(rank < 1 for rank in told.ranks):
        raise WireError(f"The message announces folds of ranks {told.ranks[:4]}; ranks are 1 or more.")
    if sum(told.ranks) * sum(map(sum, shapes.values())) >= sum(rows * columns for rows, columns in shapes.values()):
        raise WireError(f"The message announces folds of ranks {told.ranks[:4]}, which is more than the weights hold.")
    if not told.ranks:
        whole = {name: torch.zeros(()).expand(shapes[name]) for name in sorted(shapes)}
        return Folds(told.version, wire.unpack(told.raw, {"fold": whole})["fold"])
    like: Tree = {}
    for place, rank in enumerate(told.ranks):
        one: dict[str, tuple[int, int]] = {}
        for name, (rows, columns) in shapes.items():
            one |= {f"{name}.A": (rank, columns), f"{name}.B": (rows, rank)}
        like |= {f"{place}.{name}": torch.zeros(()).expand(one[name]) for name in sorted(one)}
    parts = wire.unpack(told.raw, {"fold": like})["fold"]
    total = known.total
    for place in range(len(told.ranks)):
        prefix = f"{place}."
        total = _added(total, {name.removeprefix(prefix): v for name, v in parts.items() if name.startswith(prefix)})
    return Folds(told.version, total)


def _added(total: Tree, fold: Tree) -> Tree:
    """The sum of products and one more, made in the same way by both sides."""
    result: Tree = {}
    for name in sorted(key.removesuffix(".B") for key in fold if key.endswith(".B")):
        # kernels may sum in another order where memory is laid out otherwise
        b, a = (fold[f"{name}.{side}"].clone(memory_format=torch.contiguous_format) for side in "BA")
        product = b @ a
        result[name] = total[name] + product if name in total else product
    return result

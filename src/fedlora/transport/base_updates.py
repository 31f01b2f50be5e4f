"""Edits of frozen weights between rounds, and how they are sent to clients."""

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
    """A message that brings a client up to date with the server's folds.

    Args:
        raw: the bytes.
        sizes: the number of bytes by kind.
        version: the number of folds that the client has afterwards.
        ranks: the ranks of the missing folds, in order; empty if the message holds the sum of all since the start.
    """

    raw: bytes
    sizes: dict[str, int]
    version: int
    ranks: tuple[int, ...]


def extended(folds: Folds, fold: Fold) -> Folds:
    """``folds`` with one more; recent folds that together exceed the size of the sum are discarded.

    Args:
        folds: the previous folds.
        fold: the new one, as factors.

    Raises:
        ValueError: the fold is dense, which is allowed only at a phase's start.
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
    """The message for a client that has the first ``version`` folds, or None if it has them all.

    It holds the factors of the missing folds or the sum of all folds, whichever has fewer entries. Both are sent in
    float32, so that clients and the server hold the same bits.
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


def received(update: FoldMessage, known: Folds, shapes: Shapes) -> Folds:
    """The folds after a message.

    Args:
        update: the message; its bytes and its ranks are untrusted.
        known: the folds that the client had before.
        shapes: the shapes of the weights that may be edited.

    Raises:
        WireError: the message is malformed, or larger than the sum of all folds.
    """
    if any(rank < 1 for rank in update.ranks):
        raise WireError(f"The message announces folds of ranks {update.ranks[:4]}; ranks are 1 or more.")
    if sum(update.ranks) * sum(map(sum, shapes.values())) >= sum(rows * columns for rows, columns in shapes.values()):
        raise WireError(
            f"The message announces folds of ranks {update.ranks[:4]}, which is more than the weights hold."
        )
    if not update.ranks:
        whole = {name: torch.zeros(()).expand(shapes[name]) for name in sorted(shapes)}
        return Folds(update.version, wire.unpack(update.raw, {"fold": whole})["fold"])
    like: Tree = {}
    for place, rank in enumerate(update.ranks):
        one: dict[str, tuple[int, int]] = {}
        for name, (rows, columns) in shapes.items():
            one |= {f"{name}.A": (rank, columns), f"{name}.B": (rows, rank)}
        like |= {f"{place}.{name}": torch.zeros(()).expand(one[name]) for name in sorted(one)}
    parts = wire.unpack(update.raw, {"fold": like})["fold"]
    total = known.total
    for place in range(len(update.ranks)):
        prefix = f"{place}."
        total = _added(total, {name.removeprefix(prefix): v for name, v in parts.items() if name.startswith(prefix)})
    return Folds(update.version, total)


def _added(total: Tree, fold: Tree) -> Tree:
    """The sum of products plus one more, computed in the same way on both sides."""
    result: Tree = {}
    for name in sorted(key.removesuffix(".B") for key in fold if key.endswith(".B")):
        # kernels may sum in a different order for a different memory layout
        b, a = (fold[f"{name}.{side}"].clone(memory_format=torch.contiguous_format) for side in "BA")
        product = b @ a
        result[name] = total[name] + product if name in total else product
    return result

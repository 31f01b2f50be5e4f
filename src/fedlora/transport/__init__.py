"""What travels in one direction, and in what form: the ``Link`` slot and the tables of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedlora.component import STRICT
from fedlora.transport.precision import PRECISIONS, AnyPrecision, BFloat16, Float32, Precision
from fedlora.transport.sparsify import Dense, Sparsifier, TopK
from fedlora.transport.wire import Packet, pack, unpack
from fedlora.tree import Tree

__all__ = [
    "PRECISIONS",
    "SPARSIFIERS",
    "AnyPrecision",
    "AnySparsifier",
    "BFloat16",
    "Dense",
    "Float32",
    "Link",
    "Packet",
    "Precision",
    "Sparsifier",
    "TopK",
    "pack",
    "unpack",
]

AnySparsifier = Annotated[Dense | TopK, Field(discriminator="kind")]
"""Every sparsifier, told apart by ``kind``; a new one is one more class in this line."""

SPARSIFIERS: dict[str, type[Sparsifier]] = {cls.kind: cls for cls in get_args(get_args(AnySparsifier)[0])}
"""The table of sparsifiers, by ``kind``."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Link:
    """One direction of the exchange: what is kept, at what precision, and relative to what.

    Args:
        sparsify: which entries travel; the others arrive as zero.
        precision: the number format of those that do.
        reference: what a zero stands for: the number zero, or the value at the common start that both ends remember
            (``init``). The caller subtracts the reference before ``prepare`` and adds it after decoding.

    >>> Link(sparsify=TopK(density=0.5)).prepare({"a": torch.tensor([1.0, -2.0])}, {"a": "adapter"}, round=0)
    {'a': tensor([ 0., -2.])}
    """

    sparsify: AnySparsifier = Dense()
    precision: AnyPrecision = Float32()
    reference: Literal["zero", "init"] = "zero"

    @property
    def lossy(self) -> bool:
        """Whether what arrives may differ from what was there."""
        return not (isinstance(self.sparsify, Dense) and isinstance(self.precision, Float32))

    def prepare(
        self, tree: Tree, groups: Mapping[str, str], round: int, generator: torch.Generator | None = None
    ) -> Tree:
        """What the receiver will hold: the tree sparsified, then rounded.

        ``unpack(pack({part: prepared}, ...).raw, ...)`` equals ``prepared`` in every entry.

        Args:
            tree: float32 tensors of any shape; not modified.
            groups: the group (``adapter``, ``head``) of every name in ``tree``.
            round: 0-based number of the round.
            generator: the source of randomness, read only by sparsifiers that draw.

        Returns:
            Same names and shapes. Tensors that do not change may be those of ``tree`` itself, so do not write to them.
        """
        return self.precision.round(self.sparsify(tree, groups, round, generator))

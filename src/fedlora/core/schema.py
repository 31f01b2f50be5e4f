"""The schema of trained tensors, built by the tuning: group, role in a round, and low-rank factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fedlora.core.tree import Tree

Role = Literal["shared", "frozen", "personal"]


class Leaf(NamedTuple):
    """One trained tensor.

    Args:
        group: ``adapter`` or ``head``.
        role: ``shared`` is trained and averaged; ``frozen`` keeps its value in this round; ``personal`` is trained but
            never leaves the client.
        factor: ``A`` or ``B`` of a low-rank product ``B A``; empty for other tensors.
        rank_axis: the rank axis of a factor.
        pair: the name of the other factor, if both belong to fedlora's own adapters.
    """

    group: str = "adapter"
    role: Role = "shared"
    factor: str = ""
    rank_axis: int | None = None
    pair: str = ""


class Pair(NamedTuple):
    """Both factors of an adapter, by name, and their module."""

    a: str
    b: str
    module: str


def factor_leaf(factor: str, pair: str = "") -> Leaf:
    """The leaf of an adapter's factor: ranks are the rows of ``A`` and the columns of ``B``."""
    return Leaf("adapter", "shared", factor, 0 if factor == "A" else 1, pair)


class Schema(dict[str, Leaf]):
    """The trained tensors by name, in the model's order.

    >>> Schema({"a": Leaf(), "h": Leaf("head")}).split({"a": torch.ones(1), "h": torch.zeros(1)})
    {'adapter': {'a': tensor([1.])}, 'head': {'h': tensor([0.])}}
    """

    @property
    def groups(self) -> dict[str, str]:
        """The group of each name."""
        return {name: leaf.group for name, leaf in self.items()}

    def names(self, group: str) -> frozenset[str]:
        """The names of a group."""
        return frozenset(name for name, leaf in self.items() if leaf.group == group)

    @property
    def personal(self) -> frozenset[str]:
        """The names of the parameters that never leave a client."""
        return frozenset(name for name, leaf in self.items() if leaf.role == "personal")

    @property
    def pairs(self) -> list[Pair]:
        """Both factors of every adapter that takes part in rounds."""
        return [
            Pair(name, leaf.pair, name.rpartition(".")[0])
            for name, leaf in self.items()
            if leaf.factor == "A" and leaf.pair in self and "personal" not in (leaf.role, self[leaf.pair].role)
        ]

    def sent(self) -> Schema:
        """The schema of what is sent: everything except personal parameters."""
        personal = self.personal
        return Schema({name: leaf for name, leaf in self.items() if name not in personal}) if personal else self

    def split(self, params: Mapping[str, Tensor]) -> dict[str, Tree]:
        """Splits ``params`` into the parts of a message, ``adapter`` and ``head``, leaving out empty groups."""
        parts: dict[str, Tree] = {}
        for group in ("adapter", "head"):
            if names := self.names(group):
                parts[group] = {name: value for name, value in params.items() if name in names}
        return parts

    def join(self, parts: Mapping[str, Tree]) -> Tree:
        """The inverse of ``split``, in the schema's order."""
        return {name: parts[leaf.group][name] for name, leaf in self.items()}

    def as_json(self) -> list[list[Any]]:
        """As JSON values, in order."""
        return [[name, *leaf] for name, leaf in self.items()]

    @staticmethod
    def from_json(value: Iterable[Iterable[Any]]) -> Schema:
        """The inverse of ``as_json``."""
        return Schema({name: Leaf(*rest) for name, *rest in value})

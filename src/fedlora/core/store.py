"""The state that parts keep between rounds, and its single serialised form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedlora.core.tree import Tree


@dataclass(frozen=True)
class Store:
    """The state of one part.

    Args:
        trees: tensors by name.
        values: JSON values by name.
    """

    trees: Mapping[str, Tree] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.trees.values()) or any(value is not None for value in self.values.values())


EMPTY = Store()


class Memory(dict[str, Store]):
    """Stores by part; stateless parts have none."""

    def store(self, part: str) -> Store:
        """A part's store."""
        return self.get(part, EMPTY)

    def tree(self, part: str, name: str) -> Tree:
        """One of a part's trees; empty if absent."""
        return self.store(part).trees.get(name, {})

    def value(self, part: str, name: str) -> Any:
        """One of a part's values; None if absent."""
        return self.store(part).values.get(name)

    def without_trees(self) -> Memory:
        """The memory with values only."""
        return Memory({part: Store(values=store.values) for part, store in self.items() if store.values})

    def having(self, stores: Mapping[str, Store]) -> Memory:
        """This memory with the ``stores`` of some parts replaced."""
        return Memory({part: store for part, store in {**self, **stores}.items() if store})


class Writer:
    """Converts trees and memories to JSON values and one flat set of tensors, each written once."""

    def __init__(self) -> None:
        self.tensors: Tree = {}
        self._keys: dict[int, str] = {}
        self._memory: set[int] = set()

    def tree(self, tree: Tree) -> list[list[str]]:
        """The names of a tree in order, with the keys of their tensors."""
        return [[name, self._key(value)] for name, value in tree.items()]

    def memory(self, memory: Memory) -> dict[str, Any]:
        """The stores of a memory."""
        return {
            part: {"trees": {name: self.tree(tree) for name, tree in store.trees.items()}, "values": dict(store.values)}
            for part, store in memory.items()
        }

    def _key(self, value: Tensor) -> str:
        if id(value) not in self._keys:
            self._keys[id(value)] = str(len(self.tensors))
            held = value.detach().cpu().contiguous()
            # tensor file formats refuse tensors that share memory
            place = held.untyped_storage().data_ptr()
            self.tensors[self._keys[id(value)]] = held.clone() if place in self._memory else held
            self._memory.add(place)
        return self._keys[id(value)]


class Reader:
    """The inverse of ``Writer``: equal trees become one object again.

    Args:
        tensors: by key.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._trees: dict[tuple[tuple[str, str], ...], Tree] = {}

    def tree(self, names: Iterable[Iterable[str]]) -> Tree:
        """A tree from its names and keys.

        Raises:
            KeyError: a tensor is missing.
            ValueError: the values are not pairs of names and keys.
        """
        pairs = tuple((str(name), str(key)) for name, key in names)
        if pairs not in self._trees:
            self._trees[pairs] = {name: self._tensors[key] for name, key in pairs}
        return self._trees[pairs]

    def memory(self, document: Mapping[str, Any]) -> Memory:
        """A memory from the result of ``Writer.memory``."""
        return Memory(
            {
                str(part): Store(
                    {name: self.tree(tree) for name, tree in store["trees"].items()}, dict(store["values"])
                )
                for part, store in document.items()
            }
        )

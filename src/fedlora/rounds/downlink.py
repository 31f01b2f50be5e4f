"""The server's messages to clients in a round, and the model that clients hold afterwards."""

from __future__ import annotations

from typing import NamedTuple

from fedlora.core import tree
from fedlora.core.byte_counts import add_up
from fedlora.core.state import ServerState, named_seed
from fedlora.core.tree import Tree
from fedlora.recipe import Recipe
from fedlora.transport import Packet, RankSlice
from fedlora.transport.base_updates import FoldMessage, message


def view(recipe: Recipe, state: ServerState, seed: int) -> Tree:
    """The parameters as a client would receive them now: sparsified, quantized, with the reference added back.

    This is the model that clients hold and that a run exports. FLASC's code also evaluates it, with a mask that is one
    server step older. Clients that remember the parameters they received last (``memory = "last_round"``) track the
    server's own parameters, each at its own pace; in that case those are returned.
    """
    if recipe.memory == "last_round":
        thin = recipe.down.at(state.steps).sparsify
        # a client of lower rank tracks only its own rank slice
        return thin(state.params, state.schema, state.steps) if isinstance(thin, RankSlice) else state.params
    if not recipe.down.lossy:
        return state.params
    return state.params | Downlink(recipe, state, seed).message({}).start


class Message(NamedTuple):
    """The server's message to a client: packet, reference it is relative to, resulting start parameters, folds."""

    packet: Packet
    reference: str
    start: Tree
    fold: FoldMessage | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by kind."""
        return add_up((self.packet.sizes, self.fold.sizes if self.fold else {}))

    def without_bytes(self) -> Message:
        """The same message without the bytes of the parameters."""
        return self._replace(packet=self.packet._replace(raw=b""))


class Downlink:
    """The messages of one round to its cohort; clients that hold the same parameters receive the same message.

    Args:
        recipe: defines the link and what clients remember.
        state: the state before the round.
        seed: seed of the run.
    """

    def __init__(self, recipe: Recipe, state: ServerState, seed: int) -> None:
        self._recipe, self._state = recipe, state
        self._seed = named_seed(seed, "down", state.round)
        self._schema = state.schema.sent()
        self._sent = {name: state.params[name] for name in self._schema}
        self._made: dict[int, Message] = {}
        self._folds: dict[int, FoldMessage | None] = {}
        self.lost: Tree = state.parts.tree("down", "lost")

    def message(self, held: Tree, version: int = 0) -> Message:
        """The message to a client.

        Args:
            held: the parameters that it holds from earlier rounds; empty if none.
            version: number of folds it has already received.
        """
        if version not in self._folds:
            self._folds[version] = message(self._state.folds, version)
        return self._params(held)._replace(fold=self._folds[version])

    def _params(self, held: Tree) -> Message:
        key = id(held) if held else 0
        if key not in self._made:
            link, init = self._recipe.down, self._state.init
            known = [("last_round", held)] if held else []
            known += [("init", {name: init[name] for name in self._schema})] if link.reference == "init" else []
            if link.lossy:  # the closest reference leaves the smallest error
                known = known[:1] or [("zero", {})]
                self._made[key] = self._encode(*known[0])
            else:
                whole = self._encode("zero", {})
                others = [self._encode(*reference) for reference in known]
                self._made[key] = min([whole, *others], key=lambda message: len(message.packet.raw))
        return self._made[key]

    def _encode(self, reference: str, base: Tree) -> Message:
        link, lost = self._recipe.down, self._state.parts.tree("down", "lost")
        tree_sent = tree.subtract(self._sent, base) if base else self._sent
        if lost:
            tree_sent = tree.add(tree_sent, lost)
        packet = link.send(tree_sent, self._schema, self._state.steps, self._seed, reference)
        arrived = self._schema.join(packet.trees)
        if link.feedback:
            self.lost = tree.subtract(tree_sent, arrived)
        if base:
            arrived = tree.add(base, arrived)
        elif not lost and not link.lossy and tree.have_same_bits(self._sent, arrived):
            arrived = self._sent  # one copy less in memory
        return Message(packet._replace(trees={}), reference, arrived)

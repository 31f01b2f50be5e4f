"""An aggregator that only counts votes."""

from dataclasses import dataclass
from typing import ClassVar

from fedlora.parts import Accumulator, Aggregator, Change, Fold, Needs, Schema, Store, TrainingError, Tree, Update


@dataclass(frozen=True, kw_only=True)
class MajoritySign(Aggregator):
    """A step of fixed length in the direction that most clients took (signSGD, arXiv 1810.05291).

    Args:
        step: the length, in each coordinate.
    """

    needs: ClassVar[Needs] = "sum"
    step: float = 0.01

    def begin(self, params: Tree, schema: Schema, store: Store) -> Accumulator:
        return Votes(self.step)


class Votes(Accumulator):
    """The sum of the signs."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.votes: Tree = {}

    def add(self, update: Update) -> None:
        for name, value in update.delta.items():
            self.votes[name] = self.votes[name] + value.sign() if name in self.votes else value.sign()

    def finish(self) -> Change:
        if not self.votes:
            raise TrainingError("no client returned an update")
        return Change({name: self.step * votes.sign() for name, votes in self.votes.items()}, Fold())

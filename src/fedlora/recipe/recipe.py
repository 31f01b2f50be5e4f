"""A method as a value: ingredients for every slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedlora.core.component import MODEL_CONFIG, Count, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.schema import Schema
from fedlora.core.state import named_seed
from fedlora.core.tree import Tree
from fedlora.privacy import AnyPrivacy, NoPrivacy
from fedlora.recipe.local import Local
from fedlora.recipe.rank_pruning import NoRankPruning, RankPruning
from fedlora.recipe.refusals import check_recipe
from fedlora.server.aggregate import AnyAggregator, Mean
from fedlora.server.optimizers import AnyServerOptimizer, Sgd
from fedlora.server.pruning import NO_PRUNE, Prune
from fedlora.transport import Link, RankSlice
from fedlora.tuning import AnyTuning, LoRA


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Recipe:
    """What a round does, slot by slot, in the order of an update's life.

    Args:
        tuning: which weights move.
        down: what is kept of the parameters on the way to a client, and at what precision.
        up: the same for a client's change on the way back.
        aggregator: how a cohort's changes become one.
        server: how that change is applied.
        privacy: clip and noise.
        local: a client's turn.
        prune: what the server sets to zero for good, if it does.
        shrink: how clients give up ranks that they do not use, if they do.
        memory: what clients remember between rounds: ``none`` (cross-device); ``init``, the phase's setup; or
            ``last_round``, also the parameters that they got last, so that only the difference from these is sent.

    Raises:
        ConfigError: the combination would run and lie.
    """

    tuning: AnyTuning = LoRA()
    down: Link = Link()
    up: Link = Link()
    aggregator: AnyAggregator = Mean()
    server: AnyServerOptimizer = Sgd()
    privacy: AnyPrivacy = NoPrivacy()
    local: Local = Local()
    prune: Prune | None = None
    shrink: RankPruning | None = None
    memory: Literal["none", "init", "last_round"] = "none"

    def __post_init__(self) -> None:
        check_recipe(self)
        if self.shrink and not self.down.slices_ranks:  # a refusal of a lower rank must come before training
            self.of_rank(self.shrink.fewer(self.rank))

    @property
    def rank(self) -> int:
        """The rank of a client's adapters."""
        whole = self.tuning.adapter_rank
        return min(whole, self.down.sparsify.rank) if isinstance(self.down.sparsify, RankSlice) else whole

    @property
    def rank_pruning(self) -> RankPruning | NoRankPruning:
        """``shrink``, or what does nothing in its place."""
        return self.shrink or NoRankPruning()

    @property
    def pruning(self) -> Prune:
        """``prune``, or one that never begins."""
        return self.prune or NO_PRUNE

    def of_rank(self, rank: int) -> Recipe:
        """The recipe of a client that has come down to ``rank``."""
        return replace(self, down=replace(self.down, sparsify=RankSlice(rank=rank)))


def restarted(recipe: Recipe, schema: Schema, init: Tree, seed: int, steps: int) -> Tree:
    """The adapters' values where these start anew after each round; nothing where they go on.

    Args:
        recipe: its aggregator says whether they do.
        schema: what is trained.
        init: the phase's start, or any round's.
        seed: of the phase's start.
        steps: rounds of the phase that are done.
    """
    if not recipe.aggregator.reinitialises or not steps:
        return {}
    drawn = recipe.tuning.redraw_init(schema, init, named_seed(seed, "restart", steps))
    return {name: value for name, value in drawn.items() if schema[name].group == "adapter"}


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Phase:
    """A recipe for a number of rounds; the next phase takes over what this one learnt.

    Args:
        recipe: what each round does.
        rounds: how many.
    """

    recipe: Recipe = Recipe()
    rounds: Count = 40

    def __post_init__(self) -> None:
        late = [stage.round for link in (self.recipe.down, self.recipe.up) for stage in link.stages]
        if late and max(late) >= self.rounds:
            raise ConfigError(
                f"a stage begins in round {max(late)}, but the phase has rounds 0 to {self.rounds - 1} only"
            )

"""A method as a value: one component for every slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedlora.core.component import MODEL_CONFIG, Count, NonNegative, dataclass
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
    """Defines a round, slot by slot, in the order in which an update passes through the slots.

    Args:
        tuning: which weights are trained.
        down: downlink: which parameter entries are sent to a client, and in which number format.
        up: uplink: the same for a client's change.
        aggregator: how a cohort's changes are combined into one.
        server: how that change is applied.
        server_head: how the change of the task head is applied; as everything else if absent.
        privacy: clip and noise.
        local: a client's local training.
        prune: permanent pruning by the server, if any.
        shrink: rank self-pruning by clients, if any.
        memory: what clients keep between rounds: ``none`` (cross-device); ``init``, the phase's setup; or
            ``last_round``, also the last received parameters, so that only the difference to them is sent.
        outlier_factor: an update is refused if its norm is more than this many times the median norm, and its entries
            have a root mean square above 1; 100 if absent, and 0 refuses only sums that are not finite. It has no
            effect where client-level privacy clips updates.

    Raises:
        ConfigError: the combination would run but give misleading results.
    """

    tuning: AnyTuning = LoRA()
    down: Link = Link()
    up: Link = Link()
    aggregator: AnyAggregator = Mean()
    server: AnyServerOptimizer = Sgd()
    server_head: AnyServerOptimizer | None = None
    privacy: AnyPrivacy = NoPrivacy()
    local: Local = Local()
    prune: Prune | None = None
    shrink: RankPruning | None = None
    memory: Literal["none", "init", "last_round"] = "none"
    outlier_factor: NonNegative | None = None

    def __post_init__(self) -> None:
        check_recipe(self)
        if self.shrink and not self.down.slices_ranks:  # a lower rank must be refused before training
            self.of_rank(self.shrink.fewer(self.rank))

    @property
    def rank(self) -> int:
        """The rank of a client's adapters."""
        whole = self.tuning.adapter_rank
        return min(whole, self.down.sparsify.rank) if isinstance(self.down.sparsify, RankSlice) else whole

    @property
    def rank_pruning(self) -> RankPruning | NoRankPruning:
        """``shrink``, or a value that does nothing."""
        return self.shrink or NoRankPruning()

    @property
    def pruning(self) -> Prune:
        """``prune``, or a value that never prunes."""
        return self.prune or NO_PRUNE

    def of_rank(self, rank: int) -> Recipe:
        """The recipe of a client whose rank was reduced to ``rank``."""
        return replace(self, down=replace(self.down, sparsify=RankSlice(rank=rank)))


def restarted(recipe: Recipe, schema: Schema, init: Tree, seed: int, steps: int) -> Tree:
    """The adapters' values if they are reinitialised after each round; empty if they carry over.

    Args:
        recipe: its aggregator determines whether they are.
        schema: the trained tensors.
        init: the initial values of the phase, or of any round.
        seed: the seed of the phase's start.
        steps: number of finished rounds of the phase.
    """
    if not recipe.aggregator.reinitialises or not steps:
        return {}
    drawn = recipe.tuning.redraw_init(schema, init, named_seed(seed, "restart", steps))
    return {name: value for name, value in drawn.items() if schema[name].group == "adapter"}


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Phase:
    """A recipe for a number of rounds; the next phase starts from what this one learnt.

    Args:
        recipe: what each round does.
        rounds: number of rounds.
    """

    recipe: Recipe = Recipe()
    rounds: Count = 40

    def __post_init__(self) -> None:
        late = [stage.round for link in (self.recipe.down, self.recipe.up) for stage in link.stages]
        if late and max(late) >= self.rounds:
            raise ConfigError(
                f"a stage begins in round {max(late)}, but the phase has rounds 0 to {self.rounds - 1} only"
            )

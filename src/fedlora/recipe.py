"""A method as a value: ingredients for every slot, and the combinations that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fedlora.aggregate import (
    AnyAggregator,
    CoordinateMedian,
    Mean,
    ProductExact,
    SparsityWeighted,
    Stack,
    SvdRedistribute,
    TrimmedMean,
)
from fedlora.component import STRICT
from fedlora.errors import ConfigError
from fedlora.local import Local
from fedlora.privacy import AnyPrivacy, NoPrivacy
from fedlora.prune import NoPrune, Prune
from fedlora.rates import LrScale
from fedlora.schema import Schema
from fedlora.server_optim import AnyServerOptimizer, Sgd
from fedlora.shrink import NoShrink, Shrink
from fedlora.state import named_seed
from fedlora.transport import Dense, Link, RandomK, RankSlice, Uniform
from fedlora.tree import Tree
from fedlora.tuning import AnyTuning, LoRA

_OF_PRODUCTS = SvdRedistribute | ProductExact | Stack


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
    shrink: Shrink | None = None
    memory: Literal["none", "init", "last_round"] = "none"

    def __post_init__(self) -> None:
        if self.down.thins and self.down.reference == "zero" and not self.tuning.zero_is_neutral:
            raise ConfigError(
                "a sparse downlink would set weights to zero that carry pre-trained knowledge; "
                "set down.reference = 'init' so that only the difference from the public start is thinned"
            )
        if self.prune and not self.tuning.zero_is_neutral:
            raise ConfigError(
                "pruning sets trained weights to zero, and these carry pre-trained knowledge; use tuning 'lora' with a "
                "kaiming or orthogonal init, or leave prune out"
            )
        if self.prune and not isinstance(self.privacy, NoPrivacy):
            raise ConfigError("noise falls on what was pruned and brings it back; leave privacy or prune out")
        self._check_prune()
        if self.up.reference == "init":
            raise ConfigError("the uplink carries a difference already; leave up.reference at 'zero'")
        if isinstance(self.tuning, LoRA) and not self.tuning.zero_is_neutral:
            decays = (self.local.optimizer.weight_decay, getattr(self.server, "weight_decay", 0.0))
            if any(decays):
                raise ConfigError(
                    "weight decay pulls factors to zero, and after an SVD start they carry knowledge; "
                    "set weight_decay = 0 in local.optimizer and in the server's optimiser"
                )
        moving = self.tuning.train if isinstance(self.tuning, LoRA) else "both"
        if moving != "both" and float(getattr(self.server, "weight_decay", 0.0)) > 0:
            raise ConfigError(
                "the server's weight decay would move the factor that is to keep still; set weight_decay = 0 in server"
            )
        self._check_lr_scale(moving)
        self._check_memory()
        self._check_rules()
        if moving != "both" and (self.prune or (self.down.thins and self.down.reference == "zero")):
            raise ConfigError(
                "the factor that keeps still would lose entries on the way or by pruning; set down.reference = 'init', "
                "or leave down.sparsify and prune out"
            )
        if moving == "alternate" and (self.up.feedback or not isinstance(self.server, Sgd) or self.server.momentum):
            raise ConfigError(
                "momentum, moments and feedback of one round would move the factor that keeps still in the next; set "
                "server to { kind = 'sgd' } without momentum, and up.feedback to false"
            )
        if self.local.example_privacy and getattr(self.aggregator, "weighting", "uniform") == "examples":
            raise ConfigError(
                "under local.example_privacy clients do not tell how many examples they have; set "
                "aggregator.weighting = 'uniform'"
            )
        if self.local.example_privacy and self.local.timeout_seconds:
            raise ConfigError(
                "who runs out of time tells of the lengths of examples; leave local.example_privacy or "
                "timeout_seconds out"
            )
        if self.local.example_privacy and self.shrink:
            raise ConfigError(
                "the penalty of shrink would pass by the noise; leave local.example_privacy or shrink out"
            )
        plain = isinstance(self.aggregator, Mean) and self.aggregator.weighting == "uniform"
        if self.privacy.needs_uniform_mean and not plain:
            raise ConfigError(
                "noise is calibrated for a mean of clients that all weigh the same; set aggregator.kind = 'mean' "
                "and aggregator.weighting = 'uniform'"
            )
        kind = self.aggregator.kind
        if isinstance(self.aggregator, _OF_PRODUCTS | SparsityWeighted) and not isinstance(self.tuning, LoRA):
            raise ConfigError(f"aggregator {kind!r} is about products B A; use it with tuning 'lora'")
        head_alone = replace(self.server, lr_scale=LrScale()) == Sgd() and {*self.server.lr_scale.moved} <= {"head"}
        if isinstance(self.aggregator, _OF_PRODUCTS) and not head_alone:
            raise ConfigError(
                f"{kind!r} chooses both factors anew, so a server step that adds up changes has no meaning for them; "
                "leave server at { kind = 'sgd', lr = 1 }, where lr_scale may name the head"
            )
        if isinstance(self.aggregator, SvdRedistribute) and moving != "both":
            raise ConfigError("svd_redistribute moves both factors; leave tuning.train at 'both'")
        self._check_restarts(moving)
        self._check_shrink(moving)

    @property
    def rank(self) -> int:
        """The rank of a client's adapters."""
        whole = self.tuning.rank if isinstance(self.tuning, LoRA) else 0
        return min(whole, self.down.sparsify.rank) if isinstance(self.down.sparsify, RankSlice) else whole

    @property
    def rank_pruning(self) -> Shrink | NoShrink:
        """``shrink``, or what does nothing in its place."""
        return self.shrink or NoShrink()

    @property
    def pruning(self) -> Prune | NoPrune:
        """``prune``, or what does nothing in its place."""
        return self.prune or NoPrune()

    def of_rank(self, rank: int) -> Recipe:
        """The recipe of a client that has come down to ``rank``."""
        return replace(self, down=replace(self.down, sparsify=RankSlice(rank=rank)))

    def _check_lr_scale(self, moving: str) -> None:
        """Learning rates of what is not there."""
        for place, scale in (("local", self.local.lr_scale), ("server", self.server.lr_scale)):
            factors = [name for name in scale.moved if name in ("A", "B")]
            if factors and not self.tuning.has_factors:
                raise ConfigError(
                    f"{place}.lr_scale.{factors[0]} is about low-rank factors, and tuning {self.tuning.kind!r} has "
                    "none; name adapter or head, or leave it out"
                )
            if moving == "B" and "A" in factors:
                raise ConfigError(f"{place}.lr_scale.A has no effect where tuning.train = 'B'; leave it out")

    def _check_shrink(self, moving: str) -> None:
        """What hides ranks, or has a use for those that clients would give up."""
        if not self.shrink:
            return
        down = self.down
        sliced = isinstance(down.sparsify, RankSlice) and down.sparsify.by == "order"
        plain = (isinstance(down.sparsify, Dense) or sliced) and not down.stages and down.reference == "zero"
        if not isinstance(self.tuning, LoRA) or moving != "both" or not self.tuning.zero_is_neutral:
            raise ConfigError("shrink is about ranks that are trained from zero; use tuning 'lora' with train 'both'")
        if not plain or down.feedback or self.up.feedback or self.memory == "last_round" or self.prune:
            raise ConfigError(
                "shrink chooses which ranks go down; leave down dense and relative to zero, feedback and prune out, "
                "and memory at 'none' or 'init'"
            )
        if self.local.keep_optimizer:
            raise ConfigError(
                "what a client's optimiser remembers of ranks given up would bring them back; set local.keep_optimizer "
                "to false, or leave shrink out"
            )
        if self.aggregator.reinitialises or not isinstance(self.privacy, NoPrivacy):
            raise ConfigError(
                "clients tell their ranks, without noise, and compare them with those before; leave privacy out, and "
                "use an aggregator without new starts"
            )
        if not sliced:  # what a lower rank is refused for must be known before
            self.of_rank(self.shrink.fewer(self.rank))

    def _check_restarts(self, moving: str) -> None:
        """What cannot go with adapters that start anew after each round."""
        if not self.aggregator.reinitialises or not isinstance(self.tuning, LoRA):
            return
        kind = self.aggregator.kind
        if not self.tuning.init.from_seed:
            raise ConfigError(f"{kind!r} draws adapters anew after each round; use tuning.init kaiming")
        if moving == "alternate":
            raise ConfigError(
                f"under {kind!r} B is zero when a round begins, and A alone learns nothing; use train 'both' or 'B'"
            )
        if self.local.keep_optimizer or self.up.feedback:
            raise ConfigError(
                f"under {kind!r} adapters start anew, and what a client remembers of the old ones has no meaning; set "
                "local.keep_optimizer and up.feedback to false"
            )

    def _check_prune(self) -> None:
        """What would bring pruned weights back, or hide which these are."""
        if not self.prune:
            return
        down = self.down
        stages = (each for stage in down.stages for each in (stage.precision, stage.head_precision))
        coarse = any(isinstance(each, Uniform) for each in (down.precision, down.head_precision, *stages))
        moves = down.reference == "init" or self.memory == "last_round" or down.thins or coarse
        if moves or down.feedback or self.up.feedback or isinstance(self.aggregator, _OF_PRODUCTS):
            raise ConfigError(
                "clients tell what was pruned by its zeros, and these must stay; beside prune, down is dense, in "
                "floating point and relative to zero, memory 'none' or 'init', nothing has feedback, the rule is a mean"
            )

    def _check_rules(self) -> None:
        """What links do to rules that are no plain mean."""
        thin = self.up.thins or self.down.thins
        slices = (
            isinstance(thinning := self.down.sparsify, RankSlice) and thinning.by == "order" and not self.down.stages
        )
        if isinstance(self.aggregator, _OF_PRODUCTS) and self.down.thins and not slices:
            raise ConfigError(
                f"{self.aggregator.kind!r} rebuilds the factors from what clients got, and what was left out would be "
                "lost; leave down.sparsify at dense"
            )
        zeros = isinstance(self.aggregator, SparsityWeighted) and self.aggregator.padding == "zero"
        if zeros and self.down.thins and not slices:
            raise ConfigError(
                "padding with zeros takes ranks that a thinned link happened to leave out for ranks that the client "
                "lacks, and these die; set aggregator.padding = 'keep', or leave down.sparsify at dense"
            )
        if isinstance(self.aggregator, CoordinateMedian | TrimmedMean) and thin:
            raise ConfigError(
                f"{self.aggregator.kind!r} looks at each coordinate, which a thinned link leaves out for most clients, "
                "so that hardly anything would move; leave sparsify at dense"
            )
        drawn = [self.up.sparsify, *(stage.sparsify for stage in self.up.stages)]
        if any(isinstance(each, RandomK) and each.rescale for each in drawn) and not isinstance(self.aggregator, Mean):
            raise ConfigError("up.sparsify multiplies what it keeps, which is right for a plain mean only; use 'mean'")

    def _check_memory(self) -> None:
        """What links ask of clients' memory, and what they do to updates."""
        if self.up.feedback and self.memory == "none":
            raise ConfigError(
                "up.feedback adds what a client's last message lost to its next one, so clients must remember; set "
                "memory to 'init' or 'last_round', or up.feedback to false"
            )
        if self.up.feedback and not isinstance(self.privacy, NoPrivacy):
            raise ConfigError("feedback would send later what the clip took away; set up.feedback to false")
        slices = [self.down.sparsify, *(stage.sparsify for stage in self.down.stages)]
        if self.memory == "last_round" and any(isinstance(each, RankSlice) and each.by == "norm" for each in slices):
            raise ConfigError(
                "ranks of the largest norm would be those of the difference from the last round, others each time, and "
                "a client would gather all of them; choose ranks by 'order', or set memory to 'init' or 'none'"
            )
        if self.down.feedback and self.memory == "last_round":
            raise ConfigError(
                "the difference to what a client holds makes good for all that it lost before; set down.feedback to "
                "false, or memory to 'init'"
            )
        for name, link in (("down", self.down), ("up", self.up)):
            stages = [link.sparsify, *(stage.sparsify for stage in link.stages)]
            if any(isinstance(each, RandomK) and each.rescale for each in stages) and (name == "down" or link.feedback):
                raise ConfigError(
                    f"{name}.sparsify multiplies what it keeps, which is right for the mean of many changes only; set "
                    f"rescale = false in {name}.sparsify"
                )


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
    drawn = recipe.tuning.redrawn(schema, init, named_seed(seed, "restart", steps))
    return {name: value for name, value in drawn.items() if schema[name].group == "adapter"}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Phase:
    """A recipe for a number of rounds; the next phase takes over what this one learnt.

    Args:
        recipe: what each round does.
        rounds: how many.
    """

    recipe: Recipe = Recipe()
    rounds: Annotated[int, Field(ge=1)] = 40

    def __post_init__(self) -> None:
        late = [stage.round for link in (self.recipe.down, self.recipe.up) for stage in link.stages]
        if late and max(late) >= self.rounds:
            raise ConfigError(
                f"a stage begins in round {max(late)}, but the phase has rounds 0 to {self.rounds - 1} only"
            )

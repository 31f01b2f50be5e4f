"""A method as a value: ingredients for every slot, and the combinations that are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fedlora.aggregate import AnyAggregator, Mean
from fedlora.component import STRICT
from fedlora.errors import ConfigError
from fedlora.local import Local
from fedlora.privacy import AnyPrivacy, NoPrivacy
from fedlora.server_optim import AnyServerOptimizer, Sgd
from fedlora.transport import Dense, Float32, Link
from fedlora.tuning import AnyTuning, LoRA


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
        memory: what clients remember between rounds: ``none`` (cross-device), or ``init``, the phase's setup.

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
    memory: Literal["none", "init"] = "none"

    def __post_init__(self) -> None:
        if (
            not isinstance(self.down.sparsify, Dense)
            and self.down.reference == "zero"
            and not self.tuning.zero_is_neutral
        ):
            raise ConfigError(
                "a sparse downlink would set weights to zero that carry pre-trained knowledge; "
                "set down.reference = 'init' so that only the difference from the public start is thinned"
            )
        if self.up.reference == "init":
            raise ConfigError("the uplink carries a difference already; leave up.reference at 'zero'")
        if isinstance(self.tuning, LoRA) and not self.tuning.zero_is_neutral:
            decays = (self.local.optimizer.weight_decay, getattr(self.server, "weight_decay", 0.0))
            if any(decays):
                raise ConfigError(
                    "weight decay pulls factors to zero, and after an SVD start they carry knowledge; "
                    "set weight_decay = 0 in local.optimizer and in the server's optimiser"
                )
        if not isinstance(self.privacy, NoPrivacy) and not isinstance(self.up.precision, Float32):
            raise ConfigError(
                "rounding after the clip may lengthen an update beyond clip_norm; set up.precision to float32"
            )
        if self.privacy.needs_uniform_mean and self.aggregator.weighting != "uniform":
            raise ConfigError(
                "noise is calibrated for clients that all weigh the same; set aggregator.weighting = 'uniform'"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Phase:
    """A recipe for a number of rounds; the next phase takes over what this one learnt.

    Args:
        recipe: what each round does.
        rounds: how many.
    """

    recipe: Recipe = Recipe()
    rounds: Annotated[int, Field(ge=1)] = 40

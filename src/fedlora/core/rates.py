"""Learning rate multipliers by group and by round, used by clients and by the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from fedlora.core.component import MODEL_CONFIG, Fraction, Part, Positive, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.schema import Schema

Rate = Positive
Rates = Mapping[str, float]
"""Learning rate multipliers by parameter name; 1 for names that are missing."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class LrScale:
    """Learning rate multipliers: that of a parameter's group times that of its LoRA factor.

    ``lr(x) = lr * scale[group of x] * scale[factor of x]``. LoRA+ (arXiv 2402.12354) is ``B = 16`` on clients. A fresh
    head needs a higher rate than adapters: it is learnt from a random matrix, while adapters adjust a trained one.

    Args:
        adapter: multiplier of everything except the head.
        head: multiplier of the task head.
        A: multiplier of the factors ``A`` of low-rank adapters.
        B: multiplier of the factors ``B``.
    """

    adapter: Rate = 1.0
    head: Rate = 1.0
    A: Rate = 1.0
    B: Rate = 1.0

    def by_name(self, schema: Schema, common: float = 1.0) -> Rates:
        """The multiplier of every parameter.

        Args:
            schema: the leaf of each parameter.
            common: a further multiplier for all, such as a schedule's.
        """
        return {name: common * self._group(leaf.group) * self._factor(leaf.factor) for name, leaf in schema.items()}

    @property
    def moved(self) -> tuple[str, ...]:
        """The names of the multipliers that are not 1."""
        values = {"adapter": self.adapter, "head": self.head, "A": self.A, "B": self.B}
        return tuple(name for name, value in values.items() if value != 1.0)

    def _group(self, group: str) -> float:
        return self.head if group == "head" else self.adapter

    def _factor(self, factor: str) -> float:
        return {"A": self.A, "B": self.B}.get(factor, 1.0)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Schedule:
    """The learning rate schedule over the *whole run*: it is not restarted by a round or a phase.

    Args:
        shape: ``constant``; ``linear`` to zero; ``cosine`` to zero.
        warmup: share of the run's rounds during which the multiplier rises from zero.
        floor: the multiplier to which ``linear`` and ``cosine`` decay, if not zero.

    Raises:
        ConfigError: ``floor`` is set for a constant schedule.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Part = 0.0
    floor: Fraction | None = None

    def __post_init__(self) -> None:
        if self.floor is not None and self.shape == "constant":
            raise ConfigError(
                f"schedule.floor = {self.floor:g} is where a schedule decays to, but a constant one does not decay: "
                'set shape = "cosine" or "linear", or leave floor out'
            )

    def factor(self, round: int, rounds: int) -> float:
        """The multiplier of round ``round`` (from 0) of ``rounds``; above zero in every round."""
        warm = self.warmup * rounds
        if round < warm:
            return (round + 1) / (warm + 1)
        progress = (round - warm) / max(1.0, rounds - warm)
        decayed = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        floor = self.floor or 0.0
        return floor + (1.0 - floor) * decayed[self.shape]

"""What is clipped on the client and what noise the server adds."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedlora import tree
from fedlora.component import STRICT
from fedlora.errors import ConfigError
from fedlora.state import generator, named_seed
from fedlora.tree import Tree


class Privacy(ABC):
    """Both halves of a mechanism in one value, so that the noise always belongs to the clip."""

    needs_uniform_mean: ClassVar[bool]
    """Whether the noise is calibrated for clients that all weigh the same."""

    @abstractmethod
    def clip(self, delta: Tree) -> Tree:
        """What a client may send of ``delta``."""

    @abstractmethod
    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        """The mean ``delta`` of ``num_clients`` clients, with the noise of a round of the run."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoPrivacy(Privacy):
    """Nothing is clipped and no noise is added."""

    kind: Literal["none"] = "none"
    needs_uniform_mean: ClassVar[bool] = False

    def clip(self, delta: Tree) -> Tree:
        """``delta`` itself."""
        return delta

    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        """``delta`` itself."""
        return delta


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CentralGaussian(Privacy):
    """Clip and noise of DP-FedAvg (arXiv 1710.06963, Alg. 1): ``mean_k clip(delta_k, C) + N(0, (z C / n)^2)``.

    The noise falls on every coordinate that clients may move, sent or not, because which coordinates a client sent
    tells of its data. One of ``noise_multiplier`` and ``target_epsilon`` is given; ``account.py`` tells what is spent.

    Args:
        clip_norm: C, the largest Euclidean norm of a client's whole update.
        noise_multiplier: z, the noise's standard deviation on the *sum* of updates, in units of C.
        target_epsilon: the epsilon of the whole run, from which z is found.
        delta: the probability that epsilon does not hold; by default ``1 / N ** 1.1`` of ``N`` clients.
        accountant: ``rdp``, ``pld`` (tighter, for Poisson sampling alone), or ``auto``: the tightest that applies.
        max_epsilon: the run ends before it would spend more.
        normalise: divide the noisy mean by C, as FLASC's code does; nothing but a rate, and to Adam not even that.
        seed: of noise that can be repeated, for tests; without one the operating system's secure source is read.

    Raises:
        ConfigError: not one of ``noise_multiplier`` and ``target_epsilon`` is given.
    """

    kind: Literal["central_gaussian"] = "central_gaussian"
    clip_norm: Annotated[float, Field(gt=0)]
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    accountant: Literal["auto", "rdp", "pld"] = "auto"
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    normalise: bool = False
    seed: Annotated[int, Field(ge=0)] | None = None
    needs_uniform_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ConfigError("central_gaussian needs one of noise_multiplier and target_epsilon")

    def clip(self, delta: Tree) -> Tree:
        """``delta / max(1, ||delta|| / C)``."""
        return tree.scale(delta, 1.0 / max(1.0, tree.norm(delta) / self.clip_norm))

    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        """``delta + N(0, (z C / n)^2)`` on every coordinate, over C with ``normalise``.

        Raises:
            ConfigError: the noise was not yet calibrated to ``target_epsilon``.
        """
        if self.noise_multiplier is None:
            raise ConfigError(
                "target_epsilon is a property of a whole run; run it with fedlora.run, or give a multiplier"
            )
        deviation = self.noise_multiplier * self.clip_norm / num_clients
        draws = None if self.seed is None else generator(named_seed(self.seed, "noise", round))
        noisy = {name: value + deviation * _normal(value, draws) for name, value in delta.items()}
        return tree.scale(noisy, 1.0 / self.clip_norm) if self.normalise else noisy


def _normal(like: Tensor, draws: torch.Generator | None) -> Tensor:
    """Standard normal numbers; from the operating system's secure source if there is no generator."""
    if draws is not None:
        return torch.randn(like.shape, generator=draws)
    pairs = -(-like.numel() // 2)
    raw = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    radius, angle = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    length = np.sqrt(-2.0 * np.log(radius))  # Box and Muller
    both = np.concatenate([length * np.cos(2 * np.pi * angle), length * np.sin(2 * np.pi * angle)])
    return torch.from_numpy(both[: like.numel()].astype(np.float32)).view(like.shape)


PRIVACY: dict[str, type[Privacy]] = {"none": NoPrivacy, "central_gaussian": CentralGaussian}
AnyPrivacy = Annotated[NoPrivacy | CentralGaussian, Field(discriminator="kind")]

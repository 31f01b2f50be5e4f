"""What is clipped on the client and what noise the server adds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedlora import tree
from fedlora.component import STRICT
from fedlora.tree import Tree


class Privacy(ABC):
    """Both halves of a mechanism in one value, so that the noise always belongs to the clip."""

    needs_uniform_mean: ClassVar[bool]
    """Whether the noise is calibrated for clients that all weigh the same."""

    @abstractmethod
    def clip(self, delta: Tree) -> Tree:
        """What a client may send of ``delta``."""

    @abstractmethod
    def noise(self, delta: Tree, num_clients: int, generator: torch.Generator) -> Tree:
        """The mean ``delta`` of ``num_clients`` clients, with noise."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoPrivacy(Privacy):
    """Nothing is clipped and no noise is added."""

    kind: Literal["none"] = "none"
    needs_uniform_mean: ClassVar[bool] = False

    def clip(self, delta: Tree) -> Tree:
        """``delta`` itself."""
        return delta

    def noise(self, delta: Tree, num_clients: int, generator: torch.Generator) -> Tree:
        """``delta`` itself."""
        return delta


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CentralGaussian(Privacy):
    """Clip and noise of DP-FedAvg (arXiv 1710.06963, Alg. 1): ``mean_k clip(delta_k, C) + N(0, (z C / n)^2)``.

    The noise falls on every coordinate, sent or not, because which coordinates a client sent tells of its data. This
    component clips and adds noise; it makes no statement about epsilon.

    Args:
        clip_norm: C, the largest Euclidean norm of a client's whole update.
        noise_multiplier: z, the noise's standard deviation on the *sum* of updates, in units of C.
    """

    kind: Literal["central_gaussian"] = "central_gaussian"
    clip_norm: Annotated[float, Field(gt=0)]
    noise_multiplier: Annotated[float, Field(ge=0)]
    needs_uniform_mean: ClassVar[bool] = True

    def clip(self, delta: Tree) -> Tree:
        """``delta / max(1, ||delta|| / C)``."""
        return tree.scale(delta, 1.0 / max(1.0, tree.norm(delta) / self.clip_norm))

    def noise(self, delta: Tree, num_clients: int, generator: torch.Generator) -> Tree:
        """``delta + N(0, (z C / n)^2)`` on every coordinate."""
        deviation = self.noise_multiplier * self.clip_norm / num_clients
        return {
            name: value + deviation * torch.randn(value.shape, generator=generator) for name, value in delta.items()
        }


PRIVACY: dict[str, type[Privacy]] = {"none": NoPrivacy, "central_gaussian": CentralGaussian}
AnyPrivacy = Annotated[NoPrivacy | CentralGaussian, Field(discriminator="kind")]

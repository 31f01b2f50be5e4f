"""Central differential privacy: clipping on the clients and noise on the server."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core import tree
from fedlora.core.component import MODEL_CONFIG, Fraction, NonNegative, Positive, Whole, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.slots import Slot
from fedlora.core.state import generator, named_seed
from fedlora.core.tree import Tree


class Privacy(ABC):
    """Clip and noise of one mechanism in one value, so that the noise always matches the clip."""

    is_none: ClassVar[bool] = False
    """Whether nothing is clipped and no noise is added."""
    needs_uniform_mean: ClassVar[bool]
    """Whether the noise is calibrated for a mean with equal weights."""

    @property
    def adapts(self) -> bool:
        """Whether the clip adapts from round to round; clients then report whether their update was within it."""
        return False

    @property
    def repeatable(self) -> bool:
        """Whether a round can be repeated with the same noise; if not, its secrets and its cohort must be stored."""
        return True

    @abstractmethod
    def at(self, clip_norm: float | None) -> Privacy:
        """The mechanism to use in a round.

        Args:
            clip_norm: what ``adapted`` returned after the previous round; None at first, or if the clip does not adapt.
        """

    def adapted(self, below: float, answered: int, num_clients: int, round: int) -> float | None:
        """The clip for the next round.

        Args:
            below: number of clients that reported an update within the clip.
            answered: number of clients that returned a result.
            num_clients: the number that sums are divided by.
            round: the round of the run.
        """
        return None

    def clip(self, delta: Tree) -> Tree:
        """``delta`` clipped, as a client may send it."""
        return self.clipped(delta)[0]

    @abstractmethod
    def clipped(self, delta: Tree) -> tuple[Tree, bool]:
        """``delta`` clipped, as a client may send it, and whether it was within the clip."""

    @property
    def bound(self) -> float | None:
        """The norm that updates are clipped to; None if they are not clipped."""
        return None

    @abstractmethod
    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        """The mean ``delta`` of ``num_clients`` clients, with the noise of the given round of the run."""

    def cover(self, delta: Tree, answered: int, num_clients: int, round: int) -> Tree:
        """Rescales the mean ``delta`` over the clients that answered to a sum over ``num_clients``, and adds noise."""
        if self.needs_uniform_mean:
            delta = tree.scale(delta, answered / num_clients)
        return self.noise(delta, num_clients, round)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class NoPrivacy(Privacy):
    """Nothing is clipped and no noise is added."""

    kind: Literal["none"] = "none"
    is_none: ClassVar[bool] = True
    needs_uniform_mean: ClassVar[bool] = False

    def at(self, clip_norm: float | None) -> NoPrivacy:
        return self

    def clipped(self, delta: Tree) -> tuple[Tree, bool]:
        return delta, True

    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        return delta


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class CentralGaussian(Privacy):
    """Clip and noise of DP-FedAvg (arXiv 1710.06963, Alg. 1): ``mean_k clip(delta_k, C) + N(0, (z C / n)^2)``.

    Noise is added to every coordinate that clients may change, sent or not, because the support of a sparse update
    leaks information. Give one of ``noise_multiplier`` and ``target_epsilon``; ``accountant.py`` does the accounting.

    With ``quantile`` the clip adapts (Andrew et al., arXiv 1905.03871, Alg. 1): each client also reports one bit,
    whether its update's norm is at most C; with ``b`` the noised fraction of those that are, the next clip is
    ``C exp(-clip_lr (b - quantile))``. Updates then get the noise multiplier ``(z^-2 - (2 s)^-2)^(-1/2)``, where ``s``
    is the standard deviation of the noise on the sum of bits, so that both together cost as much as z alone.

    Args:
        clip_norm: C, the largest Euclidean norm of a client's whole update; with ``quantile``, in the first round.
        noise_multiplier: z, the noise's standard deviation on the *sum* of updates, in units of C.
        target_epsilon: the epsilon of the whole run, from which z is computed.
        delta: the probability that the epsilon bound fails; by default ``1 / N ** 1.1`` for ``N`` clients.
        accountant: ``rdp``, ``pld`` (tighter, only for Poisson sampling), or ``auto``: the tightest that applies.
        max_epsilon: privacy budget; the run ends before it would exceed it.
        normalise: divide the noisy mean by C, as FLASC's code does; this only rescales the learning rate, and has no
            effect under Adam.
        quantile: the fraction of clients whose updates the clip should leave unchanged; None keeps the clip fixed.
        clip_lr: learning rate of the clip; 0.2 by default.
        count_noise: standard deviation of the noise on the sum of bits; by default the larger of a twentieth of the
            cohort size and z.
        seed: seed of reproducible noise, for tests; without one, noise comes from the operating system's secure source.

    Raises:
        ConfigError: not exactly one of ``noise_multiplier`` and ``target_epsilon`` is given, ``count_noise`` is too
            small, or a setting would have no effect.
    """

    kind: Literal["central_gaussian"] = "central_gaussian"
    clip_norm: Positive
    noise_multiplier: NonNegative | None = None
    target_epsilon: Positive | None = None
    delta: Fraction | None = None
    accountant: Literal["auto", "rdp", "pld"] = "auto"
    max_epsilon: Positive | None = None
    normalise: bool = False
    quantile: Fraction | None = None
    clip_lr: Positive | None = None
    count_noise: Positive | None = None
    seed: Whole | None = None
    needs_uniform_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ConfigError("central_gaussian needs one of noise_multiplier and target_epsilon")
        if self.quantile is None and (self.count_noise, self.clip_lr) != (None, None):
            raise ConfigError("count_noise and clip_lr belong to an adaptive clip; set quantile, or leave them out")
        if self.noise_multiplier == 0 and self.max_epsilon is not None:
            raise ConfigError("without noise nothing is private, and max_epsilon would never be met; leave it out")
        if self.target_epsilon and self.max_epsilon and self.max_epsilon < self.target_epsilon:
            raise ConfigError(
                f"max_epsilon = {self.max_epsilon:g} ends the run before it spends target_epsilon = "
                f"{self.target_epsilon:g}, for which its noise is computed; lower target_epsilon to that, or raise "
                "max_epsilon"
            )
        if self.count_noise is not None and self.count_noise <= (self.noise_multiplier or 0.0) / 2:
            raise ConfigError(
                f"count_noise = {self.count_noise:g} alone spends more than noise_multiplier = "
                f"{self.noise_multiplier:g} allows; it must be more than half of that"
            )

    @property
    def adapts(self) -> bool:
        return self.quantile is not None

    @property
    def bound(self) -> float:
        return self.clip_norm

    @property
    def repeatable(self) -> bool:
        return self.seed is not None or self.noise_multiplier == 0

    def at(self, clip_norm: float | None) -> CentralGaussian:
        return self if clip_norm is None else replace(self, clip_norm=clip_norm)

    def adapted(self, below: float, answered: int, num_clients: int, round: int) -> float | None:
        if self.quantile is None:
            return None
        draws = None if self.seed is None else generator(named_seed(self.seed, "count", round))
        noise = self._count_noise(num_clients) * float(normal(torch.zeros(1), draws))
        share = (below - answered / 2 + noise) / num_clients + 0.5
        return self.clip_norm * math.exp(-(self.clip_lr or 0.2) * (share - self.quantile))

    def _count_noise(self, num_clients: int) -> float:
        """``s``; zero if updates get no noise either."""
        if not self.noise_multiplier:
            return 0.0
        return self.count_noise or max(num_clients / 20, self.noise_multiplier)

    def clipped(self, delta: Tree) -> tuple[Tree, bool]:
        """``delta / max(1, ||delta|| / C)``; ``delta`` itself if its norm is within C."""
        norm = tree.norm(delta)
        return (delta, True) if norm <= self.clip_norm else (tree.scale(delta, self.clip_norm / norm), False)

    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        """``delta + N(0, (z C / n)^2)`` on every coordinate, divided by C with ``normalise``.

        Raises:
            ConfigError: the noise has not been calibrated to ``target_epsilon`` yet.
        """
        if self.noise_multiplier is None:
            raise ConfigError(
                "target_epsilon is a property of a whole run; run it with fedlora.run, or give a multiplier"
            )
        multiplier = self.noise_multiplier
        if self.adapts and multiplier:
            rest = multiplier**-2 - (2 * self._count_noise(num_clients)) ** -2
            if rest <= 0:
                raise ConfigError("count_noise must be more than half of noise_multiplier")
            multiplier = rest**-0.5
        deviation = multiplier * self.clip_norm / num_clients
        draws = None if self.seed is None else generator(named_seed(self.seed, "noise", round))
        noisy = {name: value + deviation * normal(value, draws) for name, value in delta.items()}
        return tree.scale(noisy, 1.0 / self.clip_norm) if self.normalise else noisy


def uniform(num: int, draws: torch.Generator | None) -> NDArray[np.float64]:
    """Numbers in ``[0, 1)``; from the operating system's secure source if there is no generator."""
    if draws is not None:
        return torch.rand(num, generator=draws, dtype=torch.float64).numpy()
    return (np.frombuffer(os.urandom(8 * num), dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(like: Tensor, draws: torch.Generator | None) -> Tensor:
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
if TYPE_CHECKING:
    AnyPrivacy = Privacy
else:
    AnyPrivacy = Annotated[NoPrivacy | CentralGaussian, Slot("privacy", Privacy)]

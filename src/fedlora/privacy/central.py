"""What is clipped on the client and what noise the server adds."""

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
    """Both halves of a mechanism in one value, so that the noise always belongs to the clip."""

    is_none: ClassVar[bool] = False
    """Whether nothing is clipped and no noise is added."""
    needs_uniform_mean: ClassVar[bool]
    """Whether the noise is calibrated for clients that all weigh the same."""

    @property
    def adapts(self) -> bool:
        """Whether the clip moves from round to round, for which clients tell whether they were below it."""
        return False

    @property
    def repeatable(self) -> bool:
        """Whether a round can be repeated, noise and all; else its secrets must be kept, its cohort too."""
        return True

    @abstractmethod
    def at(self, clip_norm: float | None) -> Privacy:
        """The mechanism of a round.

        Args:
            clip_norm: what ``adapted`` gave after the round before; None at first, or if nothing adapts.
        """

    def adapted(self, below: float, answered: int, num_clients: int, round: int) -> float | None:
        """The clip of the next round.

        Args:
            below: how many clients said that their update was not longer than the clip.
            answered: how many answered.
            num_clients: what sums are divided by.
            round: of the run.
        """
        return None

    def clip(self, delta: Tree) -> Tree:
        """What a client may send of ``delta``."""
        return self.clipped(delta)[0]

    @abstractmethod
    def clipped(self, delta: Tree) -> tuple[Tree, bool]:
        """What a client may send of ``delta``, and whether that is all of it."""

    @property
    def bound(self) -> float | None:
        """The norm that updates are clipped to, if they are."""
        return None

    @abstractmethod
    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        """The mean ``delta`` of ``num_clients`` clients, with the noise of a round of the run."""

    def cover(self, delta: Tree, answered: int, num_clients: int, round: int) -> Tree:
        """The mean ``delta`` of those that answered as the server may use it: of a sum over all, with noise."""
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

    The noise falls on every coordinate that clients may move, sent or not, because which coordinates a client sent
    tells of its data. One of ``noise_multiplier`` and ``target_epsilon`` is given; ``accountant.py`` has the account.

    With ``quantile`` the clip adapts (Andrew et al., arXiv 1905.03871, Alg. 1): each client also tells whether its
    update is not longer than C, a bit; with ``b`` the share of those, with noise of its own, the next clip is
    ``C exp(-clip_lr (b - quantile))``. Updates then get the noise ``(z^-2 - (2 s)^-2)^(-1/2)``, ``s`` being that of the
    sum of bits, so that both together cost what z says.

    Args:
        clip_norm: C, the largest Euclidean norm of a client's whole update; with ``quantile``, of the first round.
        noise_multiplier: z, the noise's standard deviation on the *sum* of updates, in units of C.
        target_epsilon: the epsilon of the whole run, from which z is found.
        delta: the probability that epsilon does not hold; by default ``1 / N ** 1.1`` of ``N`` clients.
        accountant: ``rdp``, ``pld`` (tighter, for Poisson sampling alone), or ``auto``: the tightest that applies.
        max_epsilon: the run ends before it would spend more.
        normalise: divide the noisy mean by C, as FLASC's code does; nothing but a rate, and to Adam not even that.
        quantile: the share of clients whose updates the clip is to leave as they are; None keeps the clip.
        clip_lr: how fast it adapts; 0.2 by default.
        count_noise: standard deviation of the noise on the sum of bits; by default the larger of a twentieth of the
            cohort and z.
        seed: of noise that can be repeated, for tests; without one the operating system's secure source is read.

    Raises:
        ConfigError: not one of ``noise_multiplier`` and ``target_epsilon`` is given, ``count_noise`` is too small, or a
            setting would have no effect.
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
            raise ConfigError("count_noise and clip_lr are of a clip that adapts; set quantile, or leave them out")
        if self.noise_multiplier == 0 and self.max_epsilon is not None:
            raise ConfigError("without noise nothing is private, and max_epsilon would never be met; leave it out")
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
        """``s``; none where updates get none either."""
        if not self.noise_multiplier:
            return 0.0
        return self.count_noise or max(num_clients / 20, self.noise_multiplier)

    def clipped(self, delta: Tree) -> tuple[Tree, bool]:
        """``delta / max(1, ||delta|| / C)``; ``delta`` itself where it is short enough."""
        norm = tree.norm(delta)
        return (delta, True) if norm <= self.clip_norm else (tree.scale(delta, self.clip_norm / norm), False)

    def noise(self, delta: Tree, num_clients: int, round: int) -> Tree:
        """``delta + N(0, (z C / n)^2)`` on every coordinate, over C with ``normalise``.

        Raises:
            ConfigError: the noise was not yet calibrated to ``target_epsilon``.
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

"""How the server applies a change: the mean delta is treated as a negative gradient, ``g = -delta``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from fedlora.core import tree
from fedlora.core.component import MODEL_CONFIG, NonNegative, Part, by_kind, dataclass
from fedlora.core.rates import LrScale, Rate, Rates, Schedule
from fedlora.core.schema import Schema
from fedlora.core.slots import Slot
from fedlora.core.tree import Tree

Slots = Mapping[str, Tree]
ALIKE: Rates = MappingProxyType({})
"""The same learning rate for all parameters."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class ServerOptimizer(ABC):
    """A server optimiser: a pure function of parameters, change and state.

    Args:
        lr_scale: learning rate multipliers of groups and factors.
        schedule: the learning rate schedule over the run.
    """

    lr_scale: LrScale = LrScale()
    schedule: Schedule = Schedule()

    @property
    def remembers(self) -> bool:
        """Whether a step depends on earlier changes, through momentum or moments."""
        return True

    @property
    def decays(self) -> bool:
        """Whether a step decays parameters towards zero."""
        return False

    @property
    def adds_unscaled(self) -> bool:
        """Whether a step adds the adapters' change unscaled."""
        return False

    def rates(self, schema: Schema, progress: tuple[int, int]) -> Rates:
        """The learning rate multiplier of each parameter in a round.

        Args:
            schema: the leaf of each parameter.
            progress: rounds finished in the whole run, and rounds in the whole run.
        """
        return self.lr_scale.by_name(schema, self.schedule.factor(*progress))

    @abstractmethod
    def step(self, params: Tree, delta: Tree, slots: Slots, steps: int, rates: Rates = ALIKE) -> tuple[Tree, Slots]:
        """Applies one change.

        Args:
            params: the parameters, float32.
            delta: the cohort's aggregated change, with the same names and shapes.
            slots: the optimiser's state, empty before the first step.
            steps: number of steps taken before this one.
            rates: learning rate multipliers by parameter name; they also apply to decoupled weight decay.

        Returns:
            The new parameters and the new state; the arguments are not modified.
        """


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Sgd(ServerOptimizer):
    """``m = momentum * m + g;  x = x - lr * m``, as ``torch.optim.SGD``; ``lr = 1`` without momentum is FedAvg.

    Args:
        lr: server learning rate.
        momentum: 0.9 gives FedAvgM (arXiv 1909.06335).
    """

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 1.0
    momentum: Part = 0.0

    @property
    def remembers(self) -> bool:
        return self.momentum > 0

    @property
    def adds_unscaled(self) -> bool:
        constant = self.lr == 1 and self.schedule == Schedule() and {*self.lr_scale.moved} <= {"head"}
        return constant and not self.momentum

    def step(self, params: Tree, delta: Tree, slots: Slots, steps: int, rates: Rates = ALIKE) -> tuple[Tree, Slots]:
        if not self.momentum:
            return _stepped(params, delta, self.lr, rates), {}
        momentum = tree.add(tree.scale(slots["m"], self.momentum), delta, -1.0) if slots else tree.scale(delta, -1.0)
        return _stepped(params, momentum, -self.lr, rates), {"m": momentum}


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class AdamLike(ServerOptimizer):
    """Adam with bias correction (arXiv 1412.6980, Alg. 1).

    Args:
        lr: server learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    kind: str
    lr: Rate = 1e-3
    beta1: Part = 0.9
    beta2: Part = 0.999
    eps: Rate = 1e-8

    @abstractmethod
    def decayed(self, params: Tree, rates: Rates) -> Tree:
        """The parameters after weight decay, to which a step is added."""

    def step(self, params: Tree, delta: Tree, slots: Slots, steps: int, rates: Rates = ALIKE) -> tuple[Tree, Slots]:
        first, second = _begun(delta, slots, 0.0)
        first = {name: self.beta1 * value - (1 - self.beta1) * delta[name] for name, value in first.items()}
        second = {name: self.beta2 * value + (1 - self.beta2) * delta[name].square() for name, value in second.items()}
        step = self.lr / (1 - self.beta1 ** (steps + 1))
        root = math.sqrt(1 - self.beta2 ** (steps + 1))
        result = {
            name: value.addcdiv(first[name], second[name].sqrt() / root + self.eps, value=-step * rates.get(name, 1.0))
            for name, value in self.decayed(params, rates).items()
        }
        return result, {"m": first, "v": second}


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Adam(AdamLike):
    """Adam with bias correction (arXiv 1412.6980, Alg. 1), as ``torch.optim.Adam``."""

    kind: Literal["adam"] = "adam"

    def decayed(self, params: Tree, rates: Rates) -> Tree:
        return params


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class AdamW(AdamLike):
    """Adam with decoupled weight decay (arXiv 1711.05101, Alg. 2), as ``torch.optim.AdamW``.

    FLASC's code calls this "FedAdam", with PyTorch's default decay of 0.01 on everything trained, the head included.

    Args:
        weight_decay: ``x = x - lr * weight_decay * x`` before the step.
    """

    kind: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.01

    @property
    def decays(self) -> bool:
        return self.weight_decay > 0

    def decayed(self, params: Tree, rates: Rates) -> Tree:
        decay = self.lr * self.weight_decay
        return {name: value * (1.0 - decay * rates.get(name, 1.0)) for name, value in params.items()}


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Adaptive(ServerOptimizer):
    """``x += lr m / (sqrt(v) + tau)`` of Reddi et al. (arXiv 2003.00295, Alg. 2): ``v`` starts at ``tau^2``.

    Args:
        lr: server learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: adaptivity, added to the root of the second moment.
    """

    kind: str
    lr: Rate = 1e-2
    beta1: Part = 0.9
    beta2: Part = 0.99
    tau: Rate = 1e-3

    @abstractmethod
    def second(self, value: Tensor, square: Tensor) -> Tensor:
        """``v`` after a change whose square is ``square``."""

    def step(self, params: Tree, delta: Tree, slots: Slots, steps: int, rates: Rates = ALIKE) -> tuple[Tree, Slots]:
        return _adaptive(params, delta, slots, self, self.second, rates)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class FedAdam(Adaptive):
    """FedAdam of Reddi et al. (arXiv 2003.00295, Alg. 2): no bias correction, ``v`` starts at ``tau^2``."""

    kind: Literal["fed_adam"] = "fed_adam"

    def second(self, value: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * value + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class FedYogi(Adaptive):
    """FedYogi of Reddi et al. (arXiv 2003.00295, Alg. 2): ``v -= (1 - beta2) d^2 sign(v - d^2)``."""

    kind: Literal["fed_yogi"] = "fed_yogi"

    def second(self, value: Tensor, square: Tensor) -> Tensor:
        return value - (1 - self.beta2) * square * torch.sign(value - square)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class FedAdagrad(ServerOptimizer):
    """FedAdagrad of Reddi et al. (arXiv 2003.00295, Alg. 2): ``v += d^2``.

    Args:
        lr: server learning rate.
        beta1: decay of the first moment; the paper's experiments use 0.
        tau: adaptivity, added to the root of the second moment.
    """

    kind: Literal["fed_adagrad"] = "fed_adagrad"
    lr: Rate = 1e-2
    beta1: Part = 0.0
    tau: Rate = 1e-3

    def step(self, params: Tree, delta: Tree, slots: Slots, steps: int, rates: Rates = ALIKE) -> tuple[Tree, Slots]:
        return _adaptive(params, delta, slots, self, torch.add, rates)


def _begun(delta: Tree, slots: Slots, start: float) -> tuple[Tree, Tree]:
    """Both moments before a step; initially zeros and ``start``."""
    if slots:
        return slots["m"], slots["v"]
    return tree.zeros_like(delta), {name: torch.full_like(value, start) for name, value in delta.items()}


def _stepped(params: Tree, direction: Tree, lr: float, rates: Rates) -> Tree:
    return {name: value.add(direction[name], alpha=lr * rates.get(name, 1.0)) for name, value in params.items()}


def _adaptive(
    params: Tree,
    delta: Tree,
    slots: Slots,
    settings: Adaptive | FedAdagrad,
    second_of: Callable[[Tensor, Tensor], Tensor],
    rates: Rates,
) -> tuple[Tree, Slots]:
    lr, beta1, tau = settings.lr, settings.beta1, settings.tau
    first, second = _begun(delta, slots, tau**2)
    first = {name: beta1 * value + (1 - beta1) * delta[name] for name, value in first.items()}
    second = {name: second_of(value, delta[name].square()) for name, value in second.items()}
    result = {
        name: value.addcdiv(first[name], second[name].sqrt() + tau, value=lr * rates.get(name, 1.0))
        for name, value in params.items()
    }
    return result, {"m": first, "v": second}


_HEAD = "head."


def take_step(
    servers: tuple[ServerOptimizer, ServerOptimizer | None],
    params: Tree,
    delta: Tree,
    slots: Slots,
    steps: int,
    schema: Schema,
    progress: tuple[int, int],
) -> tuple[Tree, Slots]:
    """The server's step of a round, in which the head may have an optimiser of its own.

    Args:
        servers: the optimiser, and that of the head; if absent, the first one steps everything.
        params: the parameters, float32.
        delta: the cohort's aggregated change, with the same names and shapes.
        slots: the state of both, empty before the first step.
        steps: number of steps taken before this one.
        schema: the leaf of each parameter.
        progress: rounds finished in the whole run, and rounds in the whole run.

    Returns:
        The new parameters and the new state; the arguments are not modified.
    """
    server, head = servers
    if head is None:
        return server.step(params, delta, slots, steps, server.rates(schema, progress))
    stepped: dict[str, Tensor] = {}
    state: dict[str, Tree] = {}
    for optimizer, prefix in ((server, ""), (head, _HEAD)):
        names = [name for name in params if (schema[name].group == "head") == bool(prefix)]
        if not names:
            continue
        own = {
            slot.removeprefix(prefix): value for slot, value in slots.items() if slot.startswith(_HEAD) == bool(prefix)
        }
        values, changes = ({name: part[name] for name in names} for part in (params, delta))
        result, after = optimizer.step(values, changes, own, steps, optimizer.rates(schema, progress))
        stepped |= result
        state |= {f"{prefix}{slot}": value for slot, value in after.items()}
    return {name: stepped[name] for name in params}, state


if TYPE_CHECKING:
    AnyServerOptimizer = ServerOptimizer
else:
    AnyServerOptimizer = Annotated[
        Sgd | Adam | AdamW | FedAdam | FedYogi | FedAdagrad,
        Slot("server", ServerOptimizer),
    ]
SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = by_kind(AnyServerOptimizer)

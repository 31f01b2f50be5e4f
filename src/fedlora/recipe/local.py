"""A client's local training: optimiser, schedule, number of epochs, number format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer

from fedlora.core.component import MODEL_CONFIG, Count, NonNegative, Part, Whole, dataclass, without_defaults
from fedlora.core.rates import LrScale, Rate, Schedule
from fedlora.core.slots import Slot
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe.gradients import Accumulated, Backward, GradientSource


class ClientOptimizer(ABC):
    """Builds the optimiser for one client's local training."""

    @property
    def decays(self) -> bool:
        """Whether a step decays parameters towards zero."""
        return False

    @abstractmethod
    def build(self, parameters: list[torch.nn.Parameter], factors: list[float]) -> torch.optim.Optimizer:
        """A fresh ``torch`` optimiser; each parameter's learning rate is multiplied by its factor."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Sgd(ClientOptimizer):
    """``torch.optim.SGD``: ``m = momentum * m + g;  x = x - lr * m``.

    Args:
        lr: learning rate.
        momentum: 0.9 as in FLASC's code.
        weight_decay: added to the gradient as ``weight_decay * x``.
    """

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 0.05
    momentum: Part = 0.9
    weight_decay: NonNegative = 0.0

    @property
    def decays(self) -> bool:
        return self.weight_decay > 0

    def build(self, parameters: list[torch.nn.Parameter], factors: list[float]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            _by_rate(parameters, self.lr, factors),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            # the fused kernel fails if some parameters have momentum and others have none yet
            foreach=True,
        )


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class AdamW(ClientOptimizer):
    """``torch.optim.AdamW`` (arXiv 1711.05101, Alg. 2).

    Args:
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: zero by default, because with an SVD initialisation it would decay pre-trained weights.
    """

    kind: Literal["adamw"] = "adamw"
    lr: Rate = 1e-3
    beta1: Part = 0.9
    beta2: Part = 0.999
    eps: Rate = 1e-8
    weight_decay: NonNegative = 0.0

    @property
    def decays(self) -> bool:
        return self.weight_decay > 0

    def build(self, parameters: list[torch.nn.Parameter], factors: list[float]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            _by_rate(parameters, self.lr, factors),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )


def _by_rate(parameters: list[torch.nn.Parameter], lr: float, factors: list[float]) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim``, one per learning rate, in order of first use."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for parameter, factor in zip(parameters, factors, strict=True):
        groups.setdefault(lr * factor, []).append(parameter)
    return [{"params": members, "lr": rate} for rate, members in groups.items()]


CLIENT_OPTIMIZERS: dict[str, type[ClientOptimizer]] = {"sgd": Sgd, "adamw": AdamW}
if TYPE_CHECKING:
    AnyClientOptimizer = ClientOptimizer
else:
    AnyClientOptimizer = Annotated[Sgd | AdamW, Slot("client_optimizer", ClientOptimizer)]


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Local:
    """A client's local training in a round.

    Args:
        optimizer: the client's optimiser; its state is reset in each round unless ``keep_optimizer`` is set.
        schedule: the learning rate schedule over the run.
        lr_scale: learning rate multipliers of groups and factors; LoRA+ (arXiv 2402.12354) is ``{ B = 16.0 }``.
        epochs: passes over the client's examples.
        max_steps: maximum number of optimiser steps in a round; 0 trains nothing and sends zeros.
        shuffle: whether each pass takes the examples in a new order.
        batch_size: examples per step; the last batch of a pass may be smaller and is kept.
        accumulate: number of passes in which a step's gradient is computed, each over ``batch_size / accumulate``
            examples: the same step with less memory.
        clip_norm: largest Euclidean norm of a step's gradient.
        proximal: FedProx's mu (arXiv 1812.06127, Eq. 2): adds ``mu / 2 ||x - x_start||^2`` to the loss.
        dropout: whether the pre-trained model's own dropout is active; a client takes only a few steps, which do not
            need its noise.
        compute: ``bf16`` keeps frozen weights in bfloat16 and trained ones in float32; ``auto`` is ``bf16`` on CUDA
            devices that have it in hardware, and ``fp32`` elsewhere.
        timeout_seconds: time limit after which a client gives up and the round continues without it; a run in which
            that happens is not reproducible bit for bit.
        keep_optimizer: whether the client keeps its optimiser's state between rounds (centralised training needs it).
        example_privacy: per-example clip and noise, if any.
    """

    optimizer: AnyClientOptimizer = Sgd()
    schedule: Schedule = Schedule()
    lr_scale: LrScale = LrScale()
    epochs: Count = 1
    max_steps: Whole | None = None
    shuffle: bool = True
    batch_size: Count = 16
    accumulate: Count = 1
    clip_norm: Rate | None = None
    proximal: NonNegative = 0.0
    dropout: bool = False
    compute: Literal["fp32", "bf16", "auto"] = "fp32"
    timeout_seconds: Rate | None = None
    keep_optimizer: bool = False
    example_privacy: ExampleNoise | None = None

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, write, ("accumulate",))

    @property
    def gradient_source(self) -> GradientSource:
        """The source of its gradients."""
        if self.example_privacy is not None:
            return self.example_privacy
        if self.accumulate > 1:
            return Accumulated(self.shuffle, self.accumulate, self.batch_size)
        return Backward(self.shuffle)

    @property
    def base(self) -> Literal["fp32", "bf16"]:
        """The number format of frozen weights; ``auto`` is settled when a run begins, and until then ``fp32``."""
        return "bf16" if self.compute == "bf16" else "fp32"

    def num_steps(self, num_examples: int) -> int:
        """The number of optimiser steps in a round for a client with ``num_examples`` examples."""
        steps = self.epochs * -(-num_examples // self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

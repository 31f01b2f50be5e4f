"""A start of LoRA without chance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora import LoRAInit


@dataclass(frozen=True)
class Identity(LoRAInit):
    """``A`` picks the first inputs, ``B = 0``."""

    residual: ClassVar[bool] = False
    from_seed: ClassVar[bool] = True

    def factors(
        self, weight: Tensor, delta: Tensor | None, rank: int, scale: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros(weight.shape[0], rank), torch.eye(rank, weight.shape[1])

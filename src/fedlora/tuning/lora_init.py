"""Initialisations of LoRA's factors: pure functions of one matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor

from fedlora.core.component import MODEL_CONFIG, by_kind, dataclass
from fedlora.core.slots import Slot
from fedlora.core.svd import leading_svd

Factors = tuple[Tensor, Tensor]
SvdSplit = Literal["symmetric", "left"]


class LoRAInit(ABC):
    """The initial values of ``B`` and ``A``."""

    residual: ClassVar[bool]
    """Whether ``scale * B @ A`` is subtracted from the frozen weight, so that the function does not change."""
    from_seed: ClassVar[bool]
    """Whether the values depend only on a seed and the shape, so that a client can redraw them."""

    @abstractmethod
    def factors(self, weight: Tensor, delta: Tensor | None, rank: int, scale: float, seed: int) -> Factors:
        """The factors for one matrix.

        Args:
            weight: the pre-trained matrix, ``(out, in)``, float32.
            delta: what an earlier phase learnt for it, ``(out, in)``, sparse (COO) for a large matrix of which few
                entries were trained; or None.
            rank: number of columns of ``B`` and rows of ``A``; if it exceeds ``min(out, in)``, the rest is zero.
            scale: ``alpha / rank``, the factor of ``B @ A`` in the forward pass.
            seed: for random initialisation.

        Returns:
            ``B: (out, rank)`` and ``A: (rank, in)``, float32.
        """


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Kaiming(LoRAInit):
    """LoRA's default initialisation (arXiv 2106.09685): ``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0``, as in PEFT."""

    kind: Literal["kaiming"] = "kaiming"
    residual: ClassVar[bool] = False
    from_seed: ClassVar[bool] = True

    def factors(self, weight: Tensor, delta: Tensor | None, rank: int, scale: float, seed: int) -> Factors:
        bound = 1.0 / math.sqrt(weight.shape[1])
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(rank, weight.shape[1], generator=generator)
        return torch.zeros(weight.shape[0], rank), (2.0 * uniform - 1.0) * bound


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Orthogonal(LoRAInit):
    """``A`` with orthonormal rows, ``B = 0``: all input directions in the row space have equal weight at the start."""

    kind: Literal["orthogonal"] = "orthogonal"
    residual: ClassVar[bool] = False
    from_seed: ClassVar[bool] = False  # QR results differ between machines in the last bits

    def factors(self, weight: Tensor, delta: Tensor | None, rank: int, scale: float, seed: int) -> Factors:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.zeros(rank, weight.shape[1])
        useful = min(rank, weight.shape[1])
        rows[:useful] = torch.linalg.qr(torch.randn(weight.shape[1], useful, generator=generator)).Q.T
        return torch.zeros(weight.shape[0], rank), rows


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class SvdOfWeight(LoRAInit):
    """FeDeRA's initialisation (arXiv 2404.18848, Sec. 3; PiSSA in centralised training, arXiv 2404.02948).

    ``W = U S V^T``; ``B = U_r sqrt(S_r) / sqrt(scale)``, ``A = sqrt(S_r) V_r^T / sqrt(scale)``, and the frozen weight
    becomes ``W - scale B A``, so that the model initially computes the pre-trained function.

    Args:
        split: ``symmetric`` gives both factors ``sqrt(S)``; ``left`` gives ``S`` to ``B`` and leaves ``A`` orthonormal.
    """

    kind: Literal["svd_of_weight"] = "svd_of_weight"
    split: SvdSplit = "symmetric"
    residual: ClassVar[bool] = True
    from_seed: ClassVar[bool] = False

    def factors(self, weight: Tensor, delta: Tensor | None, rank: int, scale: float, seed: int) -> Factors:
        return truncated_svd(weight, rank, scale, self.split)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class SvdOfDelta(LoRAInit):
    """SLoRA's hand-over (arXiv 2308.06522, Sec. 3): LoRA starts from the best rank-``r`` approximation of the delta.

    ``delta = U S V^T``; ``scale B A = U_r S_r V_r^T``, on the base as it was before the first phase. A matrix not
    trained in the first phase starts as in ``Kaiming``.

    Args:
        split: ``symmetric`` gives both factors ``sqrt(S)``; ``left`` gives ``S`` to ``B`` and leaves ``A`` orthonormal.
        fold: the part of the remainder that is folded into the frozen base: ``none`` (the paper), the ``biases``, or
            all the ``rest`` (biases, matrices without an adapter, and the truncation error).
    """

    kind: Literal["svd_of_delta"] = "svd_of_delta"
    split: SvdSplit = "symmetric"
    fold: Literal["none", "biases", "rest"] = "none"
    residual: ClassVar[bool] = False
    from_seed: ClassVar[bool] = False

    def factors(self, weight: Tensor, delta: Tensor | None, rank: int, scale: float, seed: int) -> Factors:
        if delta is None or not bool((delta.coalesce().values() if delta.is_sparse else delta).any()):
            return Kaiming().factors(weight, None, rank, scale, seed)
        return truncated_svd(delta, rank, scale, self.split)


def truncated_svd(matrix: Tensor, rank: int, scale: float, split: SvdSplit) -> Factors:
    """``B, A`` with ``scale * B @ A`` = the best approximation of ``matrix`` of rank ``rank``.

    The sign of each pair of singular vectors is fixed by making the largest entry of the left one positive.

    Args:
        matrix: ``(out, in)``, dense or sparse (COO).
        rank: as in ``LoRAInit.factors``.
        scale: the factor of ``B @ A``, divided out exactly once.
        split: where the singular values go.

    Returns:
        ``B: (out, rank)`` and ``A: (rank, in)``, float32.
    """
    left, values, right = leading_svd(matrix.detach().to(torch.float32), rank)
    useful, values = len(values), values / scale
    largest = left.abs().argmax(dim=0)
    sign = torch.where(left[largest, torch.arange(useful)] < 0, -1.0, 1.0)
    low, high = (values.sqrt(), values.sqrt()) if split == "symmetric" else (values, torch.ones_like(values))
    b = torch.zeros(matrix.shape[0], rank)
    a = torch.zeros(rank, matrix.shape[1])
    b[:, :useful] = left * (sign * low)
    a[:useful] = (sign * high).unsqueeze(1) * right
    return b, a


if TYPE_CHECKING:
    AnyLoRAInit = LoRAInit
else:
    AnyLoRAInit = Annotated[Kaiming | Orthogonal | SvdOfWeight | SvdOfDelta, Slot("lora_init", LoRAInit)]
LORA_INITS: dict[str, type[LoRAInit]] = by_kind(AnyLoRAInit)

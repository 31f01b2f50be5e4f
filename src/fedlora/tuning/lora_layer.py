"""The modules that carry a low-rank adapter: a linear layer, a convolution, an embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.tuning.matrices import copy_attributes, is_plain, is_quantized, is_transposed, matrix_shape


class LoRALayer(nn.Module, ABC):
    """A matrix with a low-rank adapter; it keeps the old module's parameters under their old names.

    Args:
        old: a module that ``tuning.matrices`` treats as a matrix.
        rank: rank of the adapter.
        scale: the factor of ``B A``.
        dropout: on the adapter's input.
    """

    def __init__(self, old: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        copy_attributes(old, self)
        self.rows, self.columns = matrix_shape(old)
        self.weight = old.weight
        self.bias = getattr(old, "bias", None)
        # a quantised or scaled module keeps computing its own product
        self.own = None if is_plain(old) else old
        self.packed = is_quantized(old)
        self.transposed = is_transposed(old)
        self.scale = scale
        self.dropout = dropout
        # the model is already on its device; a quantised weight is stored there too
        device = self.frozen[0].device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.columns, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.rows, rank, device=device))

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """``W x + b + scale * B A x``."""

    @property
    def frozen(self) -> tuple[Tensor, Tensor | None]:
        """The frozen weight as stored, and the bias."""
        weight, bias = self.weight, self.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return weight, bias

    def matrix(self) -> Tensor:
        """The frozen weight as ``(out, in)``; if packed, a tensor on ``meta``, without values."""
        if self.packed:
            return torch.empty(self.rows, self.columns, device="meta")
        return self.as_matrix(self.frozen[0])

    def as_matrix(self, value: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``(out, in)``."""
        return value.T if self.transposed else value.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of ``as_matrix``."""
        return (matrix.T if self.transposed else matrix).reshape(self.frozen[0].shape)

    def adapter_input(self, inputs: Tensor) -> Tensor:
        """The part of the input that the adapter receives."""
        return functional.dropout(inputs, self.dropout, self.training) if self.dropout else inputs


class LoRALinear(LoRALayer):
    """``nn.Linear``, GPT-2's ``Conv1D``, or a quantised linear layer, with an adapter."""

    def forward(self, inputs: Tensor) -> Tensor:
        """``W x + b + scale * B A x``; the product with ``B`` adds into the result in one kernel."""
        if self.own is not None:
            result: Tensor = self.own(inputs)
            low = functional.linear(self.adapter_input(inputs).to(self.lora_A.dtype), self.lora_A)
            return (result + self.scale * functional.linear(low, self.lora_B)).to(result.dtype)
        weight, bias = self.frozen
        result = functional.linear(inputs, self.as_matrix(weight), bias)
        low = functional.linear(self.adapter_input(inputs), self.lora_A)
        added = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), self.lora_B.T, alpha=self.scale)
        return added.view(result.shape)


class LoRAConv(LoRALayer):
    """An ungrouped ``nn.Conv2d`` with an adapter: a convolution to ``rank`` channels, then a 1x1 convolution."""

    stride: tuple[int, int]
    padding: Any
    dilation: tuple[int, int]

    def forward(self, inputs: Tensor) -> Tensor:
        """``W * x + b + scale * B (A * x)``."""
        weight, bias = self.frozen
        place = (self.stride, self.padding, self.dilation)
        result = functional.conv2d(inputs, weight, bias, *place)
        low = functional.conv2d(self.adapter_input(inputs), self.kernel(self.lora_A, "lora_A"), None, *place)
        return torch.add(result, functional.conv2d(low, self.kernel(self.lora_B, "lora_B")), alpha=self.scale)

    def kernel(self, factor: Tensor, leaf: str) -> Tensor:
        """A factor as a kernel: ``A`` as ``(rank, in, height, width)``, ``B`` as ``(out, rank, 1, 1)``."""
        return factor.view(-1, *self.frozen[0].shape[1:]) if leaf == "lora_A" else factor[:, :, None, None]


class LoRAEmbedding(LoRALayer):
    """``nn.Embedding`` with an adapter; the inputs are indices, so dropout does not apply."""

    padding_idx: int | None

    def forward(self, inputs: Tensor) -> Tensor:
        """``(W + scale * B A) e_i`` for each index ``i``, times the embedding's scale factor if it has one."""
        weight, _ = self.frozen
        result: Tensor
        if self.own is not None:
            result, factor = self.own(inputs), getattr(self.own, "embed_scale", 1.0)
        else:
            result, factor = functional.embedding(inputs, weight, self.padding_idx), 1.0
        low = functional.embedding(inputs, self.lora_A.T, self.padding_idx)
        return (result + functional.linear(low, self.lora_B) * (self.scale * factor)).to(result.dtype)


def lora_layer(old: nn.Module, rank: int, scale: float, dropout: float) -> LoRALayer:
    """``old`` with an adapter; see ``LoRALayer``."""
    if isinstance(old, nn.Conv2d):
        return LoRAConv(old, rank, scale, dropout)
    if isinstance(old, nn.Embedding):
        return LoRAEmbedding(old, rank, scale, dropout)
    return LoRALinear(old, rank, scale, dropout)

"""Views the weight of a linear layer, convolution or embedding as one matrix ``(out, in)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedlora.core.later import transformers

if TYPE_CHECKING:
    Matrix = nn.Linear | transformers.pytorch_utils.Conv1D | nn.Conv2d | nn.Embedding

_READ = (
    *("in_features", "out_features", "nx", "nf"),
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("num_embeddings", "embedding_dim", "padding_idx"),
)
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_matrix(module: nn.Module) -> TypeGuard[Matrix]:
    """Whether ``module`` multiplies by one matrix: a linear layer, GPT-2's ``Conv1D``, a convolution, an embedding."""
    return isinstance(module, _plain())


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer: ``nn.Linear``, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` computes exactly as its PyTorch class does, not as a subclass (quantised, scaled) does."""
    return type(module) in _plain() and "forward" not in vars(module)


def holds_numbers(weight: Tensor) -> bool:
    """Whether the entries of ``weight`` are its actual values, not codes of a quantised format."""
    return weight.dtype in _NUMBERS


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is quantised."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return not holds_numbers(weight)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as ``(in, out)``: GPT-2's ``Conv1D``, and an embedding, ``(number, size)``."""
    return isinstance(module, transformers.pytorch_utils.Conv1D | nn.Embedding)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)``; for a convolution ``(out, in * height * width)``, for an embedding ``(size, number)``."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a packed weight has a different shape
    out, columns = oriented(module).shape
    return out, columns


def oriented(module: nn.Module) -> Tensor:
    """The module's weight as ``(out, in)``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed(module) else weight.flatten(1)


def copy_attributes(old: nn.Module, new: nn.Module) -> None:
    """Copies the attributes that models read, such as a convolution's stride, from ``old`` to its replacement
    ``new``."""
    for name in _READ:
        if name in vars(old):
            setattr(new, name, vars(old)[name])


def obstacle(module: nn.Module) -> str | None:
    """The reason why ``module``'s matrix can neither be trained nor carry an adapter; None if there is none."""
    own = f"its class {type(module).__name__} computes in a way of its own"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"it is a convolution in {module.groups} groups, which is no single matrix"
        if module.padding_mode != "zeros":
            return f"it pads with {module.padding_mode!r} instead of zeros"
        return None if type(module) is nn.Conv2d else own
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "it rescales its rows as it reads them (max_norm)"
        scaled = getattr(module, "embed_scale", None) is not None
        return None if type(module) is nn.Embedding or scaled else own
    return None


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Modules that share their weight with another module, such as a language model's embedding and head.

    Returns:
        Module name to the name of the first other module with the same weight.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(name)
    shared = [names for names in holders.values() if len(names) > 1]
    return {name: next(other for other in names if other != name) for names in shared for name in names}


def _plain() -> tuple[type[nn.Module], ...]:
    return nn.Linear, transformers.pytorch_utils.Conv1D, nn.Conv2d, nn.Embedding

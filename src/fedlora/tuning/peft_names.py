"""The names and shapes that ``peft`` gives LoRA's parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.core.errors import ConfigError
from fedlora.core.tree import Tree
from fedlora.tuning.lora import lora_layers
from fedlora.tuning.lora_layer import LoRAConv, LoRAEmbedding

PEFT_PREFIX = "base_model.model."
"""The prefix that ``peft`` adds to the names of a model's parameters."""
_FACTOR = re.compile(r"(?P<module>.*)\.lora_(?:embedding_)?(?P<side>[AB]|magnitude_vector)(?:\.default)?(?:\.weight)?")


def ending_of(key: str) -> str:
    """A key of a ``rank_pattern`` or ``alpha_pattern`` of ``peft`` as the end of a name, if it is no more than that."""
    return key.removeprefix("^").replace("\\.", ".")


def from_peft(state: Mapping[str, Tensor]) -> Tree:
    """Converts a PEFT LoRA state dict to fedlora's names, with every factor as a matrix.

    Args:
        state: as in ``adapter_model.safetensors`` or ``PeftModel.state_dict()``: names such as
            ``base_model.model.<module>.lora_A[.default].weight``, ``...<module>.lora_embedding_A[.default]`` and
            ``...<head>.modules_to_save.default.weight``; a convolution's factors are ``(rank, in, height, width)`` and
            ``(out, rank, 1, 1)``, and DoRA's magnitudes ``...<module>.lora_magnitude_vector``.

    Raises:
        ConfigError: a name is not a PEFT name of a LoRA factor or a saved module.
    """
    result = {}
    for key, value in state.items():
        if not key.startswith(PEFT_PREFIX):
            raise ConfigError(f"{key!r} is not a name of a PEFT state dict: it should start with {PEFT_PREFIX!r}")
        name = key.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        factor = _FACTOR.fullmatch(name)
        if factor is not None:
            name = f"{factor['module']}.lora_{factor['side']}"
            value = value.flatten(1) if value.dim() > 2 else value
        result[name] = value.to(torch.float32)
    return result


def to_peft(params: Mapping[str, Tensor], model: nn.Module | None = None) -> Tree:
    """The inverse of ``from_peft``, with the names of ``adapter_model.safetensors``.

    Args:
        params: the trained parameters.
        model: the model that contains the adapters; needed if some of them are on convolutions or embeddings, whose
            factors have other shapes and names.
    """
    layers = lora_layers(model) if model is not None else {}
    result = {}
    for name, value in params.items():
        module, _, leaf = name.rpartition(".")
        layer = layers.get(module)
        if leaf in ("lora_A", "lora_B"):
            if isinstance(layer, LoRAEmbedding):
                name = f"{module}.{leaf.replace('lora_', 'lora_embedding_')}"
            else:
                name = f"{name}.weight"
            if isinstance(layer, LoRAConv):
                value = layer.kernel(value, leaf)
        result[PEFT_PREFIX + name] = value
    return result

"""What a model's forward pass does in training: gradient checkpointing in evaluation mode, and no cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fedlora.core.later import transformers


@contextlib.contextmanager
def checkpointing_without_dropout(model: nn.Module) -> Iterator[None]:
    """Keeps activation checkpointing on in a model in evaluation mode; nothing happens where it is not enabled.

    ``transformers`` checkpoints a layer only while ``layer.training`` is true. Training mode would also turn on
    whatever else reads that flag: dropout modules, dropout as a function inside attention and inside the layer itself
    (OPT, BART), layer drop, router noise. So only the flag of the checkpointed layers is set, not that of their
    children, and it is cleared again while the layer's own code runs, in the forward pass and in its repetition. No
    list of dropout classes or attributes is needed.

    A model from the Hub with checkpointing code of its own, outside ``GradientCheckpointingLayer``, is left as it is:
    it checkpoints in training mode only.

    Args:
        model: in evaluation mode; it is in evaluation mode afterwards too.
    """
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if isinstance(layer, transformers.modeling_layers.GradientCheckpointingLayer) and _is_checkpointed(layer)
    ]
    inner = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer, checkpoint in zip(layers, inner, strict=True):
            layer._gradient_checkpointing_func = _in_evaluation_mode(layer, checkpoint)
            layer.training = True
        yield
    finally:
        for layer, checkpoint in zip(layers, inner, strict=True):
            layer._gradient_checkpointing_func = checkpoint
            layer.training = False


def _is_checkpointed(layer: transformers.modeling_layers.GradientCheckpointingLayer) -> bool:
    return bool(layer.gradient_checkpointing) and not layer.training


def _in_evaluation_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint``, with ``layer`` in evaluation mode each time that its forward pass runs."""

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        def forward(*again: Any) -> Any:
            layer.training = False
            try:
                return function(*again)
            finally:  # a repeated forward pass ends early, by an exception
                layer.training = True

        return checkpoint(forward, *inputs)

    return run


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within the block, a decoder keeps no keys and values for a next token, as there is none in training.

    Each layer would copy them, and a layer that is computed twice would append them twice.

    Args:
        model: any module.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True

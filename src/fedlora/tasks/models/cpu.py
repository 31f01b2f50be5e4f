"""Faster CPU training of Hugging Face models: dropout from whole random words, attention, and retained memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.later import transformers
from fedlora.tuning.targets import replace_module

ATTENTION = "fedlora_cpu"
_LEVELS = 2**16
_SMALL = 2**12
"""Number of entries below which PyTorch's dropout is as fast."""


_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**25), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1)}
"""Settings of glibc's allocator: their variable, number and value."""


def speed_up(model: nn.Module, attention: bool) -> None:
    """Replaces dropout, and optionally attention, by versions that are fast on a CPU; parameters keep their names.

    Args:
        model: any module; attention is left alone where it does not go through the interface of ``transformers``.
        attention: whether to replace attention too.
    """
    _configure_memory()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            replace_module(model, name, Dropout(module.p).train(module.training))
    if attention and isinstance(model, transformers.PreTrainedModel) and _is_plain(model):
        transformers.AttentionInterface.register(ATTENTION, attend)
        transformers.AttentionMaskInterface.register(ATTENTION, transformers.masking_utils.eager_mask)
        model.set_attn_implementation(ATTENTION)


def _is_plain(model: nn.Module) -> bool:
    """Whether softmax of masked products is all that a model's attention is.

    Families with caps on the scores (Gemma-2) or sinks (GPT-OSS), which PyTorch's kernel lacks, declare that they do
    not support it and keep the attention of their class.
    """
    flags = ("_supports_attention_backend", "_supports_sdpa")
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    return all(getattr(part, flag, False) for part in parts for flag in flags)


def _configure_memory() -> None:
    """Retains memory pages that every step frees and requests again, and limits the cache of kernels for each width."""
    # a kernel is made for each width of a batch; read once, so it is of no effect after the first product
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
    if sys.platform == "linux" and not any(name in os.environ for name in _MALLOPT):
        with contextlib.suppress(AttributeError):  # other C libraries have no such function
            for number, value in _MALLOPT.values():
                ctypes.CDLL(None).mallopt(number, value)


class Dropout(nn.Module):
    """``nn.Dropout`` by ``drop``.

    Args:
        p: share of entries that are dropped.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` with entries dropped while training."""
        return drop(inputs, self.p) if self.training else inputs


def drop(inputs: Tensor, p: float) -> Tensor:
    """``m * inputs`` with ``m = 1 / q`` where a 16-bit draw is below ``65536 q``, else 0: ``E m = 1``.

    PyTorch draws one number per entry, which takes longer than the products of a small model. Here one 64-bit word
    of the default generator serves four entries. ``1 / q`` is the nearest to ``1 / (1 - p)`` that the number format
    holds, so in bfloat16 ``q`` is up to 0.4 % off ``1 - p`` while the expectation stays exact to 1.5e-5.

    Args:
        inputs: any shape; float32 and bfloat16 on a CPU take the short way.
        p: share of entries that are dropped.
    """
    short = inputs.device.type == "cpu" and inputs.dtype in (torch.float32, torch.bfloat16)
    if not short or not 0 < p < 1 or inputs.numel() < _SMALL:
        return functional.dropout(inputs, p)
    word = torch.int16 if inputs.dtype == torch.bfloat16 else torch.int32
    scale = torch.tensor(1 / (1 - p), dtype=inputs.dtype)
    draws = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = draws[: inputs.numel()].view(inputs.shape)
    # the mask is built as the bits of its values: comparing and multiplying integers is faster than converting
    bits = torch.empty(inputs.shape, dtype=word)
    torch.lt(kept, round(_LEVELS / float(scale)) - _LEVELS // 2, out=bits).mul_(int(scale.view(word)))
    return inputs * bits.view(inputs.dtype)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with the signature of ``transformers``' interface.

    PyTorch's fused kernel has a slow backward pass in bfloat16 and none with dropout; there the products are made one
    by one, the softmax from bfloat16 to bfloat16 (its sums are float32). Everything else takes the fused kernel.

    Args:
        module: the attention block.
        query: ``(batch, heads, length, size)``.
        key: ``(batch, key heads, key length, size)``.
        value: as ``key``.
        attention_mask: what is added to the scores, ``(batch, 1, length, key length)``.
        scaling: of the products; ``size ** -0.5`` if None.
        dropout: on the weights.
        others: what some families pass beside; any that is set takes the fused kernel.

    Returns:
        ``(batch, length, heads, size)``, and no weights.
    """
    plain = query.dtype == torch.float32 and not dropout
    special = any(others.get(name) is not None for name in ("position_bias", "s_aux", "softcap"))
    if plain or special or key.shape[1] != query.shape[1]:
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    with torch.autocast("cpu", enabled=False):
        scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)
        if attention_mask is not None:
            scores = scores.add_(attention_mask.to(scores.dtype))
        weights = torch.softmax(scores, -1)
        weights = drop(weights, dropout)
        return (weights @ value).transpose(1, 2).contiguous(), None

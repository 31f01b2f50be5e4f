"""Frozen weights that are rounded to bfloat16 as they are read, so that no copy in float32 is ever in memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fedlora.core.later import transformers


def rounded_names(model: nn.Module, head: frozenset[str]) -> list[str]:
    """The parameters that are rounded: all but the head's, and those of normalisations with running statistics."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, _NormBase)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and (f"{prefix}.{name}" if prefix else name) not in head
    ]


def mixed(model: nn.Module, device: torch.device) -> torch.autocast:
    """Lets a model compute whose weights are partly rounded; one in float32 computes as it is."""
    rounded = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return torch.autocast(device.type, torch.bfloat16, enabled=rounded)


@contextlib.contextmanager
def rounding(head_of: Callable[[nn.Module], frozenset[str]]) -> Iterator[None]:
    """Within the block, ``from_pretrained(dtype=float32)`` reads weights outside the head as bfloat16.

    Fresh parts and buffers stay float32, and so does the head: they have the values that they have without this. A
    version of ``transformers`` that has no plan of number formats reads everything as float32, which costs memory only.

    Args:
        head_of: the names of the head's parameters in a model that is not loaded yet.
    """
    original: Any = getattr(transformers.PreTrainedModel, "_get_dtype_plan", None)
    if original is None:
        yield
        return

    def plan(self: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        own = {f"^{re.escape(name)}$": torch.bfloat16 for name in rounded_names(self, head_of(self))}
        return {**original(self, dtype), **own}

    transformers.PreTrainedModel._get_dtype_plan = plan  # type: ignore[method-assign]
    try:
        yield
    finally:
        transformers.PreTrainedModel._get_dtype_plan = original  # type: ignore[method-assign]


def is_stored_in_bfloat16(path: str, revision: str | None) -> bool:
    """Whether a model's files are here and have no number that rounding to bfloat16 would change.

    Args:
        path: a folder, or a hub id.
        revision: a hub revision.
    """
    folder = Path(path)
    if not folder.is_dir():
        with contextlib.suppress(OSError, ValueError):
            config = transformers.utils.hub.cached_file(path, "config.json", revision=revision, local_files_only=True)
            folder = Path(str(config)).parent
    formats = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            formats |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return "BF16" in formats and not any(name.startswith("F") for name in formats)

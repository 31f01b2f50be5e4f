"""Trying a model without a trace: nothing is drawn, and its modules are as they were afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for a while; each of its modules then has the mode that it had.

    Args:
        model: its modules may be in different modes, as LoRA's dropout and frozen normalisation are while it trains.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

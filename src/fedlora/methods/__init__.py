"""Methods from papers and their baselines, as functions that return recipes.

Only this folder compares the names of methods.
"""

from __future__ import annotations

from collections.abc import Callable

from fedlora.methods.baselines import (
    adapter_lth,
    fed_select,
    fedex,
    ffa,
    flexlora,
    flora,
    het_lora,
    rolora,
    sparse_adapter,
)
from fedlora.methods.papers import Phases, dense_lora, fedavg, federa, flasc, full, primed_lora, slora
from fedlora.methods.presets import paper

__all__ = [
    "METHODS",
    "Phases",
    "adapter_lth",
    "dense_lora",
    "fed_select",
    "fedavg",
    "federa",
    "fedex",
    "ffa",
    "flasc",
    "flexlora",
    "flora",
    "full",
    "het_lora",
    "paper",
    "primed_lora",
    "rolora",
    "slora",
    "sparse_adapter",
]

METHODS: dict[str, Callable[..., Phases]] = {
    "fedavg": fedavg,
    "lora": dense_lora,
    "full": full,
    "flasc": flasc,
    "federa": federa,
    "slora": slora,
    "primed_lora": primed_lora,
    "ffa": ffa,
    "rolora": rolora,
    "flexlora": flexlora,
    "fedex": fedex,
    "flora": flora,
    "het_lora": het_lora,
    "sparse_adapter": sparse_adapter,
    "adapter_lth": adapter_lth,
    "fed_select": fed_select,
}
"""The methods that ``[method] kind = ...`` selects in a configuration, by name."""

"""Federated fine-tuning of Hugging Face models with low-rank adapters, sending as few bytes as possible.

Names are imported when they are first used, so that ``import fedlora`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.clients import Clients, Clusters, Column, Dirichlet, Iid, Natural, Pooled, Quantity, Shards
    from fedlora.config import Evaluate, Experiment, load
    from fedlora.errors import FedloraError
    from fedlora.experiment import run
    from fedlora.inference import load_run
    from fedlora.local import Local
    from fedlora.methods import (
        adapter_lth,
        dense_lora,
        fed_select,
        fedavg,
        federa,
        fedex,
        ffa,
        flasc,
        flexlora,
        flora,
        full,
        het_lora,
        primed_lora,
        rolora,
        slora,
        sparse_adapter,
    )
    from fedlora.rates import LrScale, Schedule
    from fedlora.recipe import Phase, Recipe
    from fedlora.result import Result
    from fedlora.tasks import (
        CausalLM,
        Docstrings,
        Files,
        Hub,
        ImageClassification,
        ImageFolder,
        Instruction,
        Model,
        QuestionAnswering,
        Sites,
        TextClassification,
        TokenClassification,
    )
    from fedlora.transport import Link, Quota, RandomK, Stage, TopK, Uniform
    from fedlora.tuning import BitFit, Bottleneck, Full, HeadOnly, LoRA, Peft, SparseMask

_HOME = {
    **dict.fromkeys(("Clients", "Clusters", "Column", "Dirichlet", "Iid", "Natural"), "clients"),
    **dict.fromkeys(("Pooled", "Quantity", "Shards"), "clients"),
    **dict.fromkeys(("Evaluate", "Experiment", "load"), "config"),
    "FedloraError": "errors",
    "run": "experiment",
    "load_run": "inference",
    "Local": "local",
    **dict.fromkeys(("adapter_lth", "dense_lora", "fed_select", "fedavg", "federa", "fedex", "ffa"), "methods"),
    **dict.fromkeys(("flasc", "flexlora", "flora", "full", "het_lora", "primed_lora", "rolora", "slora"), "methods"),
    "sparse_adapter": "methods",
    **dict.fromkeys(("LrScale", "Schedule"), "rates"),
    **dict.fromkeys(("Phase", "Recipe"), "recipe"),
    "Result": "result",
    **dict.fromkeys(("CausalLM", "ImageClassification", "Instruction", "Model", "QuestionAnswering"), "tasks"),
    **dict.fromkeys(("Docstrings", "Files", "Hub", "ImageFolder", "Sites"), "tasks"),
    **dict.fromkeys(("TextClassification", "TokenClassification"), "tasks"),
    **dict.fromkeys(("Link", "Quota", "RandomK", "Stage", "TopK", "Uniform"), "transport"),
    **dict.fromkeys(("BitFit", "Bottleneck", "Full", "HeadOnly", "LoRA", "Peft", "SparseMask"), "tuning"),
}

__version__ = "0.1.0"

__all__ = [
    "BitFit",
    "Bottleneck",
    "CausalLM",
    "Clients",
    "Clusters",
    "Column",
    "Dirichlet",
    "Docstrings",
    "Evaluate",
    "Experiment",
    "FedloraError",
    "Files",
    "Full",
    "HeadOnly",
    "Hub",
    "Iid",
    "ImageClassification",
    "ImageFolder",
    "Instruction",
    "Link",
    "LoRA",
    "Local",
    "LrScale",
    "Model",
    "Natural",
    "Peft",
    "Phase",
    "Pooled",
    "Quantity",
    "QuestionAnswering",
    "Quota",
    "RandomK",
    "Recipe",
    "Result",
    "Schedule",
    "Shards",
    "Sites",
    "SparseMask",
    "Stage",
    "TextClassification",
    "TokenClassification",
    "TopK",
    "Uniform",
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
    "load",
    "load_run",
    "primed_lora",
    "rolora",
    "run",
    "slora",
    "sparse_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

"""Federated fine-tuning of Hugging Face models with low-rank adapters, sending as few bytes as possible.

Names are imported when they are first used, so that ``import fedlora`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.config import Evaluate, Experiment, load
    from fedlora.core.errors import FedloraError
    from fedlora.core.rates import LrScale, Schedule
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
    from fedlora.population.clients import Clients
    from fedlora.population.partitions import Dirichlet, Iid, Natural, Pooled, Quantity, Shards
    from fedlora.population.skew import Clusters, Column
    from fedlora.recipe import Phase, Recipe
    from fedlora.recipe.local import Local
    from fedlora.runs.experiment import run
    from fedlora.runs.inference import load_run
    from fedlora.runs.result import Result
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
        Rows,
        Sites,
        TextClassification,
        TokenClassification,
    )
    from fedlora.transport import Link, Quota, RandomK, Stage, TopK, Uniform
    from fedlora.tuning import BitFit, Bottleneck, Full, HeadOnly, LoRA, Peft, SparseMask

_NAMES = {
    "config": "Evaluate Experiment load",
    "core.errors": "FedloraError",
    "runs.experiment": "run",
    "runs.inference": "load_run",
    "recipe.local": "Local",
    "methods": "adapter_lth dense_lora fed_select fedavg federa fedex ffa flasc flexlora flora full het_lora "
    "primed_lora rolora slora sparse_adapter",
    "population.clients": "Clients",
    "population.partitions": "Dirichlet Iid Natural Pooled Quantity Shards",
    "core.rates": "LrScale Schedule",
    "recipe": "Phase Recipe",
    "runs.result": "Result",
    "population.skew": "Clusters Column",
    "tasks": "CausalLM Docstrings Files Hub ImageClassification ImageFolder Instruction Model QuestionAnswering Rows "
    "Sites TextClassification TokenClassification",
    "transport": "Link Quota RandomK Stage TopK Uniform",
    "tuning": "BitFit Bottleneck Full HeadOnly LoRA Peft SparseMask",
}
_HOME = {name: home for home, names in _NAMES.items() for name in names.split()}

__version__ = "0.2.0"

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
    "Rows",
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

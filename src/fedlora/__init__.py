"""Communication-efficient federated fine-tuning of Hugging Face models with low-rank adapters.

Names are imported lazily on first use, so ``import fedlora`` is cheap. The stable names are those in ``__all__`` and in
docs/api-stability.md; every other module is private.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.config import Evaluate, Experiment, load, parse
    from fedlora.config.federated_data import prepare
    from fedlora.config.stop import Stop
    from fedlora.config.track import Track
    from fedlora.core.errors import (
        CallbackError,
        CheckpointError,
        ConfigError,
        DataError,
        FedloraError,
        ProcessError,
        QuorumError,
        TrainingError,
        WireError,
    )
    from fedlora.core.rates import LrScale, Schedule
    from fedlora.engines import Engine, Processes
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
    from fedlora.population.partitions import Dirichlet, Iid, Natural, Partition, Pooled, Quantity, Shards
    from fedlora.population.skew import Clusters, Column, Label, Skew
    from fedlora.population.tiers import Tier
    from fedlora.privacy import CentralGaussian, NoPrivacy, Privacy
    from fedlora.recipe import Phase, Recipe
    from fedlora.recipe.local import ClientOptimizer, Local
    from fedlora.recipe.rank_pruning import RankPruning
    from fedlora.runs.callbacks import Callback
    from fedlora.runs.experiment import Stopped, run
    from fedlora.runs.from_trainer import from_trainer
    from fedlora.runs.inference import TrainedRun, load_run
    from fedlora.runs.push import push
    from fedlora.runs.result import Result
    from fedlora.runs.tables import load_results
    from fedlora.runs.trackers import TensorBoard
    from fedlora.server.aggregate import (
        Aggregator,
        CoordinateMedian,
        Krum,
        Mean,
        NormBound,
        ProductExact,
        SparsityWeighted,
        Stack,
        SvdRedistribute,
        TrimmedMean,
    )
    from fedlora.server.optimizers import ServerOptimizer
    from fedlora.server.pruning import Prune
    from fedlora.study import tune
    from fedlora.tasks import (
        CausalLM,
        Collated,
        DocstringQuestions,
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
        Source,
        Task,
        TextClassification,
        TokenClassification,
    )
    from fedlora.transport import (
        BFloat16,
        Dense,
        Float16,
        Float32,
        Link,
        Precision,
        Quota,
        RandomK,
        RankSlice,
        Sparsifier,
        Stage,
        Threshold,
        TopK,
        Uniform,
    )
    from fedlora.tuning import (
        BitFit,
        Bottleneck,
        Full,
        HeadOnly,
        Kaiming,
        LoRA,
        LoRAInit,
        Orthogonal,
        Peft,
        SparseMask,
        SvdOfDelta,
        SvdOfWeight,
        Tuning,
    )

_NAMES = {
    "config": "Evaluate Experiment load parse",
    "config.federated_data": "prepare",
    "config.stop": "Stop",
    "config.track": "Track",
    "core.errors": "CallbackError CheckpointError ConfigError DataError FedloraError ProcessError QuorumError "
    "TrainingError WireError",
    "core.rates": "LrScale Schedule",
    "engines": "Engine Processes",
    "methods": "adapter_lth dense_lora fed_select fedavg federa fedex ffa flasc flexlora flora full "
    "het_lora primed_lora rolora slora sparse_adapter",
    "population.clients": "Clients",
    "population.partitions": "Dirichlet Iid Natural Partition Pooled Quantity Shards",
    "population.skew": "Clusters Column Label Skew",
    "population.tiers": "Tier",
    "privacy": "CentralGaussian NoPrivacy Privacy",
    "recipe": "Phase Recipe",
    "recipe.local": "ClientOptimizer Local",
    "recipe.rank_pruning": "RankPruning",
    "runs.callbacks": "Callback",
    "runs.experiment": "Stopped run",
    "runs.from_trainer": "from_trainer",
    "runs.inference": "TrainedRun load_run",
    "runs.push": "push",
    "runs.result": "Result",
    "runs.tables": "load_results",
    "runs.trackers": "TensorBoard",
    "server.aggregate": "Aggregator CoordinateMedian Krum Mean NormBound ProductExact SparsityWeighted Stack "
    "SvdRedistribute TrimmedMean",
    "server.optimizers": "ServerOptimizer",
    "server.pruning": "Prune",
    "study": "tune",
    "tasks": "CausalLM Collated DocstringQuestions Docstrings Files Hub ImageClassification ImageFolder Instruction "
    "Model QuestionAnswering Rows Sites Source Task TextClassification TokenClassification",
    "transport": "BFloat16 Dense Float16 Float32 Link Precision Quota RandomK RankSlice Sparsifier Stage "
    "Threshold TopK Uniform",
    "tuning": "BitFit Bottleneck Full HeadOnly Kaiming LoRA LoRAInit Orthogonal Peft SparseMask "
    "SvdOfDelta SvdOfWeight Tuning",
}
_HOME = {name: home for home, names in _NAMES.items() for name in names.split()}

__version__ = "0.2.0"

__all__ = [
    "Aggregator",
    "BFloat16",
    "BitFit",
    "Bottleneck",
    "Callback",
    "CallbackError",
    "CausalLM",
    "CentralGaussian",
    "CheckpointError",
    "ClientOptimizer",
    "Clients",
    "Clusters",
    "Collated",
    "Column",
    "ConfigError",
    "CoordinateMedian",
    "DataError",
    "Dense",
    "Dirichlet",
    "DocstringQuestions",
    "Docstrings",
    "Engine",
    "Evaluate",
    "Experiment",
    "FedloraError",
    "Files",
    "Float16",
    "Float32",
    "Full",
    "HeadOnly",
    "Hub",
    "Iid",
    "ImageClassification",
    "ImageFolder",
    "Instruction",
    "Kaiming",
    "Krum",
    "Label",
    "Link",
    "LoRA",
    "LoRAInit",
    "Local",
    "LrScale",
    "Mean",
    "Model",
    "Natural",
    "NoPrivacy",
    "NormBound",
    "Orthogonal",
    "Partition",
    "Peft",
    "Phase",
    "Pooled",
    "Precision",
    "Privacy",
    "ProcessError",
    "Processes",
    "ProductExact",
    "Prune",
    "Quantity",
    "QuestionAnswering",
    "QuorumError",
    "Quota",
    "RandomK",
    "RankPruning",
    "RankSlice",
    "Recipe",
    "Result",
    "Rows",
    "Schedule",
    "ServerOptimizer",
    "Shards",
    "Sites",
    "Skew",
    "Source",
    "SparseMask",
    "Sparsifier",
    "SparsityWeighted",
    "Stack",
    "Stage",
    "Stop",
    "Stopped",
    "SvdOfDelta",
    "SvdOfWeight",
    "SvdRedistribute",
    "Task",
    "TensorBoard",
    "TextClassification",
    "Threshold",
    "Tier",
    "TokenClassification",
    "TopK",
    "Track",
    "TrainedRun",
    "TrainingError",
    "TrimmedMean",
    "Tuning",
    "Uniform",
    "WireError",
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
    "from_trainer",
    "full",
    "het_lora",
    "load",
    "load_results",
    "load_run",
    "parse",
    "prepare",
    "primed_lora",
    "push",
    "rolora",
    "run",
    "slora",
    "sparse_adapter",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

"""Lazy imports of libraries that take seconds to load; each is imported on first use.

Reading, checking and printing a configuration needs none of them. A type checker sees plain imports.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = [
    "Later",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "pandas",
    "peft",
    "pyarrow",
    "scipy",
    "seqeval",
    "sklearn",
    "transformers",
    "wandb",
    "yaml",
]


class Later(ModuleType):
    """A module that is imported on first access to one of its attributes, as are its submodules.

    Args:
        name: the module's name.
    """

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        try:
            return getattr(module, name)
        except AttributeError:
            if importlib.util.find_spec(f"{self.__name__}.{name}") is None:
                raise
            return importlib.import_module(f"{self.__name__}.{name}")


if TYPE_CHECKING:
    import accelerate.tracking
    import datasets
    import huggingface_hub
    import pandas
    import peft.tuners.tuners_utils
    import pyarrow.ipc  # type: ignore[import-untyped]
    import scipy.stats
    import seqeval.metrics.sequence_labeling
    import sklearn.cluster
    import sklearn.decomposition
    import sklearn.exceptions
    import sklearn.feature_extraction.text
    import sklearn.metrics
    import sklearn.preprocessing
    import transformers
    import transformers.integrations.sdpa_attention
    import transformers.masking_utils
    import transformers.modeling_layers
    import transformers.modeling_outputs
    import transformers.pytorch_utils
    import transformers.trainer_pt_utils
    import wandb
    import yaml  # type: ignore[import-untyped]
else:
    accelerate = Later("accelerate")
    datasets = Later("datasets")
    huggingface_hub = Later("huggingface_hub")
    pandas = Later("pandas")
    peft = Later("peft")
    pyarrow = Later("pyarrow")
    scipy = Later("scipy")
    seqeval = Later("seqeval")
    sklearn = Later("sklearn")
    transformers = Later("transformers")
    wandb = Later("wandb")
    yaml = Later("yaml")

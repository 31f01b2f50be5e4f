"""Tiny models and data, and checks for user-defined components; fedlora's own tests use them too.

Nothing in this package is imported by the rest of fedlora; everything in ``__all__`` is stable.
"""

from fedlora.testing.checks import (
    check_aggregator,
    check_client_optimizer,
    check_lora_init,
    check_partition,
    check_precision,
    check_privacy,
    check_server_optimizer,
    check_skew,
    check_sparsifier,
    check_tuning,
)
from fedlora.testing.data_checks import check_source, check_task
from fedlora.testing.models import (
    FAMILIES,
    IMAGE_FAMILIES,
    Head,
    TensorTask,
    default_head,
    equal_population,
    schema_of,
    tiny_config,
    tiny_model,
    toy_task,
)
from fedlora.testing.run_checks import check_engine, check_tracker

__all__ = [
    "FAMILIES",
    "IMAGE_FAMILIES",
    "Head",
    "TensorTask",
    "check_aggregator",
    "check_client_optimizer",
    "check_engine",
    "check_lora_init",
    "check_partition",
    "check_precision",
    "check_privacy",
    "check_server_optimizer",
    "check_skew",
    "check_source",
    "check_sparsifier",
    "check_task",
    "check_tracker",
    "check_tuning",
    "default_head",
    "equal_population",
    "schema_of",
    "tiny_config",
    "tiny_model",
    "toy_task",
]

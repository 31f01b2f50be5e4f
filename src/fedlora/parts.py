"""For authors of custom components: the abstract class of each slot, and the types in its methods' signatures.

The built-in values of the slots are in ``fedlora``, checks for custom components in ``fedlora.testing``.
"""

from fedlora.client.jobs import Job, Reply
from fedlora.core.errors import ConfigError, DataError, TrainingError, WireError
from fedlora.core.schema import Leaf, Schema
from fedlora.core.state import Change, Fold, Update
from fedlora.core.store import Store
from fedlora.core.tree import Tree
from fedlora.engines import Engine
from fedlora.population.partitions import Assignment, Partition
from fedlora.population.skew import Classes, Skew
from fedlora.privacy import Privacy
from fedlora.recipe.local import ClientOptimizer
from fedlora.runs.callbacks import Callback
from fedlora.server.aggregate import Accumulator, Aggregator, Needs
from fedlora.server.optimizers import ServerOptimizer
from fedlora.tasks import Evaluation, Model, Prepared, Source, Task
from fedlora.tasks.data.columns import Raw
from fedlora.transport import Precision, Sparsifier
from fedlora.transport.precision import Written
from fedlora.transport.sparsify import Facts
from fedlora.tuning import Installed, LoRAInit, Tuning

__all__ = [
    "Accumulator",
    "Aggregator",
    "Assignment",
    "Callback",
    "Change",
    "Classes",
    "ClientOptimizer",
    "ConfigError",
    "DataError",
    "Engine",
    "Evaluation",
    "Facts",
    "Fold",
    "Installed",
    "Job",
    "Leaf",
    "LoRAInit",
    "Model",
    "Needs",
    "Partition",
    "Precision",
    "Prepared",
    "Privacy",
    "Raw",
    "Reply",
    "Schema",
    "ServerOptimizer",
    "Skew",
    "Source",
    "Sparsifier",
    "Store",
    "Task",
    "TrainingError",
    "Tree",
    "Tuning",
    "Update",
    "WireError",
    "Written",
]

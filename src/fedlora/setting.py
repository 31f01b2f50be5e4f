"""What all runs of an experiment share: the encoded data, who holds them, and what a mode implies."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from fedlora import config
from fedlora.clients import (
    Clients,
    Division,
    Partitioner,
    Pooled,
    Population,
    build_population,
    from_partitioner,
    summarise,
)
from fedlora.config import Experiment
from fedlora.errors import ConfigError, DataError
from fedlora.recipe import Phase, Recipe
from fedlora.server_optim import Sgd
from fedlora.state import named_seed
from fedlora.tasks import Prepared
from fedlora.tasks.base import Rows, Split
from fedlora.transport import Link

VERSIONED = ("fedlora", "torch", "transformers", "peft", "datasets", "numpy", "safetensors", "constriction", "pydantic")


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share: the encoded data, and who holds them.

    Args:
        task: model and data.
        population: the clients.
        test_rows: the examples that evaluations use.
        split: the split they lie in.
        device: where the model lives.
    """

    task: Prepared
    population: Population
    test_rows: Rows
    split: Split
    device: torch.device


def prepare(experiment: Experiment, partitioner: Partitioner | None = None) -> Setting:
    """Loads and encodes the data and deals them to clients.

    Args:
        experiment: the configuration.
        partitioner: deals instead of ``experiment.clients.partition``, if given (Flower Datasets' protocol).

    Raises:
        DataError: the data cannot be read, or not be dealt as asked.
    """
    task = experiment.task.prepare(experiment.model, experiment.data)
    clients = experiment.clients
    seed = named_seed(experiment.seed, "partition")
    name = clients.column()
    if partitioner is not None:
        division = Division(from_partitioner(partitioner, task.table()), None)
    else:
        division = build_population(clients, task.labels, task.column(name, "train") if name else None, seed)
    test_rows = np.arange(task.num_examples("test"))
    split: Split = "test"
    if division.test_rows is not None:
        test_rows, split = division.test_rows, "train"
    elif name is not None and name in task.columns("test"):
        shared = set(task.column(name, "test").tolist()) & set(task.column(name, "train").tolist())
        if shared:
            raise DataError(
                f"{len(shared)} values of {name!r} are in both the training and the test data, so test users would be "
                "trained on; set clients.test_clients = 0.2 to hold out whole clients instead"
            )
    return Setting(task, division.population, test_rows, split, pick_device(experiment.device))


def pick_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda' but this PyTorch sees no GPU; use 'cpu' or 'auto'")
    return torch.device(name)


def in_mode(experiment: Experiment) -> Experiment:
    """The experiment with what its mode implies put in: alone, a client sends nothing and keeps its optimiser."""
    if experiment.mode == "federated":
        return experiment

    def alone(recipe: Recipe) -> Recipe:
        local = dataclasses.replace(recipe.local, keep_optimizer=True)
        return dataclasses.replace(recipe, down=Link(), up=Link(), server=Sgd(), local=local, memory="init")

    phases = tuple(Phase(recipe=alone(phase.recipe), rounds=phase.rounds) for phase in experiment.phases)
    pooled = Clients(partition=Pooled(), num=1, per_round=1)
    clients = pooled if experiment.mode == "centralised" else experiment.clients
    return dataclasses.replace(experiment, phases=phases, clients=clients)


def manifest(experiment: Experiment, setting: Setting) -> dict[str, Any]:
    """What a reader needs to know about how a run was made."""
    labels = setting.task.labels
    summary = summarise(setting.population, labels, max(1, len(setting.task.label_names)))
    return {
        "versions": {name: metadata.version(name) for name in VERSIONED},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(setting.device),
        "threads": torch.get_num_threads(),
        "seed": experiment.seed,
        "config_digest": config.digest(experiment),
        "data_fingerprint": setting.task.fingerprint,
        "label_names": setting.task.label_names,
        "num_test": len(setting.test_rows),
        "partition": summary.as_dict(),
    }

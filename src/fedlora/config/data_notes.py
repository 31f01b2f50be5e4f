"""Sentences about an experiment's data, for the first row of its ledger."""

from __future__ import annotations

from fedlora.config.experiment import Experiment
from fedlora.config.places import located_data
from fedlora.population.clients import Clients
from fedlora.population.partitions import Rows
from fedlora.population.skew import Column
from fedlora.tasks import Prepared
from fedlora.tasks.base import Split
from fedlora.tasks.data.notes import contradictory, shared, unread


def data_notes(experiment: Experiment, task: Prepared, train: Rows, test: Rows, split: Split) -> tuple[str, ...]:
    """What a user should look at in the data before the run.

    Args:
        experiment: the configuration.
        task: the data.
        train: the rows of the split ``train`` that are trained on.
        test: the rows for evaluation.
        split: the split that has those.
    """
    known = {*task.reads, *_columns_of(experiment.clients), *experiment.data.adds}
    learnt = _contents(task, train, "train")
    return (
        *located_data(experiment.data, experiment.root).notes,
        *task.notes,
        *unread(task.columns("train"), known),
        *shared(_contents(task, test, split), learnt),
        *(contradictory(learnt, task.labels[train].tolist()) if learnt else ()),
    )


def _contents(task: Prepared, rows: Rows, split: Split) -> list[str]:
    found = task.contents(split)
    return [found[row] for row in rows.tolist()] if found else []


def _columns_of(clients: Clients) -> set[str]:
    skew = clients.skew.name if isinstance(clients.skew, Column) else None
    return {name for name in (clients.column(), clients.tier_column, skew) if name}

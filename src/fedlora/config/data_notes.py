"""Sentences about an experiment's data, for the first row of its ledger."""

from __future__ import annotations

from fedlora.config.experiment import Experiment
from fedlora.config.places import located_data
from fedlora.population.clients import Clients
from fedlora.population.partitions import Rows
from fedlora.population.skew import Column
from fedlora.recipe.modes import MODES
from fedlora.tasks import Prepared
from fedlora.tasks.base import Split
from fedlora.tasks.data.columns import class_names, values_of
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
        *(_unseen(task, train, test) if split == "train" else ()),  # else the task has looked for such classes
        *_unused(experiment),
    )


def _unused(experiment: Experiment) -> list[str]:
    """A sentence about rows that clients hold out for an evaluation that is never made."""
    kept = experiment.clients.holdout
    if not kept or experiment.evaluate.clients != "never" or MODES[experiment.mode].pools:
        return []
    return [
        f"clients.holdout = {kept:g} keeps rows out of training, and nothing is evaluated on them: set "
        "evaluate.clients to end or always, or clients.holdout to 0"
    ]


def _unseen(task: Prepared, train: Rows, test: Rows) -> list[str]:
    """A sentence about rows of clients held out for testing, of which no other client has a class."""
    rows = task.data["train"]
    if "label" not in rows.column_names or class_names(rows, "label") != task.label_names:
        return []
    labels = values_of(rows, "label")
    classes = [{*label} if isinstance(label, list) else {label} for label in labels]
    known = set().union(*(classes[row] for row in train))
    unseen = [found for row in test if (found := classes[row] - known)]
    if not unseen:
        return []
    names = [repr(task.label_names[number]) for number in sorted(set().union(*unseen))]
    return [
        f"{len(unseen)} of {len(test)} test rows have a class that no client trains on ({', '.join(names[:5])}), which "
        "cannot be learnt: hold other clients out with another seed, or fewer"
    ]


def _contents(task: Prepared, rows: Rows, split: Split) -> list[str]:
    found = task.contents(split)
    return [found[row] for row in rows.tolist()] if found else []


def _columns_of(clients: Clients) -> set[str]:
    skew = clients.skew.name if isinstance(clients.skew, Column) else None
    return {name for name in (clients.column(), clients.tier_column, skew) if name}

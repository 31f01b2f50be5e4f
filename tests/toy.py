"""A federation of three clients in memory, small enough to train in a moment."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from fedlora.aggregate import Aggregator
from fedlora.clients import Clients
from fedlora.config import Evaluate, Experiment
from fedlora.downlink import view
from fedlora.engines import Serial
from fedlora.ledger import Row
from fedlora.local import AdamW, Local
from fedlora.methods import Phases
from fedlora.phases import close_phase, open_phase
from fedlora.round import run_round
from fedlora.setting import Setting
from fedlora.skew import Classes
from fedlora.state import Change, ServerState, Update
from fedlora.store import EMPTY
from fedlora.testing import equal_population, schema_of, toy_task
from fedlora.tree import Tree
from fedlora.workspace import Workspace

CPU = torch.device("cpu")
LOCAL = Local(optimizer=AdamW(lr=0.02), batch_size=8, epochs=2, dropout=False)


class Federation:
    """A run of phases over three clients, of 16 examples each by default, from a state or from the beginning."""

    def __init__(self, phases: Phases, num_examples: int = 48) -> None:
        self.phases, self.num_examples = phases, num_examples
        self.workspace = Workspace(toy_task(num_examples=num_examples), 0, CPU)
        self.engine = Serial(self.workspace, equal_population(num_examples, 3))
        self.rows: list[Row] = []

    def start(self) -> ServerState:
        return open_phase(self.workspace, 0, self.phases[0].recipe, 0, 0, None)[0]

    def go_on(self, state: ServerState, rounds: int, cohort: tuple[int, ...] = (2, 0, 1)) -> ServerState:
        self.workspace.settle(state.phase, self.phases[state.phase].recipe, state.setup)
        while state.round < rounds:
            recipe = self.phases[state.phase].recipe
            if state.steps == self.phases[state.phase].rounds:
                carry = close_phase(self.workspace, recipe, state)
                recipe = self.phases[state.phase + 1].recipe
                state, _ = open_phase(self.workspace, state.phase + 1, recipe, 0, state.round, carry)
            state, row = run_round(recipe, state, cohort, self.engine, seed=0, rounds=6)
            self.rows.append(row)
        return state

    def loss(self, state: ServerState) -> float:
        recipe = self.phases[state.phase].recipe
        self.workspace.show(recipe, view(recipe, state, 0), state.folds)
        return self.workspace.evaluate(np.arange(self.num_examples), "train", recipe.local.compute).metrics["loss"]


def num_nonzero(tree: Tree) -> int:
    """How many of a tree's numbers are not zero."""
    return sum(int(torch.count_nonzero(value)) for value in tree.values())


def combined(rule: Aggregator, updates: Iterable[Update], params: Tree) -> Change:
    """The change that a rule makes of updates, given one by one."""
    accumulator = rule.begin(params, schema_of(dict.fromkeys(params, "adapter")), EMPTY)
    for update in updates:
        accumulator.add(update)
    return accumulator.finish()


def toy_run(phases: Phases, clients: int = 6) -> tuple[Experiment, Setting]:
    """An experiment over clients of eight examples, three in a round, and its data."""
    experiment = Experiment(clients=Clients(num=clients, per_round=3), phases=phases, evaluate=Evaluate(every=2))
    task, rows = toy_task(num_examples=8 * clients), np.arange(8 * clients)
    classes = Classes(task.labels, tuple(task.label_names))
    return experiment, Setting(task, equal_population(8 * clients, clients), rows, "train", CPU, classes)

"""Attacks by clients, for tests of aggregators: an engine whose attackers train or send something else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedlora.client.jobs import Job, Reply
from fedlora.client.training import train
from fedlora.client.turn import close_turn, open_turn
from fedlora.client.workspace import Workspace
from fedlora.core import tree
from fedlora.core.state import generator, named_seed
from fedlora.core.tree import Tree
from fedlora.engines.base import Engine
from fedlora.population.clients import Population
from fedlora.tasks.base import Batch

AttackName = Literal["scaled", "sign_flipped", "random", "label_flipped", "constant"]
Attack = Callable[[Tree, int], Tree]
"""A client's change from the honest one, and a seed."""


def scaled(delta: Tree, seed: int) -> Tree:
    """Ten times the honest change."""
    return tree.scale(delta, 10.0)


def sign_flipped(delta: Tree, seed: int) -> Tree:
    """Three times the honest change, in the other direction."""
    return tree.scale(delta, -3.0)


def random(delta: Tree, seed: int) -> Tree:
    """Normal numbers, ten times as long as the honest change."""
    draws = generator(named_seed(seed, "attack"))
    noise = {name: torch.randn(value.shape, generator=draws) for name, value in delta.items()}
    return tree.scale(noise, 10.0 * tree.norm(delta) / tree.norm(noise))


def constant(delta: Tree, seed: int) -> Tree:
    """One number in every entry, ten times as long as the honest change; equal for attackers that collude."""
    size = 10.0 * tree.norm(delta) / max(1, tree.num_entries(delta)) ** 0.5
    return {name: torch.full_like(value, size) for name, value in delta.items()}


def label_flipped(delta: Tree, seed: int) -> Tree:
    """The honest change on labels of which class ``c`` of ``C`` has become ``C - 1 - c``."""
    return delta


ATTACKS: Mapping[AttackName, Attack] = {
    "scaled": scaled,
    "sign_flipped": sign_flipped,
    "random": random,
    "label_flipped": label_flipped,
    "constant": constant,
}


class Attacked(Engine):
    """Runs every job in this process; attackers answer with something else, in the form of an honest answer.

    Args:
        workspace: the resident model.
        population: the examples of each client.
        attack: the attack; ``label_flipped`` needs a task that classifies whole examples.
        attackers: the clients that attack.
    """

    def __init__(
        self, workspace: Workspace, population: Population, attack: AttackName, attackers: Collection[int]
    ) -> None:
        self.workspace, self.population = workspace, population
        self._attack, self._attackers = attack, frozenset(attackers)

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        for job in jobs:
            attacks = job.client in self._attackers
            ready = open_turn(job, self.workspace, self.population.rows_of(job.client))
            honest = self.workspace.task
            if attacks and self._attack == "label_flipped":
                self.workspace.task = _Flipped(honest)  # type: ignore[assignment]
            try:
                (trained,) = train(self.workspace, [ready])
            finally:
                self.workspace.task = honest
            if attacks and trained.delta is not None:
                trained = trained._replace(delta=ATTACKS[self._attack](trained.delta, job.seed))
            yield close_turn(ready, trained)


def attacked(attack: AttackName, attackers: Collection[int]) -> Callable[[Workspace, Population], Attacked]:
    """The engine of a run under attack, for ``fedlora.run(..., engine=attacked("scaled", [0, 1]))``.

    Args:
        attack: the attack.
        attackers: the clients that attack.
    """
    return lambda workspace, population: Attacked(workspace, population, attack, attackers)


class _Flipped:
    """A task's loss on wrong labels."""

    def __init__(self, task: object) -> None:
        self._task = task

    def __getattr__(self, name: str) -> object:
        return getattr(self._task, name)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss on wrong labels."""
        labels = batch["labels"]
        wrong = torch.where(labels < 0, labels, len(self._task.label_names) - 1 - labels)  # type: ignore[attr-defined]
        found: Tensor = self._task.loss(model, {**batch, "labels": wrong})  # type: ignore[attr-defined]
        return found

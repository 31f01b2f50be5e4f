"""Classes of one's own that return something else than their slot asks for: refused where it would pass in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fixtures import strangers
from fixtures.toy import Federation

from fedlora.core.errors import ConfigError, DataError
from fedlora.core.state import Change, Fold
from fedlora.core.tree import Tree
from fedlora.methods import fedavg
from fedlora.population.clients import Clients, build_population
from fedlora.population.partitions import Assignment, Partition
from fedlora.server.aggregate import Accumulator, Aggregator
from fedlora.server.optimizers import ServerOptimizer
from fedlora.transport.sparsify import Facts, Sparsifier
from fedlora.tuning import LoRA

WRONG: dict[str, tuple[Callable[[Tree], Tree], str]] = {
    "one is missing": (lambda one: dict(list(one.items())[1:]), r"lora_A' a tensor of the form none, but \(2, "),
    "one too many": (lambda one: {**one, "more": torch.ones(2)}, r"'more' a tensor of the form \(2,\) in .* none was"),
    "another shape": (lambda one: {name: value.mean() for name, value in one.items()}, r"the form \(\) in"),
    "another type": (lambda one: {name: value.double() for name, value in one.items()}, r"in torch.float64, but"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(Aggregator):
    needs: ClassVar[Any] = "sum"
    wrong: str

    def begin(self, params: Tree, schema: Any, store: Any) -> Accumulator:
        return Latest(self.wrong)


class Latest(Accumulator):
    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def add(self, update: Any) -> None:
        self.delta = update.delta

    def finish(self) -> Change:
        return Change(WRONG[self.wrong][0](self.delta), Fold())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(ServerOptimizer):
    wrong: str

    def step(self, params: Tree, delta: Tree, slots: Any, steps: int, rates: Any = None) -> tuple[Tree, Any]:
        moved = {name: value + delta[name] for name, value in params.items()}
        return WRONG[self.wrong][0](moved), slots


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("slot", ["aggregator", "server"])
def test_trees_of_another_form_are_refused(slot: str, wrong: str) -> None:
    part: Any = {"aggregator": Rule, "server": Steps}[slot](wrong=wrong)
    federation = Federation(fedavg(rounds=1, tuning=LoRA(rank=2), **{slot: part}))
    with pytest.raises(ConfigError, match=f"of the {slot} 'test_wrong_parts:.*{WRONG[wrong][1]}"):
        federation.go_on(federation.start(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(Rule):
    def begin(self, params: Tree, schema: Any, store: Any) -> Accumulator:
        return BareDelta(self.wrong)


class BareDelta(Latest):
    def finish(self) -> Any:
        change = Change(self.delta, Fold())
        return {"a tree": self.delta, "nothing": None, "no fold": change._replace(fold=None)}[self.wrong]


@pytest.mark.parametrize("returns", ["a tree", "nothing", "no fold"])
def test_an_aggregator_that_returns_no_change_is_refused(returns: str) -> None:
    federation = Federation(fedavg(rounds=1, tuning=LoRA(rank=2), aggregator=Bare(wrong=returns)))
    with pytest.raises(
        ConfigError, match=r"the aggregator 'test_wrong_parts:Bare' returned .*, but Change\(delta, Fold"
    ):
        federation.go_on(federation.start(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deal(Partition):
    wrong: str = ""

    def split(self, labels: Any, column: Any, num_clients: int, rng: np.random.Generator) -> Assignment:
        groups, names = strangers.InTurn().split(labels, column, num_clients, rng)
        if self.wrong in DEALS:
            groups[0] = DEALS[self.wrong][0](groups[0])
        return Assignment(groups, names[1:] if self.wrong == "names" else names)


DEALS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "twice": (lambda rows: rows + 1, "has 12 rows of which 9 differ, but a row belongs to one client"),
    "negative": (lambda rows: rows - 1, "has rows -1 to 11, but there are rows 0 to 11 only"),
    "beyond": (lambda rows: rows + 12, "has rows 1 to 20, but there are rows 0 to 11 only"),
    "a mask": (lambda rows: np.isin(np.arange(12), rows), "rows of type bool"),
}


@pytest.mark.parametrize(
    ("wrong", "message"), [("names", "4 clients with 3 names"), *((name, text) for name, (_, text) in DEALS.items())]
)
def test_assignments_that_are_none_are_refused(wrong: str, message: str) -> None:
    clients = Clients(num=4, per_round=2, partition=Deal(wrong=wrong))
    with pytest.raises(DataError, match=f"the assignment of the partition 'test_wrong_parts:Deal' .*{message}"):
        build_population(clients, np.arange(12) % 2, None, 0)
    assert len(build_population(dataclasses.replace(clients, partition=Deal()), np.arange(12), None, 0).population) == 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class BareGroups(Partition):
    def split(self, labels: Any, column: Any, num_clients: int, rng: np.random.Generator) -> Any:
        return np.array_split(np.arange(len(labels)), num_clients)


def test_a_partition_that_returns_no_assignment_is_refused() -> None:
    clients = Clients(num=4, per_round=2, partition=BareGroups())
    with pytest.raises(
        DataError, match=r"'test_wrong_parts:BareGroups' returned \[array.*but Assignment\(groups, names"
    ):
        build_population(clients, np.arange(12) % 2, None, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Sparsifier):
    wrong: str = ""

    @property
    def facts(self) -> Facts:
        return Facts(unbiased=False, reads_values=True)

    def choose(self, tree: Tree, schema: Any, round: int, seed: int) -> Any:
        masks = {name: value > 0 for name, value in tree.items()}
        return MASKS[self.wrong][0](masks) if self.wrong else masks


MASKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nothing": (lambda masks: None, "returned None, but bool"),
    "one too many": (lambda masks: {**masks, "more": torch.ones(1) > 0}, r"returned for 'more' tensor\(\[True"),
    "floats": (lambda masks: {name: mask.float() for name, mask in masks.items()}, r"for 'a' tensor\(\[\[1\., 1"),
    "arrays": (lambda masks: {name: mask.numpy() for name, mask in masks.items()}, r"for 'a' array\("),
    "a vector": (
        lambda masks: {name: mask.flatten() for name, mask in masks.items()},
        r"of shape \(6,\), not \(2, 3\)",
    ),
    "of the rows": (lambda masks: {name: mask[:, :1] for name, mask in masks.items()}, r"shape \(2, 1\), not \(2, 3\)"),
}


@pytest.mark.parametrize("wrong", MASKS)
def test_masks_of_another_form_are_refused(wrong: str) -> None:
    tree = {"a": torch.ones(2, 3), "b": -torch.ones(2, 2)}
    with pytest.raises(ConfigError, match=f"of the sparsifier 'test_wrong_parts:Rows' .*{MASKS[wrong][1]}"):
        Rows(wrong=wrong)(tree, {}, 0)
    assert Rows()(tree, {}, 0)["b"].count_nonzero() == 0

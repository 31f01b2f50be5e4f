"""What all parts share: settings, the clock, repeated measurement side by side, the embedded model and its data."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedlora.client.workspace import Workspace
from fedlora.core.state import ServerState
from fedlora.engines import Serial
from fedlora.population.clients import Population
from fedlora.recipe import Recipe
from fedlora.rounds.phases import open_phase
from fedlora.tasks import Model
from fedlora.tasks.data.sources import Docstrings
from fedlora.tasks.text import PreparedText, TextClassification

CPU = torch.device("cpu")
SEED = 0


@dataclass(frozen=True)
class Settings:
    """How a run of the benchmarks measures.

    Args:
        quick: fewer repetitions and smaller workloads.
        threads: of matrix products. With one, times are the processor's and other work on the machine hardly counts;
            with more, times are the wall clock's.
    """

    quick: bool = False
    threads: int = 1

    def seconds(self) -> float:
        """The clock that goes with ``threads``."""
        return time.process_time() if self.threads == 1 else time.perf_counter()


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Args:
        name: what was measured.
        value: the median.
        unit: its unit; ``x`` for a ratio.
        low: lower quartile over repetitions.
        high: upper quartile.
        goal: what it should be, such as ``>= 0.95``; empty if nothing is asked.
        met: whether it is so; None without a goal.
        note: how to read it.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""


def figure(name: str, values: list[float], unit: str, goal: str = "", note: str = "") -> Figure:
    """The median and quartiles of ``values``; ``goal`` is ``<= number`` or ``>= number``."""
    low, value, high = (float(each) for each in np.quantile(values, [0.25, 0.5, 0.75]))
    met = None
    if goal:
        sign, bound = goal.split()
        met = value <= float(bound) if sign == "<=" else value >= float(bound)
    return Figure(name, value, unit, low, high, goal, met, note)


def ratios(left: list[float], right: list[float]) -> list[float]:
    """``left / right``, repetition by repetition."""
    return [a / b for a, b in zip(left, right, strict=True)]


def side_by_side(
    settings: Settings, functions: Mapping[str, Callable[[], object]], repeats: int, warm: int = 1
) -> dict[str, list[float]]:
    """Times every function once per repetition, in turns and in alternating order, so that drift hits all alike.

    Args:
        settings: whose clock to use.
        functions: what to time, by name.
        repeats: repetitions.
        warm: runs before, which do not count.

    Returns:
        Seconds of each repetition, by name.
    """
    for _ in range(warm):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name in list(functions)[:: 1 if repeat % 2 == 0 else -1]:
            start = settings.seconds()
            functions[name]()
            times[name].append(settings.seconds() - start)
    return times


@functools.cache
def docstrings(pad_to: int | None = None) -> PreparedText:
    """The built-in data, encoded for the embedded model; padded to the longest text of a batch, or to ``pad_to``."""
    task = TextClassification(pad_to=pad_to or "longest", pooling="model").prepare(Model(), Docstrings())
    assert isinstance(task, PreparedText)
    return task


def opened(
    task: PreparedText, recipe: Recipe, population: Population, seed: int = SEED
) -> tuple[Workspace, ServerState, Serial]:
    """A model with ``recipe``'s tuning in it, the state before the first round, and the serial engine."""
    workspace = Workspace(task, seed, CPU)
    state, _ = open_phase(workspace, 0, recipe, seed, 0, None)
    return workspace, state, Serial(workspace, population)


def spread_rows(num_rows: int, num_clients: int, size: int) -> Population:
    """Clients of ``size`` rows each, drawn at random; a row may belong to several, so there can be any number."""
    rows = np.random.default_rng(SEED).integers(0, num_rows, num_clients * size)
    return Population(tuple(map(str, range(num_clients))), rows, np.arange(num_clients + 1, dtype=np.int64) * size)

"""A plot for the terminal: the classes held by each client."""

from __future__ import annotations

import numpy as np
from rich.text import Text

from fedlora.population.clients import Population
from fedlora.runs.partition import label_counts
from fedlora.tasks.base import Positions

_COLOURS = (
    "blue", "green", "yellow", "red", "magenta", "cyan", "white", "bright_blue", "bright_green", "bright_yellow",
    "bright_red", "bright_magenta", "bright_cyan", "bright_black", "dark_orange", "purple", "turquoise2", "gold3",
    "orchid", "chartreuse3",
)  # fmt: skip


def partition_bars(
    population: Population, labels: Positions, names: list[str], num_clients: int = 20, width: int = 55
) -> Text:
    """One bar per client for a terminal, with length proportional to its examples and coloured by class.

    Args:
        population: the clients.
        labels: class number of each training example.
        names: the classes' names; empty if there are no classes.
        num_clients: number of clients drawn, evenly spaced among all.
        width: length of the longest bar in characters.
    """
    chosen = np.unique(np.linspace(0, len(population) - 1, min(num_clients, len(population))).astype(int))
    counts = label_counts(population, labels, max(1, len(names)))[chosen]
    unit = max(1, counts.sum(1).max()) / width
    text = Text()
    for client, row in zip(chosen, counts, strict=True):
        text.append(f"{population.names[client][-18:]:>18} ")
        ends = np.round(np.cumsum(row) / unit).astype(int)
        for label, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            # a letter distinguishes the classes where there is no colour
            text.append(chr(ord("a") + label % 26) * (end - start), style=_COLOURS[label % len(_COLOURS)])
        text.append(f" {row.sum()}\n")
    for label, name in enumerate(names[:26]):
        text.append(f"{chr(ord('a') + label)} {name}  ", style=_COLOURS[label % len(_COLOURS)])
    return text

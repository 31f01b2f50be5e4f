"""Drawings: who holds which classes."""

from __future__ import annotations

import numpy as np
from rich.text import Text

from fedlora.clients import Population
from fedlora.errors import ConfigError
from fedlora.tasks.base import Rows

_COLOURS = (
    "blue", "green", "yellow", "red", "magenta", "cyan", "white", "bright_blue", "bright_green", "bright_yellow",
    "bright_red", "bright_magenta", "bright_cyan", "bright_black", "dark_orange", "purple", "turquoise2", "gold3",
    "orchid", "chartreuse3",
)  # fmt: skip


def label_counts(population: Population, labels: Rows, num_classes: int) -> Rows:
    """How many examples of each class each client holds, ``(clients, classes)`` integers."""
    return np.stack(
        [np.bincount(labels[population.rows_of(client)], minlength=num_classes) for client in range(len(population))]
    )


def partition_bars(
    population: Population, labels: Rows, names: list[str], num_clients: int = 20, width: int = 55
) -> Text:
    """One bar per client, as long as its examples and coloured by class, for a terminal.

    Args:
        population: the clients.
        labels: class number of each training example.
        names: the classes' names; none where there are no classes.
        num_clients: clients drawn, evenly spaced among all.
        width: characters of the longest bar.
    """
    chosen = np.unique(np.linspace(0, len(population) - 1, min(num_clients, len(population))).astype(int))
    counts = label_counts(population, labels, max(1, len(names)))[chosen]
    unit = max(1, counts.sum(1).max()) / width
    text = Text()
    for client, row in zip(chosen, counts, strict=True):
        text.append(f"{population.names[client][-18:]:>18} ")
        ends = np.round(np.cumsum(row) / unit).astype(int)
        for label, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            # a letter tells classes apart where there is no colour
            text.append(chr(ord("a") + label % 26) * (end - start), style=_COLOURS[label % len(_COLOURS)])
        text.append(f" {row.sum()}\n")
    for label, name in enumerate(names[:26]):
        text.append(f"{chr(ord('a') + label)} {name}  ", style=_COLOURS[label % len(_COLOURS)])
    return text


def partition_html(population: Population, labels: Rows, names: list[str]) -> str:
    """A page with one stacked bar per client.

    Args:
        population: the clients.
        labels: class number of each training example.
        names: the classes' names; none where there are no classes.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ConfigError("drawings need plotly: pip install 'fedlora[plot]'") from error
    names = names or ["examples"]
    counts = label_counts(population, labels, len(names))
    figure = go.Figure([go.Bar(name=name, x=list(population.names), y=counts[:, k]) for k, name in enumerate(names)])
    figure.update_layout(barmode="stack", title="Examples of each client, by class", yaxis_title="examples")
    return str(figure.to_html(include_plotlyjs=True))

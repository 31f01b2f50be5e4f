"""Plots: the classes held by each client, and the metrics reached by methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from fedlora.core.errors import ConfigError
from fedlora.population.clients import Population
from fedlora.runs.folder import RunFolder
from fedlora.tasks.base import Positions

_COLOURS = (
    "blue", "green", "yellow", "red", "magenta", "cyan", "white", "bright_blue", "bright_green", "bright_yellow",
    "bright_red", "bright_magenta", "bright_cyan", "bright_black", "dark_orange", "purple", "turquoise2", "gold3",
    "orchid", "chartreuse3",
)  # fmt: skip


def label_counts(population: Population, labels: Positions, num_classes: int) -> Positions:
    """Number of examples of each class held by each client, ``(clients, classes)`` integers."""
    return np.stack(
        [np.bincount(labels[population.rows_of(client)], minlength=num_classes) for client in range(len(population))]
    )


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


def partition_html(population: Population, labels: Positions, names: list[str]) -> str:
    """A page with one stacked bar per client.

    Args:
        population: the clients.
        labels: class number of each training example.
        names: the classes' names; empty if there are no classes.

    Raises:
        ConfigError: plotly is not installed.
    """
    go, colours = _plotly()
    names = names or ["examples"]
    counts = label_counts(population, labels, len(names))
    figure = go.Figure([go.Bar(name=name, x=list(population.names), y=counts[:, k]) for k, name in enumerate(names)])
    figure.update_layout(
        barmode="stack",
        title="Examples of each client, by class",
        colorway=colours,
        xaxis_title="client",
        yaxis_title="examples",
    )
    return str(figure.to_html(include_plotlyjs=True))


def comparison_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """A page with the main metric against rounds and against megabytes: one line per method, with a band over seeds.

    A line is the mean over seeds at the rounds evaluated for all of them; the band spans their full range.

    Args:
        rows: as returned by ``report.comparison``; the ledgers in their folders are read.

    Raises:
        ConfigError: plotly is not installed, or the runs do not have the same main metric.
    """
    go, colours = _plotly()
    metrics = {str(row["metric"]) for row in rows}
    if len(metrics) > 1:
        raise ConfigError(
            f"these runs have different main metrics, {', '.join(sorted(metrics))}; plot runs of one metric together"
        )
    metric = metrics.pop()
    figure = go.Figure()
    for number, row in enumerate(rows):
        curves = [_curve(Path(folder), metric) for folder in row["folders"]]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        seeds = ", ".join(map(str, row["seeds"]))
        colour = colours[number % len(colours)]
        # the first evaluation precedes any communication, and the axis of bytes is logarithmic
        for axis, turns in (("", shared), ("2", [turn for turn in shared if turn])):
            values = np.array([[curve[turn][1] for turn in turns] for curve in curves])
            sent = [float(np.mean([curve[turn][0] for curve in curves])) for turn in turns]
            places = sent if axis else [float(turn) for turn in turns]
            common = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "legendgroup": row["label"]}
            if len(curves) > 1:
                band = np.concatenate([values.max(0), values.min(0)[::-1]])
                figure.add_scatter(
                    x=places + places[::-1], y=band.tolist(), fill="toself", fillcolor=colour, opacity=0.2, mode="none",
                    hoverinfo="skip", showlegend=False, **common,
                )  # fmt: skip
            labels = [f"round {turn}, {mb:,.3g} MB, seeds {seeds}" for turn, mb in zip(turns, sent, strict=True)]
            figure.add_scatter(
                x=places, y=values.mean(0).tolist(), name=row["label"], mode="lines+markers", line={"color": colour},
                hovertext=labels, showlegend=not axis, **common,
            )  # fmt: skip
    figure.update_layout(
        title=f"{metric} by round, and by bytes sent in both directions",
        xaxis={"title": "round", "domain": [0, 0.48]},
        xaxis2={"title": "MB", "domain": [0.52, 1], "type": "log", "anchor": "y2"},
        yaxis={"title": metric},
        yaxis2={"matches": "y", "anchor": "x2", "showticklabels": False},
    )
    return str(figure.to_html(include_plotlyjs=True))


def _curve(folder: Path, metric: str) -> dict[int, tuple[float, float]]:
    """Cumulative megabytes and the metric, for each evaluated round."""
    sent, curve = 0, {}
    for row in RunFolder(folder).rows():
        sent += sum(row.down_bytes.values()) + sum(row.up_bytes.values())
        if metric in row.metrics:
            curve[row.round] = (sent / 1e6, row.metrics[metric])
    return curve


def _plotly() -> tuple[Any, list[str]]:
    """``plotly.graph_objects``, and 48 distinguishable colours.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        from plotly.colors import qualitative
    except ImportError as error:
        raise ConfigError("plots need plotly: pip install 'fedlora[plot]'") from error
    return go, [*qualitative.Dark24, *qualitative.Light24]

"""Figures for reports and papers, drawn by matplotlib: curves, a metric against bytes, bars, heat maps.

Each function takes plain numbers and returns a figure; ``svg`` and ``save`` write it. Methods are distinguished by
colour (the palette of Okabe and Ito), marker and dashes at once, so that figures remain legible in grey.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedlora.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
_HATCHES = ("", "//", "\\\\", "||", "--", "xx")
DASHES = ("-", "--", "-.", ":")
SIZE = (3.5, 2.6)
"""Inches: a column of a two-column paper, and legible at the width of a phone."""
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # labels and names of classes are the user's: `$` in them is no formula
}


@dataclass(frozen=True)
class Line:
    """A curve with a band.

    Args:
        label: the method.
        x: the horizontal positions.
        y: the mean over seeds at each.
        low: lower end of the band; equal to ``y`` for a single seed.
        high: its upper end.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Point:
    """A method's final result.

    Args:
        label: the method.
        x: megabytes sent in both directions, mean over seeds.
        y: the metric, mean over seeds.
        spread: its standard deviation over seeds; 0 for a single seed.
    """

    label: str
    x: float
    y: float
    spread: float = 0.0


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points than which no other is at least as good with fewer or equally many bytes, by bytes.

    >>> [point.label for point in pareto_front([Point("a", 1, 0.5), Point("b", 2, 0.4), Point("c", 3, 0.9)], True)]
    ['a', 'c']
    """
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def curves(lines: Sequence[Line], x_label: str, y_label: str, log_x: bool = False, log_y: bool = False) -> Figure:
    """Curves with bands, one per method.

    Args:
        lines: the curves; positions that are not positive are left out on a logarithmic axis.
        x_label: the horizontal axis, with its unit.
        y_label: the vertical axis.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical axis is.
    """

    def draw(axes: Axes) -> None:
        for number, line in enumerate(lines):
            kept = [place for place, x in enumerate(line.x) if x > 0 or not log_x]
            x, y, low, high = (
                np.take(np.asarray(values, float), kept) for values in (line.x, line.y, line.low, line.high)
            )
            look = _look(number)
            every = max(1, len(kept) // 8)
            axes.plot(x, y, label=_entry(line.label), markevery=every, **look)
            if np.any(high > low):
                axes.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log_x:
            axes.set_xscale("log")
            _logarithmic(axes.xaxis)
        elif all(float(x).is_integer() for line in lines for x in line.x):
            _whole(axes.xaxis)
        if log_y:
            axes.set_yscale("log")
            _logarithmic(axes.yaxis)

    return _figure(draw, len(lines))


def frontier(points: Sequence[Point], y_label: str, higher_is_better: bool) -> Figure:
    """The final metric against megabytes on a logarithmic axis, with the Pareto front.

    Args:
        points: the methods; those that sent nothing are left out.
        y_label: the metric's name.
        higher_is_better: its direction.
    """
    sent = [point for point in points if point.x > 0]
    front = pareto_front(sent, higher_is_better)

    def draw(axes: Axes) -> None:
        if front:
            x, y = [point.x for point in front], [point.y for point in front]
            axes.step(x, y, where="post", color="0.6", linewidth=1, zorder=1, label="Pareto front")
            axes.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="0.4", zorder=2)
        for number, point in enumerate(sent):
            look = _look(number)
            bar = [point.spread] if point.spread else None
            axes.errorbar(
                [point.x], [point.y], yerr=bar, fmt=look["marker"], color=look["color"], capsize=2, zorder=3,
                label=_entry(point.label),
            )  # fmt: skip
        axes.set_xscale("log")
        _logarithmic(axes.xaxis)
        axes.set_xlabel("MB sent, both directions")
        axes.set_ylabel(y_label)

    return _figure(draw, len(sent) + 1)


def shares(labels: Sequence[str], parts: Mapping[str, Sequence[float]], x_label: str) -> Figure:
    """Horizontal bars of equal length, one per label, divided in proportion to named parts.

    Args:
        labels: the bars' names, from top to bottom.
        parts: of each part its size in every bar.
        x_label: the axis.
    """

    def draw(axes: Axes) -> None:
        places, left = np.arange(len(labels)), np.zeros(len(labels))
        whole = np.maximum(np.sum([np.asarray(values, float) for values in parts.values()], axis=0), 1e-300)
        for number, (name, values) in enumerate(parts.items()):
            width = 100 * np.asarray(values, float) / whole
            axes.barh(
                places, width, left=left, label=_entry(name), color=_look(number)["color"], alpha=0.85,
                hatch=_HATCHES[number % len(_HATCHES)], edgecolor="white", linewidth=0.3,
            )  # fmt: skip
            left = left + width
        axes.set_yticks(places, [_short(label, 30) for label in labels])
        axes.invert_yaxis()
        axes.set_xlabel(x_label)

    return _figure(draw, len(parts), height=0.9 + 0.22 * len(labels))


def ranges(
    labels: Sequence[str], means: Sequence[float], worst: Sequence[float], spread: Sequence[float], x_label: str
) -> Figure:
    """Of each method the mean over clients, its spread over clients as a bar, and the worst tenth of clients.

    Args:
        labels: the methods, from top to bottom.
        means: mean over clients.
        worst: mean over the worst tenth.
        spread: standard deviation over clients.
        x_label: the metric's name.
    """

    def draw(axes: Axes) -> None:
        places = np.arange(len(labels))
        axes.errorbar(means, places, xerr=list(spread), fmt="o", color=COLOURS[0], capsize=2, label="mean ± deviation")
        axes.plot(worst, places, "x", color=COLOURS[1], label="worst tenth")
        axes.set_yticks(places, [_short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(x_label)

    return _figure(draw, 2, height=0.9 + 0.25 * len(labels))


def timeline(labels: Sequence[str], events: Mapping[str, Sequence[tuple[int, int]]]) -> Figure:
    """Marks by round, a row for each run and a sign for each kind of event.

    Args:
        labels: the runs, from top to bottom.
        events: of each kind the round and the run's number of every event.
    """

    def draw(axes: Axes) -> None:
        for number, (kind, places) in enumerate(events.items()):
            look = _look(number) | {"linestyle": ""}
            # kinds side by side, so that none hides another
            axes.plot([at for at, _ in places], [row + 0.2 * (number - 1) for _, row in places], label=kind, **look)
        axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        _whole(axes.xaxis)
        axes.set_xlabel("round")

    return _figure(draw, 2, height=0.9 + 0.22 * len(labels))


def heat_map(counts: npt.NDArray[Any], clients: Sequence[str], classes: Sequence[str], title: str) -> Figure:
    """Examples of each client (from left to right) by class, on a logarithmic scale of grey.

    Args:
        counts: ``(clients, classes)`` integers.
        clients: the clients' names.
        classes: the classes' names.
        title: how the data were partitioned.
    """

    def draw(axes: Axes) -> None:
        shown = np.log10(1 + np.asarray(counts, float).T)
        image = axes.imshow(shown, aspect="auto", cmap="Greys", interpolation="nearest", vmin=0)
        axes.grid(False)
        for ticks, names in ((axes.set_xticks, clients), (axes.set_yticks, classes)):
            step = max(1, -(-len(names) // 24))
            ticks(range(0, len(names), step), [_short(name, 16) for name in names[::step]], fontsize=6)
        axes.tick_params(axis="x", rotation=90)
        axes.set_xlabel("client")
        axes.set_ylabel("class")
        axes.set_title(title, fontsize=7)
        top = int(np.asarray(counts).max(initial=1))
        # no power of ten whose label would lie on that of the largest number
        marks = sorted({0, 1, *(10**power for power in range(1, 7) if 10**power < 0.7 * top), top})
        bar = axes.figure.colorbar(image, ax=axes, ticks=[float(np.log10(1 + mark)) for mark in marks])
        bar.ax.set_yticklabels([f"{mark:,}" for mark in marks], fontsize=6)
        bar.set_label("examples", fontsize=7)

    return _figure(draw, 0, height=1.2 + 0.1 * max(10, min(len(classes), 24)))


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element for a page; the same figure gives the same text.

    Args:
        figure: the figure.
        name: distinguishes the identifiers inside it from those of the page's other figures.
    """
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as ``NAME.svg`` and ``NAME.pdf``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    import matplotlib as mpl

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
            for suffix, metadata in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
                figure.savefig(folder / f"{name}.{suffix}", metadata=metadata)
                written.append(folder / f"{name}.{suffix}")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); name another folder") from error
    return written


def file_names(labels: Sequence[str]) -> list[str]:
    """A part of a file name for each label: other characters become ``_``, and equal names are numbered.

    >>> file_names(["lora, r/8", "lora_r_8", "flasc"])
    ['lora_r_8', 'lora_r_8_2', 'flasc']
    """
    found: list[str] = []
    for label in labels:
        plain = name = re.sub(r"[^\w.-]+", "_", label)
        number = 1
        while name in found:
            number += 1
            name = f"{plain}_{number}"
        found.append(name)
    return found


def check_installed() -> None:
    """Checks, also before what takes long, that figures can be drawn after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib: pip install 'fedlora[plot]'")


def _figure(draw: Callable[[Axes], None], entries: int, height: float = SIZE[1]) -> Figure:
    """A figure of one panel, with a legend of ``entries`` below it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_installed()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    legend_rows = -(-entries // 2) if entries > 1 else 0
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(SIZE[0], height + 0.16 * legend_rows), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if legend_rows:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _whole(axis: Axis) -> None:
    """Labels an axis with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _logarithmic(axis: Axis) -> None:
    """Labels the logarithmic axis of what was drawn with plain numbers that have room."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps) if high > 5 * low else MaxNLocator(5))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def _look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the method with this number; 88 methods look different."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
    }


def _entry(label: str) -> str:
    """A label for a legend; matplotlib leaves out those that begin with ``_``."""
    return f" {label}" if label.startswith("_") else label


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"

"""The curves and final results of methods over seeds, from run folders or from a study's results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.folder import RunFolder
from fedlora.show.figures import Line, Point, curves, file_names, frontier

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run:
    """One seed of a method.

    Args:
        label: the method.
        seed: the seed.
        folder: its folder.
        result: its ``result.json``.
        rows: its ledger.
        megabytes: bytes sent so far in both directions, in MB, after each row.
        seconds: modelled seconds so far, after each row; None without a network.
    """

    label: str
    seed: int
    folder: Path
    result: Mapping[str, Any]
    rows: Sequence[RoundRecord]
    megabytes: Sequence[float]
    seconds: Sequence[float] | None


Of = Callable[[RoundRecord], float | None]
"""A value of a round, or None where it has none."""


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        ConfigError: it is not finished.
        CheckpointError: its ledger is damaged.
    """
    files = RunFolder(folder)
    result, rows = files.finished()
    sent, seconds = [0.0], [0.0]
    for row in rows:
        sent.append(sent[-1] + (sum(row.down_bytes.values()) + sum(row.up_bytes.values())) / 1e6)
        seconds.append(seconds[-1] + (row.network_seconds or 0.0))
    modelled = any(row.network_seconds is not None for row in rows)
    return Run(
        str(result["label"]), int(result["seed"]), folder, result, rows, sent[1:], seconds[1:] if modelled else None
    )


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def over_seeds(groups: Mapping[str, Sequence[Run]], value: Of, axis: str = "round") -> list[Line]:
    """The mean of a value over seeds, at the rounds for which all seeds have it, with a band over their range.

    Args:
        groups: the runs of each method.
        value: the value of a round.
        axis: ``round``, ``megabytes`` or ``seconds``.

    Returns:
        A line for each method that has the value.
    """
    lines = []
    for label, runs in groups.items():
        found = [_points(run, value, axis) for run in runs]
        shared = sorted(set.intersection(*(set(points) for points in found)))
        if not shared:
            continue
        values = [[points[round_][1] for points in found] for round_ in shared]
        places = [mean(points[round_][0] for points in found) for round_ in shared]
        lines.append(_line(label, places, values))
    return lines


def _points(run: Run, value: Of, axis: str) -> dict[int, tuple[float, float]]:
    """The position on the axis and the value, by round."""
    if axis == "seconds" and run.seconds is None:
        return {}
    found = {}
    for place, row in enumerate(run.rows):
        at = value(row)
        if at is not None:
            x = {"round": row.round, "megabytes": run.megabytes[place]}.get(axis)
            found[row.round] = (float(run.seconds[place] if x is None and run.seconds else x or 0.0), float(at))
    return found


def metric_of(name: str) -> Of:
    """The metric of this name at the rounds at which it was evaluated."""
    return lambda row: row.metrics.get(name)


def trained(value: Callable[[RoundRecord], float]) -> Of:
    """A value of the rounds that trained; the record of the start has none."""
    return lambda row: value(row) if row.round else None


def final_points(groups: Mapping[str, Sequence[Run]], metric: str) -> list[Point]:
    """The final metric and the bytes of each method, mean and standard deviation over seeds."""
    points = []
    for label, runs in groups.items():
        values = [run.result["after"][metric] for run in runs if metric in run.result["after"]]
        if values:
            sent = mean(sum(run.result[way].values()) for run in runs for way in ("down_bytes", "up_bytes")) * 2 / 1e6
            points.append(Point(label, sent, mean(values), stdev(values) if len(values) > 1 else 0.0))
    return points


def study_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a study by name: the final metric against bytes and the metric by round, for each setting."""
    metric = str(results["metric"])
    drawn = {}
    names = [str(setting["name"]) for setting in results["settings"]]
    for name, of in zip(names, file_names(names), strict=True):
        rows = [row for row in results["rows"] if row["stage"] == "final" and row["setting"] == name]
        points = _study_points(rows, results["labels"], metric)
        if any(point.x > 0 for point in points):
            drawn[f"{metric}_by_bytes_{of}"] = frontier(points, metric, bool(results["higher_is_better"]))
        if lines := _study_lines(rows, results["labels"], metric):
            drawn[f"{metric}_by_round_{of}"] = curves(lines, "round", metric)
    return drawn


def _study_points(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], metric: str) -> list[Point]:
    points = []
    for label in labels:
        last = [row for row in rows if row["method"] == label and "test" in row]
        if last:
            values = [row["test"][metric] for row in last]
            sent = mean((row["down_bytes"] or 0) + (row["up_bytes"] or 0) for row in last) / 1e6
            points.append(Point(label, sent, mean(values), stdev(values) if len(values) > 1 else 0.0))
    return points


def _study_lines(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], metric: str) -> list[Line]:
    lines = []
    for label in labels:
        seeds: dict[int, dict[int, float]] = {}
        for row in rows:
            if row["method"] == label and metric in row.get("metrics", {}):
                seeds.setdefault(row["seed"], {})[row["round"]] = row["metrics"][metric]
        shared = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
        if shared:
            values = [[found[round_] for found in seeds.values()] for round_ in shared]
            lines.append(_line(label, shared, values))
    return lines


def _line(label: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Line:
    """The line through the means of the values at each place, with their range as its band."""
    return Line(
        label, x, [mean(each) for each in values], [min(each) for each in values], [max(each) for each in values]
    )

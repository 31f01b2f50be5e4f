"""A report on finished runs: what differs, results over seeds, curves, bytes, clients, events and partitions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from fedlora.config.essential import essential
from fedlora.core.errors import ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.show import figures
from fedlora.show.compare import comparison, load_result
from fedlora.show.curves import Run, by_label, final_points, metric_of, over_seeds, read_run, trained
from fedlora.show.page import Section, Table, page
from fedlora.show.report import human_bytes, human_seconds

Groups = Mapping[str, Sequence[Run]]


def report(folders: Sequence[Path]) -> tuple[str, list[Section]]:
    """The report on finished runs of one task.

    Args:
        folders: the runs' folders; runs with the same label are seeds of one method.

    Returns:
        The HTML page, and its sections, whose figures can be saved on their own.

    Raises:
        ConfigError: a run is not finished, they belong to different tasks, runs with the same label differ in more than
            their seed, or matplotlib is not installed.
    """
    comparison([load_result(folder) for folder in folders])  # called for its checks
    runs = [read_run(folder) for folder in folders]
    groups = by_label(runs)
    sections = [
        _results(groups),
        _differences(groups),
        _curves(groups),
        _bytes(groups),
        _clients(groups),
        _training(groups),
        _events(runs),
        _partitions(groups),
    ]
    metric = str(runs[0].result["main_metric"])
    seeds = sorted({run.seed for run in runs})
    title = " / ".join(groups) if len(groups) < 5 else f"{len(groups)} methods"
    subtitle = f"{_counted(len(runs), 'run')}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}; "
    subtitle += f"main metric {metric}"
    return page(f"fedlora: {title}", subtitle, sections), sections


def _results(groups: Groups) -> Section:
    """All metrics, mean and standard deviation over seeds, with bytes and seconds; and the metric against bytes."""
    first = next(iter(groups.values()))[0].result
    main, higher = str(first["main_metric"]), bool(first["higher_is_better"])
    names = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run.result["after"]))
    names.sort(key=lambda name: name != main)
    rows = []
    for label, runs in groups.items():
        cells = [_spread([run.result["after"][name] for run in runs if name in run.result["after"]]) for name in names]
        sent = [human_bytes(mean(sum(run.result[way].values()) for run in runs)) for way in ("down_bytes", "up_bytes")]
        rows.append([label, str(len(runs)), *cells, *sent, human_seconds(mean(run.result["seconds"] for run in runs))])
    table = Table(["method", "seeds", *names, "bytes down", "bytes up", "time"], rows)
    points = final_points(groups, main)
    drawn = (
        {"metric_by_bytes_final": figures.frontier(points, main, higher)} if any(one.x > 0 for one in points) else {}
    )
    better = "higher" if higher else "lower"
    captions = {
        "metric_by_bytes_final": f"Final {main} ({better} is better) against bytes; bars are standard deviations over "
        "seeds, rings mark the Pareto front."
    }
    return Section("Results", "Mean ± standard deviation over seeds; bytes are means.", [table], drawn, captions)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _differences(groups: Groups) -> Section:
    """The keys in which the methods differ, without those that have their default wherever they exist."""
    documents = {label: RunFolder(runs[0].folder).settings() for label, runs in groups.items()}
    flat = {label: _flat(document) for label, document in documents.items()}
    keys = sorted({key for document in documents.values() for key in _flat(_essential(document))} - {"label", "seed"})
    rows = []
    for key in keys:
        values = [json.dumps(found[key], ensure_ascii=False) if key in found else "" for found in flat.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    tables = [Table(["key", *flat], rows)] if rows else []
    note = "Keys of the configuration that are not equal in all methods, and not their defaults in all."
    return Section("What differs", note, tables)


def _essential(document: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not their defaults; all of them if this version cannot read the configuration."""
    try:
        return essential(document)
    except ConfigError:
        return document


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a document by dotted key."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    if items is None or not value:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, held in items for key, leaf in _flat(held, f"{prefix}{name}.").items()}


def _curves(groups: Groups) -> Section:
    main = str(next(iter(groups.values()))[0].result["main_metric"])
    axes = {
        "round": ("round", False),
        "megabytes": ("MB sent, both directions", True),
        "seconds": ("modelled seconds", False),
    }
    drawn, captions = {}, {}
    seeds = "; bands span the seeds" if any(len(runs) > 1 for runs in groups.values()) else ""
    for axis, (label, log) in axes.items():
        lines = over_seeds(groups, metric_of(main), axis)
        if lines and any(any(x > 0 for x in line.x) for line in lines):
            drawn[f"metric_by_{axis}"] = figures.curves(lines, label, main, log_x=log)
            captions[f"metric_by_{axis}"] = _sentence(f"{main} by {label}", seeds)
    return Section("Curves", figures=drawn, captions=captions)


def _bytes(groups: Groups) -> Section:
    parts: dict[str, list[float]] = {}
    for place, runs in enumerate(groups.values()):
        for way in ("down", "up"):
            for run in runs:
                for kind, count in run.result[f"{way}_bytes"].items():
                    held = parts.setdefault(f"{kind} {way}", [0.0] * len(groups))
                    held[place] += count / len(runs) / 1e6
    kept = {name: values for name, values in parts.items() if sum(values) > 0}
    if not kept:
        return Section("Bytes")
    rows = [[name, *(f"{value:,.3f}" for value in values)] for name, values in kept.items()]
    largest = sorted(kept, key=lambda name: -sum(kept[name]))
    shown = {name: kept[name] for name in largest[:6]}
    if len(largest) > 6:
        shown["other"] = [sum(kept[name][place] for name in largest[6:]) for place in range(len(groups))]
    totals = [sum(values[place] for values in kept.values()) for place in range(len(groups))]
    labels = [f"{label}, {human_bytes(1e6 * total)}" for label, total in zip(groups, totals, strict=True)]
    return Section(
        "Bytes",
        "MB by kind and direction, mean over seeds.",
        [Table(["MB", *groups], rows)],
        {"bytes": figures.shares(labels, shown, "% of the bytes sent")},
        {"bytes": "Bytes by kind and direction, as a share of the method's total."},
    )


def _clients(groups: Groups) -> Section:
    """The metric over clients on their own held-out data, where it was evaluated."""
    main = str(next(iter(groups.values()))[0].result["main_metric"])
    found = {
        label: [
            mean(run.result["after"][f"client_{part}_{main}"] for run in runs)
            for part in ("mean", "worst_tenth", "spread")
        ]
        for label, runs in groups.items()
        if all(f"client_mean_{main}" in run.result["after"] for run in runs)
    }
    if not found:
        return Section("Clients")
    means, worst, spread = zip(*found.values(), strict=True)
    figure = figures.ranges(list(found), means, worst, spread, f"{main} over clients")
    return Section(
        "Clients", figures={"clients": figure}, captions={"clients": _sentence(f"{main} on clients' own held-out data")}
    )


def _training(groups: Groups) -> Section:
    values = {
        "training_loss": ("training loss", lambda row: row.reported_loss, False),
        "update_norm": ("norm of the server's update", trained(lambda row: row.update_norm), True),
        "density_down": ("density down", trained(lambda row: row.density_down), False),
        "density_up": ("density up", trained(lambda row: row.density_up), False),
        "epsilon": ("epsilon", lambda row: row.epsilon if row.epsilon is not None else row.example_epsilon, False),
    }
    drawn, captions = {}, {}
    for name, (label, value, log) in values.items():
        lines = over_seeds(groups, value)
        if log:
            lines = [line for line in lines if all(y > 0 for y in line.low)]
        if lines:
            drawn[name] = figures.curves(lines, "round", label, log_y=log)
            captions[name] = _sentence(f"{label} by round")
    for name, (label, figure) in _layer_norms(groups).items():
        drawn[name] = figure
        captions[name] = f"Norm of the server's update by layer, {label}, first seed."
    return Section("Training", figures=drawn, captions=captions)


def _layer_norms(groups: Groups) -> dict[str, tuple[str, Any]]:
    """Of each method (eight at most) its label and the norms of the update by layer, for its first seed."""
    drawn = {}
    for of, (label, runs) in zip(figures.file_names(list(groups)), list(groups.items())[:8], strict=False):
        rows = [row for row in runs[0].rows if row.update_norms]
        names = list(dict.fromkeys(name for row in rows for name in row.update_norms))
        lines = []
        for name in names[:: max(1, len(names) // 8)]:
            points = [(row.round, row.update_norms[name]) for row in rows if row.update_norms.get(name, 0.0) > 0]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(figures.Line(name, x, y, y, y))
        if lines:
            drawn[f"layers_{of}"] = label, figures.curves(lines, "round", "norm of the update", log_y=True)
    return drawn


def _events(runs: Sequence[Run]) -> Section:
    """Refusals, late clients and warnings by round; equal ones of a run are listed once, with their rounds."""
    names = [f"{run.label}, seed {run.seed}" for run in runs]
    found: dict[tuple[str, str], list[int]] = {}
    marks: dict[str, list[tuple[int, int]]] = {}
    for place, run in enumerate(runs):
        for row in run.rows:
            kinds = {
                "refused": [f"refused client {client}: {why}" for client, why in row.refused.items()],
                "timed out": [f"client {client} timed out" for client in row.late],
                "warning": row.warnings,
            }
            for kind, texts in kinds.items():
                marks.setdefault(kind, []).extend([(row.round, place)] if texts else [])
                for text in texts:
                    found.setdefault((names[place], text), []).append(row.round)
    if not found:
        return Section("Refusals and warnings")
    rows = [[name, _rounds(rounds), text] for (name, text), rounds in found.items()]
    figure = figures.timeline(names, {kind: places for kind, places in marks.items() if places})
    return Section(
        "Refusals and warnings",
        tables=[Table(["run", "rounds", "event"], rows, text=True)],
        figures={"events": figure},
        captions={"events": "Rounds with refused clients, late clients and warnings."},
    )


def _rounds(rounds: Sequence[int]) -> str:
    """Rounds as text: ``1-3, 7``."""
    spans: list[list[int]] = []
    for number in sorted(set(rounds)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _partitions(groups: Groups) -> Section:
    """The partition of each method's first seed; equal ones once."""
    found: dict[str, dict[str, Any]] = {}
    for runs in groups.values():
        files = RunFolder(runs[0].folder)
        if (files.path / "partition.json").exists():
            held = files.read_json("partition.json")
            found.setdefault(json.dumps(held), held)
    return partition_section(list(found.values()))


def partition_section(records: Sequence[Mapping[str, Any]]) -> Section:
    """Heat maps of partitions, from their records."""
    drawn, captions = {}, {}
    for number, held in enumerate(records):
        name = f"partition_{number}" if number else "partition"
        drawn[name] = figures.heat_map(np.array(held["counts"]), held["clients"], held["classes"], held["scheme"])
        of = f"{len(held['clients'])} of {held['num_clients']} clients"
        captions[name] = f"Examples by client and class, {of}: {held['scheme']}."
    return Section("Partition", figures=drawn, captions=captions, large=True)


def _sentence(text: str, rest: str = "") -> str:
    """A caption: a capital first, a full stop last."""
    return f"{text[:1].upper()}{text[1:]}{rest}."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Comparison of finished runs: methods over seeds, all metrics, bytes, paired differences; as table, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

from fedlora.config import differences
from fedlora.core.errors import ConfigError
from fedlora.core.network import Network, seconds_to
from fedlora.core.progress import LOG
from fedlora.runs.folder import RunFolder
from fedlora.show.plain import csv_text, interval, paired, tabular
from fedlora.show.report import human_bytes, human_seconds


def load_result(path: Path) -> dict[str, Any]:
    """The results of a finished run, with its folder.

    Raises:
        ConfigError: the run is not finished.
    """
    return {**RunFolder(path).read_json("result.json"), "folder": str(path)}


def comparison(
    results: Sequence[Mapping[str, Any]],
    reached: tuple[Network | None, float] | None = None,
    metric: str | None = None,
) -> list[dict[str, Any]]:
    """One row per method over the given runs, aggregated over seeds.

    Bytes are means over seeds; ``ratio`` is the reference's bytes divided by the method's, where the reference is
    ``lora`` if present, otherwise the first method. ``difference`` is the mean difference of the metric from the
    reference over common seeds, with the half-width of its 95 % interval (None for one seed).

    Args:
        results: as returned by ``load_result`` and ``as_dict``.
        metric: the metric to compare by; the task's main metric by default.
        reached: a network (None for those of the configurations) and a value of the main metric; each row then has
            ``seconds_to_target``, the mean over seeds of the time until an evaluation reached that value; None if any
            seed never did.

    Raises:
        ConfigError: the runs belong to different tasks, or runs with the same label differ in more than the seed.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(str(result["label"]), []).append(result)
    if len(judged := sorted({str(result["main_metric"]) for result in results})) > 1:
        raise ConfigError(f"these runs have different main metrics, {' and '.join(judged)}; compare runs of one task")
    for label, group in groups.items():
        _check_seeds(label, group)
    warn_of_other_data([Path(one["folder"]) for one in results])
    main = _metric(results, metric)
    rows = [_row(label, group, main, reached) for label, group in groups.items()]
    reference = next((row for row in rows if row["label"] == "lora"), rows[0])
    total = reference["down_bytes"] + reference["up_bytes"]
    for row in rows:
        sent = row["down_bytes"] + row["up_bytes"]
        row["ratio"] = total / sent if sent else None
        row["reference"] = reference["label"]
        row["difference"] = None if row is reference else paired(row["by_seed"], reference["by_seed"])
    return rows


def _row(
    label: str, group: Sequence[Mapping[str, Any]], main: str, reached: tuple[Network | None, float] | None
) -> dict[str, Any]:
    """The figures of a method that do not depend on the others."""
    after = {int(one["seed"]): float(one["after"][main]) for one in group}
    before = [one["before"][main] for one in group if main in one["before"]]
    row: dict[str, Any] = {
        "label": label,
        "seeds": sorted(after),
        "metric": main,
        "before": mean(before) if before else None,
        "after": mean(after.values()),
        "spread": stdev(after.values()) if len(after) > 1 else None,
        "by_seed": after,
        "metrics": _all_metrics(group),
        "down_bytes": mean(sum(one["down_bytes"].values()) for one in group),
        "up_bytes": mean(sum(one["up_bytes"].values()) for one in group),
        "seconds": mean(one["seconds"] for one in group),
        "folders": [str(one["folder"]) for one in group],
    }
    if reached:
        times = [_seconds_to(Path(one["folder"]), main, *reached) for one in group]
        known = [time for time in times if time is not None]
        row |= {"target": reached[1], "seconds_to_target": mean(known) if len(known) == len(times) else None}
    return row


def _metric(results: Sequence[Mapping[str, Any]], metric: str | None) -> str:
    """The metric to compare by.

    Raises:
        ConfigError: a run does not have it.
    """
    name = metric or str(results[0]["main_metric"])
    for one in results:
        if name not in one["after"]:
            raise ConfigError(f"{one['folder']} has no metric {name!r}; it has {', '.join(one['after'])}")
    return name


def _all_metrics(group: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation over seeds of every metric that all seeds have."""
    shared = [name for name in group[0]["after"] if all(name in one["after"] for one in group)]
    values = {name: [one["after"][name] for one in group] for name in shared}
    return {
        name: {"mean": mean(each), "spread": stdev(each) if len(each) > 1 else None} for name, each in values.items()
    }


def _check_seeds(label: str, group: Sequence[Mapping[str, Any]]) -> None:
    """Rejects runs with the same label that differ in more than the seed.

    Raises:
        ConfigError: naming the differences.
    """
    apart = "give them different labels with -s label=..., or compare one of them"
    first = _configuration(group[0])
    for number, one in enumerate(group):
        other = _configuration(one)
        found = [
            line
            for line in (differences(first, other) if first and other else [])
            if line.split(":")[0].rpartition(".")[2] not in ("seed", "checkpoint_every", "device")
            and not line.startswith("track")
        ]
        if found:
            raise ConfigError(
                f"{group[0]['folder']} and {one['folder']} are both called {label!r} and differ in "
                f"{'; '.join(found[:3])}: {apart}"
            )
        if one["seed"] in [earlier["seed"] for earlier in group[:number]]:
            raise ConfigError(f"two runs called {label!r} have the seed {one['seed']}: {apart}")


def warn_of_other_data(folders: Sequence[Path]) -> None:
    """Warns if not all runs read the same rows: neither their means nor their differences mean much.

    Args:
        folders: the runs' folders; those without a manifest are left out.
    """
    first = ("", "")
    for folder in map(RunFolder, folders):
        kept = (folder.path / "manifest.json").exists()
        known = folder.read_json("manifest.json").get("data_fingerprint", "") if kept else ""
        if first[0] and known and known != first[0]:
            LOG.warning(
                "warning: %s and %s were trained or tested on different rows, so their figures do not compare: run one "
                "of them again on the other's data",
                first[1],
                folder.path,
            )
            return
        first = first if first[0] else (known, str(folder.path))


def _configuration(result: Mapping[str, Any]) -> dict[str, Any]:
    return RunFolder(Path(result["folder"])).settings()


def _seconds_to(folder: Path, metric: str, network: Network | None, target: float) -> float | None:
    result, rows = RunFolder(folder).finished()
    return seconds_to(rows, network, metric, target, bool(result.get("higher_is_better", True)))


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Group:
    """``comparison`` for a terminal: the compared metric with bytes and time, then all metrics with differences."""
    first = [_cells(row) for row in rows]
    others = [_other_cells(row) for row in rows]
    tables = [_table([{**one, **_cost_cells(row)} for one, row in zip(first, rows, strict=True)])]
    if any(others):
        names = [{"method": row["label"]} for row in rows]
        tables.append(_table([name | other for name, other in zip(names, others, strict=True)]))
    return Group(*tables)


def _table(cells: Sequence[Mapping[str, str]]) -> Table:
    left = ("method", "seeds")
    columns = list(dict.fromkeys(name for row in cells for name in row))
    table = Table(*(Column(escape(name), justify="left" if name in left else "right") for name in columns))
    for row in cells:
        table.add_row(*(escape(row.get(name, "")) for name in columns))
    return table


def comparison_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """``comparison`` as a ``tabular`` for ``booktabs``."""
    names = list(dict.fromkeys(name for row in rows for name in _other_cells(row)))
    others = [{name: _other_cells(row).get(name, "") for name in names} for row in rows]
    return tabular({"": [_cells(row) | other | _cost_cells(row) for row, other in zip(rows, others, strict=True)]})


def comparison_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """``comparison`` as CSV with unrounded numbers, one row per method and metric."""
    flat = []
    for row in rows:
        for name, found in row["metrics"].items():
            middle, half = row["difference"] if name == row["metric"] and row["difference"] else (None, None)
            flat.append(
                {
                    "method": row["label"],
                    "seeds": " ".join(map(str, row["seeds"])),
                    "metric": name,
                    "mean": found["mean"],
                    "sd": found["spread"],
                    "difference": middle,
                    "difference_half_interval": half,
                    "reference": row["reference"],
                    "down_bytes": row["down_bytes"],
                    "up_bytes": row["up_bytes"],
                    "ratio": row["ratio"],
                    "seconds": row["seconds"],
                    **{key: row[key] for key in ("target", "seconds_to_target") if key in row},
                }
            )
    return csv_text(flat)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The compared metric of a method, by column."""
    return {
        "method": row["label"],
        "seeds": ", ".join(map(str, row["seeds"])),
        f"{row['metric']} before": "" if row["before"] is None else f"{row['before']:.3f}",
        "after": _spread(row["metrics"][row["metric"]]),
    }


def _other_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The other metrics of a method, and the difference of the compared one from the reference."""
    cells = {name: _spread(found) for name, found in row["metrics"].items() if name != row["metric"]}
    if row["difference"] is not None:
        cells[f"{row['metric']} minus {row['reference']}"] = interval(row["difference"])
    return cells


def _cost_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Bytes and time of a method, by column."""
    cells = {
        "bytes down": human_bytes(row["down_bytes"]),
        "bytes up": human_bytes(row["up_bytes"]),
        f"fewer than {row['reference']}": f"{row['ratio']:.2f}x" if row["ratio"] is not None else "nothing sent",
        "seconds": f"{row['seconds']:.0f}",
    }
    if "target" in row:
        cells[f"time to {row['target']:g}"] = _or_never(row["seconds_to_target"])
    return cells


def _spread(found: Mapping[str, float | None]) -> str:
    return f"{found['mean']:.3f}" + (f" ± {found['spread']:.3f}" if found["spread"] is not None else "")


def _or_never(seconds: float | None) -> str:
    return "not reached" if seconds is None else human_seconds(seconds)

"""Tables of a study, computed only from its results: Markdown, CSV, LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from fedlora.show.plain import csv_text, interval, paired, tabular
from fedlora.study.gates import parse_target
from fedlora.study.pool import shown

Results = Mapping[str, Any]
Seeds = dict[int, list[dict[str, Any]]]


@dataclass(frozen=True)
class Summary:
    """Results of a method at a setting, over seeds.

    Args:
        method: its label.
        setting: the setting's name.
        test: the main metric on all test rows, by seed.
        tuned: the main metric on the held-out data; None without tuning.
        down_bytes: bytes sent to clients, mean over seeds.
        up_bytes: bytes received from clients, mean over seeds.
        times: modelled seconds to the target, by seed; None if it was not reached.
        target: the target value; None if none is requested or known.
        values: the tuned values.
        difference: mean of the paired differences to the reference, and half-width of the 95 % confidence interval from
            the t distribution (None for a single pair); None for the reference itself.
    """

    method: str
    setting: str
    test: dict[int, float]
    tuned: float | None
    down_bytes: float | None
    up_bytes: float | None
    times: dict[int, float | None]
    target: float | None
    values: dict[str, Any]
    difference: tuple[float, float | None] | None


def summaries(results: Results) -> list[Summary]:
    """Every method at every setting for which there are results, in the study's order."""
    metric, sign = results["metric"], 1 if results["higher_is_better"] else -1
    runs = _final_runs(results)
    tuning = {(row["method"], row["setting"]): row for row in results["tuning"]}
    found = []
    for setting in results["settings"]:
        name = setting["name"]
        here = {label: runs.get((label, name), {}) for label in results["labels"]}
        target = _target(results, here, metric, sign)
        tests = {
            label: {seed: rows[-1]["test"][metric] for seed, rows in seeds.items() if "test" in rows[-1]}
            for label, seeds in here.items()
        }
        for label, seeds in here.items():
            tuned = tuning.get((label, name), {"value": None, "best": None})
            if tests[label] or (label, name) in tuning:
                ended = {seed: seeds[seed] for seed in tests[label]}
                times = {seed: _time(rows, metric, target, sign) for seed, rows in ended.items()}
                timed = target is not None and all(
                    any("link_seconds" in row for row in rows) for rows in ended.values()
                )
                against = tests.get(results["reference"], {}) if label != results["reference"] else {}
                last = [rows[-1] for rows in ended.values()]
                down, up = (mean(row[way] for row in last) if last else None for way in ("down_bytes", "up_bytes"))
                found.append(
                    Summary(
                        label, name, tests[label], tuned["value"], down, up, times if timed else {}, target,
                        tuned["best"] or {}, paired(tests[label], against),
                    )
                )  # fmt: skip
    return found


def _final_runs(results: Results) -> dict[tuple[str, str], Seeds]:
    """The rows of final runs, by method and setting."""
    runs: dict[tuple[str, str], Seeds] = {}
    for row in results["rows"]:
        if row["stage"] == "final":
            runs.setdefault((row["method"], row["setting"]), {}).setdefault(row["seed"], []).append(row)
    return runs


def _target(results: Results, runs: Mapping[str, Seeds], metric: str, sign: int) -> float | None:
    """The target value at a setting; a method in it stands for its best evaluation, averaged over seeds."""
    if results["target"] is None:
        return None
    term = parse_target(results["target"], results["labels"])
    if not term.label:
        return term.value(0.0)
    curves = [rows for rows in runs.get(term.label, {}).values() if "test" in rows[-1]]
    best = [sign * max(sign * value for value in found) for rows in curves if (found := _curve(rows, metric))]
    return term.value(mean(best)) if best else None


def _curve(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """The evaluations of a run; of clients trained in isolation there is only the final one."""
    found = [row["metrics"][metric] for row in rows if metric in row["metrics"]]
    return found or [row["test"][metric] for row in rows if "test" in row]


def _time(rows: Sequence[Mapping[str, Any]], metric: str, target: float | None, sign: int) -> float | None:
    for row in rows:
        value = row["metrics"].get(metric)
        passed = row.get("link_seconds", None if row["round"] else 0.0)
        if target is not None and value is not None and sign * value >= sign * target and passed is not None:
            return float(passed)
    return None


def _cells(results: Results, found: Summary) -> dict[str, str]:
    values = list(found.test.values())
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    sizes = [found.down_bytes, found.up_bytes]
    whole = [*sizes, None if None in sizes else sum(size or 0.0 for size in sizes)]
    cells = {
        "method": found.method,
        results["metric"]: f"{mean(values):.3f}{spread}" if values else "",
        "seeds": str(len(values)),
        f"minus {results['reference']}": interval(found.difference),
    }
    cells |= {
        f"MB {way}": "" if size is None else _megabytes(size)
        for way, size in zip(("down", "up", "both"), whole, strict=True)
    }
    if results["target"] is not None:
        cells[f"time to {results['target']}"] = _duration(found)
    if results["tuning"]:
        cells["held out"] = "" if found.tuned is None else f"{found.tuned:.3f}"
        cells["tuned"] = ", ".join(f"{key} {shown(value)}" for key, value in found.values.items())
    return cells


def _megabytes(size: float) -> str:
    """Four digits, or all before the point, without an exponent."""
    return f"{size / 1e6:.0f}" if size >= 1e9 else f"{size / 1e6:.4g}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _duration(found: Summary) -> str:
    reached = [time for time in found.times.values() if time is not None]
    if not found.times:
        return ""
    if len(reached) < len(found.times):
        return f"not reached ({len(reached)} of {len(found.times)} seeds)"
    seconds = mean(reached)
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:.1f} h"
    )


def markdown(results: Results) -> str:
    """A Markdown table for each setting, followed by failures and gates that do not hold."""
    found = summaries(results)
    parts = []
    for setting in results["settings"]:
        rows = [_cells(results, one) for one in found if one.setting == setting["name"]]
        if not rows:
            continue
        title = ", ".join(f"{key} = {shown(value)}" for key, value in setting["values"].items())
        head = [f"**{title}**", ""] if title else []
        lines = [_row(rows[0]), "|---" * len(rows[0]) + "|"]
        parts.append("\n".join([*head, *lines, *(_row(row.values()) for row in rows)]))
    remarks = [f"- {one['method']} at {one['setting']}, {one['stage']}: {one['reason']}" for one in results["failures"]]
    remarks += [f"- {one}" for one in results["broken_gates"]]
    if remarks:
        parts.append("\n".join(remarks))
    return "\n\n".join(parts)


def comma_separated(results: Results) -> str:
    """One CSV table, with a row for each method and setting and unrounded numbers."""
    rows = []
    values = {one["name"]: one["values"] for one in results["settings"]}
    for one in summaries(results):
        tests = list(one.test.values())
        middle, half = one.difference or (None, None)
        times = [time for time in one.times.values() if time is not None]
        rows.append(
            {
                **values[one.setting],
                "method": one.method,
                "metric": results["metric"],
                "mean": mean(tests) if tests else None,
                "sd": stdev(tests) if len(tests) > 1 else None,
                "seeds": len(tests),
                "difference": middle,
                "difference_half_interval": half,
                "down_bytes": one.down_bytes,
                "up_bytes": one.up_bytes,
                "target": one.target,
                "seconds_to_target": mean(times) if times and len(times) == len(one.times) else None,
                "held_out": one.tuned,
                "tuned": " ".join(f"{key}={shown(value)}" for key, value in one.values.items()),
            }
        )
    return csv_text(rows)


def latex(results: Results) -> str:
    """One ``tabular`` for ``booktabs``, with the settings below one another."""
    blocks: dict[str, list[dict[str, str]]] = {}
    for one in summaries(results):
        blocks.setdefault("" if one.setting == "all" else one.setting, []).append(_cells(results, one))
    return tabular(blocks)


FORMATS: dict[str, Callable[[Results], str]] = {"markdown": markdown, "csv": comma_separated, "latex": latex}
"""Output formats of tables, by name."""

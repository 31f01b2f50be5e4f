"""A study's results in one file: trials, every evaluation of every run, failures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedlora.core.errors import ConfigError
from fedlora.core.network import Network, parse_network
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.folder import RunFolder
from fedlora.study.gates import Figures
from fedlora.study.halving import Halving
from fedlora.study.pool import Job, Outcome, remembered

VERSION = 1
_KEYS = (
    "metric", "higher_is_better", "labels", "seeds", "reference", "target", "link", "settings", "broken_gates",
    "failures", "tuning", "rows",
)  # fmt: skip
_ROW_KEYS = ("stage", "method", "setting", "seed", "round", "metrics")
Key = tuple[str, str]


def compact(value: Any) -> Any:
    """The same JSON value with numbers rounded to five digits, except those by which trials are ranked."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: one if key == "ranks" else compact(one) for key, one in value.items()}
    return [compact(one) for one in value] if isinstance(value, list | tuple) else value


def tuning_rows(tunings: Mapping[Key, Halving]) -> list[dict[str, Any]]:
    """The trials, one row for each method and setting."""
    rows = []
    for (label, setting), halving in tunings.items():
        best = halving.best
        trials = [
            {**trial.row(), "seconds": trial.seconds} for trial in halving.trials if trial.metrics or trial.failure
        ]
        rows.append(
            {
                "method": label,
                "setting": setting,
                "done": halving.done,
                "rounds": halving.rungs,
                "best": best.values if best else None,
                "value": best.metrics[max(best.metrics)] if best else None,
                "ends": halving.ends if halving.done else [],
                "trials": trials,
            }
        )
    return [row for row in rows if row["trials"]]


def evaluations(
    facts: Mapping[str, Any], folder: Path, network: Network | None, sent: bool, outcome: Outcome | None
) -> Iterator[dict[str, Any]]:
    """One row for each evaluation of a run.

    Args:
        facts: the columns common to all of them: stage, method, setting, seed.
        folder: the run's folder.
        network: the network over which time is modelled; None for that of the configuration, if any.
        sent: whether anything is communicated; otherwise there is no time over a network.
        outcome: of a finished run, the final metrics on all test rows.
    """
    files, held = RunFolder(folder), remembered(folder)
    found = [{**facts, **one} for one in _evaluated(files.rows(), network, sent)]
    if held.exists() and not (folder / "result.json").exists():
        kept = RunFolder(held.parent).read_json(held.name)["rows"]
        if kept and "test" in kept[-1]:
            yield from kept
            return
        rounds = {row["round"] for row in kept}
        found = sorted([*kept, *(row for row in found if row["round"] not in rounds)], key=lambda row: row["round"])
    if outcome is not None and not found:  # clients trained in isolation have their own ledgers
        rounds = files.read_json("result.json")["rounds"]
        found.append(
            {**facts, "round": rounds, "down_bytes": 0, "up_bytes": 0, "seconds": outcome.seconds, "metrics": {}}
        )
    if outcome is not None:
        found[-1]["test"] = outcome.metrics
    yield from found


def _evaluated(rows: Sequence[RoundRecord], network: Network | None, timed: bool) -> Iterator[dict[str, Any]]:
    """Cumulative bytes and time up to each evaluation, with its metrics."""
    down = up = 0
    passed = seconds = 0.0
    for row in rows:
        down += sum(row.down_bytes.values())
        up += sum(row.up_bytes.values())
        seconds += sum(row.seconds.values())
        timed = timed and (network is not None or row.network_seconds is not None or not row.round)
        if timed:
            passed += network.round_seconds(row) if network else row.network_seconds or 0.0
        if row.metrics:
            time = {"link_seconds": passed} if timed and (network or row.round) else {}
            sizes = {"down_bytes": down, "up_bytes": up, "seconds": seconds}
            yield {"round": row.round, **sizes, **time, "metrics": row.metrics}


def final_rows(
    finals: Mapping[tuple[str, str, int], tuple[Job, Outcome | None]], link: str, alone: Sequence[str]
) -> list[dict[str, Any]]:
    """Every evaluation of the final runs.

    Args:
        finals: each job and its outcome, by method, setting and seed.
        link: the network over which time is modelled; that of the configuration if empty.
        alone: the methods that communicate nothing.
    """
    network = parse_network(link) if link else None
    rows: list[dict[str, Any]] = []
    for (label, setting, seed), (job, outcome) in finals.items():
        if outcome is not None and outcome.failure:
            continue
        facts = {"stage": "final", "method": label, "setting": setting, "seed": seed, "run": job.folder.name}
        rows += evaluations(facts, job.folder, network, label not in alone, outcome)
    return rows


def tune_rows(tunings: Mapping[Key, Halving], seed: int) -> list[dict[str, Any]]:
    """Every evaluation of the trials."""
    rows: list[dict[str, Any]] = []
    for (label, setting), halving in tunings.items():
        for number, trial in enumerate(halving.trials):
            facts = {"stage": "tune", "method": label, "setting": setting, "seed": seed, "trial": number}
            facts["run"] = trial.folder.name
            found = list(evaluations(facts, trial.folder, None, False, None))
            rows += found or [
                {**facts, "round": round_, "metrics": {halving.main_metric: trial.metrics[round_]}}
                for round_ in trial.metrics
            ]
    return rows


def figures(results: Mapping[str, Any], stage: str) -> Figures:
    """The main metric by method and setting: the best held-out one, or the mean over seeds on the test data."""
    if stage == "tune":
        return {
            (row["method"], row["setting"]): row["value"]
            for row in results["tuning"]
            if row["done"] and row["best"] is not None
        }
    groups: dict[Key, list[float]] = {}
    for row in results["rows"]:
        if "test" in row:
            groups.setdefault((row["method"], row["setting"]), []).append(row["test"][results["metric"]])
    return {key: mean(values) for key, values in groups.items() if len(values) == len(results["seeds"])}


def rows_over(link: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of earlier results, without times if those were modelled over another link."""
    if results["link"] == link:
        return list(results["rows"])
    return [{key: value for key, value in row.items() if key != "link_seconds"} for row in results["rows"]]


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Writes the results atomically, one row per line."""
    lines = []
    for key, value in compact(results).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"  {json.dumps(row, separators=(',', ':'), allow_nan=False)}" for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    RunFolder(path.parent).write(path.name, "{\n" + ",\n".join(lines) + "\n}\n")


def read(path: Path) -> dict[str, Any]:
    """Reads results written by ``write``.

    Raises:
        ConfigError: there are none, they are damaged, or they are of another version.
    """
    mend = "restore it; or remove it, and `fedlora study FILE.toml` writes it again from the runs beside it"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} holds no results of a study ({error}); `fedlora study FILE.toml` makes them"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): {mend}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ConfigError(f"{path} holds no results of a study that this version can read")
    lacking = [key for key in _KEYS if key not in found]
    lacking = lacking or [f"rows.{key}" for row in found["rows"] for key in _ROW_KEYS if key not in row]
    if lacking:
        raise ConfigError(f"{path} is damaged (there is no {lacking[0]}): {mend}")
    return found

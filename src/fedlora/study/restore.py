"""Resuming a study from its ``results.json`` if the runs themselves are gone, for example on another machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.runs.folder import RunFolder
from fedlora.study.pool import remembered
from fedlora.study.results import read, rows_over


def restore(folder: Path, link: str) -> None:
    """Restores the outcomes of missing runs from ``results.json``, each into a file next to the run's folder.

    Runs are identified by the digest of their configuration, so results of a different configuration are never used.
    A run that needs to be continued starts from the beginning, with bit-identical results.

    Args:
        folder: the study's folder.
        link: the network of the study's report; times that were modelled over another one are left out.
    """
    if not (folder / "results.json").exists():
        return
    found = read(folder / "results.json")
    figures = {"main_metric": found["metric"], "higher_is_better": found["higher_is_better"]}
    runs: dict[Path, dict[str, Any]] = {}
    for row in rows_over(link, found):
        run = runs.setdefault(_place(folder, row), {"rows": [], "outcomes": {}, "failure": ""})
        run["rows"].append(row)
        if "test" in row:
            run["outcomes"]["end"] = {"after": row["test"], "seconds": row["seconds"], **figures}
    for tuned in found["tuning"]:
        for trial in tuned["trials"]:
            place = _place(folder, {"stage": "tune", **tuned, "run": trial["run"]})
            run = runs.setdefault(place, {"rows": [], "outcomes": {}})
            # other failures can be fixed, so those trials are run again
            run["failure"] = trial["failure"] if trial.get("cause", "diverged") == "diverged" else ""
            for rung, (rank, loss) in trial["ranks"].items():
                value = rank if found["higher_is_better"] else -rank
                reached = {"after": {found["metric"]: value, "loss": -loss}, "seconds": trial["seconds"], **figures}
                run["outcomes"][rung] = reached
    for path, run in runs.items():
        if not path.exists() and (run["outcomes"] or run["failure"]):
            file = remembered(path)
            RunFolder(file.parent).write_json(file.name, run)


def _place(folder: Path, row: Mapping[str, Any]) -> Path:
    return folder / str(row["stage"]) / str(row["setting"]) / str(row["method"]) / str(row["run"])

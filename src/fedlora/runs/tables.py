"""The evaluations of runs as tables for pandas: one row per evaluation."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import config
from fedlora.core.errors import ConfigError
from fedlora.core.later import pandas
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.folder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame

_FIRST = ("label", "seed", "round", "phase")
_LAST = ("down_bytes", "up_bytes", "loss", "folder")


def load_results(runs: str | Path | Sequence[str | Path]) -> DataFrame:
    """The evaluations of several runs, finished or not, in one table.

    Args:
        runs: a pattern such as ``"runs/*"``, in which folders without a run are skipped; or folders.

    Returns:
        The columns ``label``, ``seed``, ``round``, ``phase``, one per metric (without a value where it was not
        evaluated), ``down_bytes`` and ``up_bytes`` up to that round, ``loss`` and ``folder``. A run in the mode
        ``local`` has one ledger per client, each of them a run here.

    Raises:
        ConfigError: there is no run.
    """
    patterns = [runs] if isinstance(runs, str | Path) else runs
    folders = [folder for pattern in patterns for folder in _folders(pattern)]
    found = [table for folder in folders for table in _of_folder(folder)]
    if not found:
        raise ConfigError(f"no run was found at {', '.join(map(str, patterns))}; name folders of runs, as in 'runs/*'")
    return frame([row for table in found for row in table])


def frame(rows: Sequence[dict[str, Any]]) -> DataFrame:
    """A table of ``evaluations``, with the metrics between the other columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    metrics = [name for name in names if name not in (*_FIRST, *_LAST)]
    return pandas.DataFrame(rows, columns=[*_FIRST, *metrics, *_LAST])


def evaluations(label: str, seed: int, folder: Path, rows: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """The rows of a ledger that have metrics, with the bytes up to each.

    Args:
        label: the method's name.
        seed: the run's seed.
        folder: the run's folder.
        rows: the whole ledger.
    """
    found, down, up = [], 0, 0
    for row in rows:
        down += sum(row.down_bytes.values())
        up += sum(row.up_bytes.values())
        if row.metrics:
            # a task's own loss on test data comes under the name of the metric, beside the training loss
            metrics = {f"test_{name}" if name in (*_FIRST, *_LAST) else name: one for name, one in row.metrics.items()}
            loss = row.loss if row.round else float("nan")
            first = {"label": label, "seed": seed, "round": row.round, "phase": row.phase}
            last = {"down_bytes": down, "up_bytes": up, "loss": loss, "folder": str(folder)}
            found.append({**first, **metrics, **last})
    return found


def _folders(pattern: str | Path) -> list[Path]:
    """A folder of this very name, or those that a pattern stands for."""
    return [Path(pattern)] if Path(pattern).is_dir() else list(map(Path, sorted(glob.glob(str(pattern)))))


def _of_folder(folder: Path) -> Iterator[list[dict[str, Any]]]:
    if not (folder / "config.toml").exists():
        return
    experiment = config.load(folder)
    for one in (folder, *sorted(folder.glob("clients/*"))):
        if rows := RunFolder(one).rows():
            yield evaluations(experiment.label, experiment.seed, one, rows)

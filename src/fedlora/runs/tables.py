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
        ConfigError: there is no run, or a folder that is named does not exist.
    """
    patterns = [runs] if isinstance(runs, str | Path) else runs
    found = [table for pattern in patterns for folder in _folders(pattern) for table in _of_folder(folder)]
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
            loss = float("nan") if row.reported_loss is None else row.reported_loss
            first = {"label": label, "seed": seed, "round": row.round, "phase": row.phase}
            last = {"down_bytes": down, "up_bytes": up, "loss": loss, "folder": str(folder)}
            found.append({**first, **metrics, **last})
    return found


def _folders(pattern: str | Path) -> list[Path]:
    """The folder of this name, whatever characters it has; else those that match."""
    if Path(pattern).exists():
        return [Path(pattern)]
    found = sorted(glob.glob(str(pattern)))
    if not found and not set(str(pattern)) & set("*?["):
        raise ConfigError(f"there is no folder {pattern}, but a run was to be read from it; correct the path")
    return [Path(name) for name in found]


def _of_folder(folder: Path) -> Iterator[list[dict[str, Any]]]:
    if not (folder / "config.toml").exists():
        return
    experiment = config.load(folder)
    for one in (folder, *sorted(folder.glob("clients/*"))):
        if rows := RunFolder(one).rows():
            yield evaluations(experiment.label, experiment.seed, one, rows)

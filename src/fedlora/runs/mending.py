"""What a run continues from if one of its files is damaged: the damage is reported, and mended from what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.config import Experiment
from fedlora.core.digests import damaged
from fedlora.core.errors import CheckpointError, ConfigError
from fedlora.core.state import ServerState
from fedlora.privacy.disclosure import disclosure_of
from fedlora.runs.folder import RunFolder

Tell = Callable[[str], None]


def latest(files: RunFolder, experiment: Experiment, tell: Tell) -> tuple[ServerState, dict[str, Any]] | None:
    """The latest checkpoint, if there is one; where it is damaged, the one before it, whose later rounds are repeated.

    Args:
        files: the run's folder.
        experiment: its experiment.
        tell: receives a sentence for each damaged checkpoint, which is removed.

    Raises:
        CheckpointError: none can be read, or a repeated round would draw other noise than the one already disclosed.
    """
    try:
        return files.latest()
    except CheckpointError as error:
        if not all(disclosure_of(phase.recipe).replays for phase in experiment.phases):
            raise CheckpointError(
                f"{error}; but this run's noise cannot be drawn again, and a second draw would disclose more than its "
                "account says: restore the original folder, or start in another one with --out"
            ) from error
    for note in files.drop_damaged():
        tell(note)
    return files.latest()


def result(files: RunFolder, tell: Tell) -> dict[str, Any] | None:
    """The content of ``result.json``; None if there is none that can be read, so that it is computed again."""
    if not (files.path / "result.json").exists():
        return None
    try:
        return files.read_json("result.json")
    except ConfigError:
        tell(f"{files.path / 'result.json'} is damaged; it is computed again from the checkpoint and the ledger")
        return None


def exported(folder: Path, tell: Tell) -> Path | None:
    """The folder of a run's adapter or model; None if it is missing or damaged, so that it is written again."""
    wrong = damaged(folder)
    if wrong:
        tell(f"{folder / wrong} is damaged; {folder} is written again from the checkpoint")
    return folder if folder.exists() and not wrong else None

"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.core.byte_counts import ByteCounts
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.tables import evaluations, frame, load_results

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Args:
        label: the method's name.
        folder: the run's folder.
        seed: its seed.
        rounds: rounds completed.
        main_metric: the metric shown in tables.
        higher_is_better: its direction.
        before: metrics before the first round.
        after: metrics after the last one, on all test examples.
        down_bytes: bytes sent to clients, by kind.
        up_bytes: bytes received from clients, by kind.
        seconds: time spent in rounds and evaluations, over all sessions of the run.
        rows: the ledger; empty in the mode ``local``, where each client has one in ``clients``.
        adapter: the exported adapter or model.
        stopped: why the run ended before its last round; empty if it did not.
    """

    label: str
    folder: Path
    seed: int
    rounds: int
    main_metric: str
    higher_is_better: bool
    before: dict[str, float]
    after: dict[str, float]
    down_bytes: ByteCounts
    up_bytes: ByteCounts
    seconds: float
    rows: tuple[RoundRecord, ...] = field(repr=False)
    adapter: Path | None = None
    stopped: str = ""

    def figures(self) -> dict[str, Any]:
        """The result as JSON values, without the ledger and the paths."""
        return {name: value for name, value in vars(self).items() if name not in ("folder", "rows", "adapter")}

    def frame(self) -> DataFrame:
        """A table with one row per evaluation, of each client in the mode ``local``; see ``fedlora.load_results``."""
        if not self.rows:
            return load_results(self.folder)
        return frame(evaluations(self.label, self.seed, self.folder, self.rows))

"""Other places that a run's figures go to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from fedlora.errors import ConfigError
from fedlora.ledger import Row


class Tracker(ABC):
    """Gets every row of the ledger."""

    @abstractmethod
    def started(self, rows: list[Row]) -> None:
        """A run begins, or goes on after ``rows``, which were recorded before."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """Records one row."""

    @abstractmethod
    def close(self) -> None:
        """Flushes and ends."""


class TensorBoard(Tracker):
    """Events that ``tensorboard --logdir`` shows.

    Args:
        folder: where the events go.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("TensorBoard is not installed: pip install 'fedlora[tensorboard]'") from error
        self._make = SummaryWriter
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._down = self._up = 0

    def started(self, rows: list[Row]) -> None:
        """See ``Tracker.started``: events after the rows that the ledger kept are dropped."""
        self._down = sum(sum(row.down_bytes.values()) for row in rows)
        self._up = sum(sum(row.up_bytes.values()) for row in rows)
        self._writer = self._make(str(self._folder), purge_step=rows[-1].round + 1 if rows else 0)

    def log(self, row: Row) -> None:
        """See ``Tracker.log``: loss, metrics, bytes so far, densities."""
        self._down += sum(row.down_bytes.values())
        self._up += sum(row.up_bytes.values())
        figures = {f"metrics/{name}": value for name, value in row.metrics.items()}
        figures |= {"bytes/down": self._down, "bytes/up": self._up}
        if row.cohort:
            figures |= {
                "train/loss": row.loss,
                "train/update_norm": row.update_norm,
                "density/down": row.density_down,
                "density/up": row.density_up,
            }
        assert self._writer is not None
        for name, value in figures.items():
            self._writer.add_scalar(name, value, row.round)

    def close(self) -> None:
        """See ``Tracker.close``."""
        if self._writer is not None:
            self._writer.close()


TRACKERS: dict[str, type[TensorBoard]] = {"tensorboard": TensorBoard}

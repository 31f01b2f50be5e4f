"""Other places that a run's figures go to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from fedlora.errors import ConfigError
from fedlora.round import Row


class Tracker(ABC):
    """Gets every row of the ledger."""

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
        rounds_done: rounds that an earlier session recorded for good; later events of it are dropped.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, rounds_done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("TensorBoard is not installed: pip install 'fedlora[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=rounds_done + 1)
        self._down = self._up = 0

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
        for name, value in figures.items():
            self._writer.add_scalar(name, value, row.round)

    def close(self) -> None:
        """See ``Tracker.close``."""
        self._writer.close()


TRACKERS: dict[str, type[TensorBoard]] = {"tensorboard": TensorBoard}

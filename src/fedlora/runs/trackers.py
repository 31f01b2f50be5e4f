"""Callbacks that send a run's metrics to experiment trackers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData
from fedlora.config.track import Track
from fedlora.core.errors import ConfigError
from fedlora.core.slots import Slot
from fedlora.recipe.modes import MODES
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.services import SERVICES, Service


class TensorBoard(Callback):
    """Event files for ``tensorboard --logdir``; none in the mode ``local``, where each client has its own ledger.

    Args:
        folder: the folder of the event files.

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

    def run_started(self, experiment: Experiment, data: FederatedData, rows: Sequence[RoundRecord]) -> None:
        """See ``Callback.run_started``: events after the rows kept in the ledger are dropped."""
        if MODES[experiment.mode].separate:
            return
        self._down = sum(sum(row.down_bytes.values()) for row in rows)
        self._up = sum(sum(row.up_bytes.values()) for row in rows)
        self._writer = self._make(str(self._folder), purge_step=rows[-1].round + 1 if rows else 0)

    def row_recorded(self, row: RoundRecord) -> None:
        """See ``Callback.row_recorded``: loss, metrics, cumulative bytes, densities."""
        if self._writer is None:
            return
        self._down += sum(row.down_bytes.values())
        self._up += sum(row.up_bytes.values())
        figures = {f"metrics/{name}": value for name, value in row.metrics.items()}
        figures |= {"bytes/down": self._down, "bytes/up": self._up}
        if row.round:  # the start has no training; a secret cohort is empty
            figures |= {} if row.reported_loss is None else {"train/loss": row.reported_loss}
            figures |= {
                "train/update_norm": row.update_norm,
                "density/down": row.density_down,
                "density/up": row.density_up,
            }
        for name, value in figures.items():
            self._writer.add_scalar(name, value, row.round)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


TRACKERS: dict[str, type[TensorBoard | Service]] = {"tensorboard": TensorBoard, **SERVICES}
"""Trackers by ``kind``."""


def make_tracker(track: Track, folder: Path) -> Callback:
    """The callback that sends a run's figures to a tracker.

    Args:
        track: the tracker; a class of the user's own is created with ``folder / kind``, as ``TensorBoard`` is.
        folder: the run's folder.

    Raises:
        ConfigError: there is no such tracker, its package is not installed, or a setting has no effect on it.
    """
    kind = track.kind
    if kind in SERVICES:
        return SERVICES[kind](track, folder)
    others = Slot("track", Callback)
    if kind not in TRACKERS and ":" not in kind and kind not in others.installed():
        raise ConfigError(
            f"there is no tracker {kind!r}; there are: {', '.join([*TRACKERS, *others.installed()])}, and "
            "package.module:Class"
        )
    if track != Track(kind=kind):
        raise ConfigError(f"the tracker {kind} takes no project, name or options; remove them")
    found: type = TensorBoard if kind in TRACKERS else others.find(kind)
    made: Callback = found(folder / kind.replace(":", "."))
    return made

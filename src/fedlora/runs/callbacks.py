"""What is called as a run goes on: progress, trackers, and whatever a user adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedlora.core.errors import CallbackError, ConfigError, FedloraError

if TYPE_CHECKING:
    from fedlora.config import Experiment
    from fedlora.config.federated_data import FederatedData
    from fedlora.rounds.ledger import RoundRecord
    from fedlora.runs.result import Result

_RENAMED = (
    "watchers and trackers of fedlora 0.1.0 are callbacks now: derive from fedlora.runs.callbacks.Callback, call "
    "`started` run_started(experiment, setting, rows), `finished_round` and `log` row_recorded(row), `finished` "
    "run_finished(result), and give fedlora.run(..., callbacks=[...])"
)


class Callback:
    """Is called as a run goes on. Each method does nothing here; a subclass has those that it needs."""

    def run_started(self, experiment: Experiment, setting: FederatedData, rows: Sequence[RoundRecord]) -> None:
        """A run begins, or goes on after ``rows``; in the mode ``local`` that of each client."""

    def row_recorded(self, row: RoundRecord) -> None:
        """A round, or the evaluation before the first one, is in the ledger."""

    def message(self, text: str) -> None:
        """Something happened that is no round, such as a site that came; other threads may call this too."""

    def run_finished(self, result: Result) -> None:
        """A run has ended as it should; in the mode ``local`` that of each client."""

    def close(self) -> None:
        """Nothing follows, whatever became of the run. Another run may start with the same callback."""


class CallbackList(Callback):
    """Calls several, in order.

    Args:
        callbacks: whom to call.

    Raises:
        ConfigError: one has the methods of an earlier version.
        CallbackError: one fails, from any method.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        for one in self._callbacks:
            names = {name for name in dir(one) if name in ("finished_round", "started", "log")}
            if "finished_round" in names or names == {"started", "log"}:
                raise ConfigError(f"{type(one).__name__} would never be called: {_RENAMED}")

    def run_started(self, experiment: Experiment, setting: FederatedData, rows: Sequence[RoundRecord]) -> None:
        self._call("run_started", lambda one: one.run_started(experiment, setting, rows))

    def row_recorded(self, row: RoundRecord) -> None:
        self._call("row_recorded", lambda one: one.row_recorded(row))

    def message(self, text: str) -> None:
        self._call("message", lambda one: one.message(text))

    def run_finished(self, result: Result) -> None:
        self._call("run_finished", lambda one: one.run_finished(result))

    def close(self) -> None:
        self._call("close", lambda one: one.close())

    def _call(self, method: str, call: Callable[[Callback], None]) -> None:
        for one in self._callbacks:
            try:
                call(one)
            except FedloraError:
                raise
            except Exception as error:
                raise CallbackError(
                    f"the callback {type(one).__name__} failed in {method} ({type(error).__name__}: {error}); every "
                    "finished round is saved: mend it, or leave it out, and run again to go on"
                ) from error

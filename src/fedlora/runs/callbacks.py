"""Callbacks of a run: progress, trackers, and user-defined ones."""

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
    "watchers and trackers of fedlora 0.1.0 are callbacks now: derive from fedlora.Callback, call `started` "
    "run_started(experiment, data, rows), `finished_round` and `log` row_recorded(row), `finished` "
    "run_finished(result), and give fedlora.run(..., callbacks=[...])"
)


class Callback:
    """Hooks called during a run. Every method does nothing by default; a subclass overrides those that it needs."""

    def run_started(self, experiment: Experiment, data: FederatedData, rows: Sequence[RoundRecord]) -> None:
        """A run starts, or resumes after ``rows``; in the mode ``local``, called for each client's run."""

    def row_recorded(self, row: RoundRecord) -> None:
        """A round, or the evaluation before the first one, was written to the ledger."""

    def message(self, text: str) -> None:
        """An event other than a round occurred, such as a site connecting; may be called from other threads."""

    def run_finished(self, result: Result) -> None:
        """A run finished successfully; in the mode ``local``, called for each client's run."""

    def close(self) -> None:
        """No further calls follow, whatever the outcome of the run. The same callback may be used for another run."""


class CallbackList(Callback):
    """Calls several callbacks in order.

    Args:
        callbacks: the callbacks to call.

    Raises:
        ConfigError: one of them defines methods of an earlier version.
        CallbackError: one of them fails; raised from any method.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        for one in self._callbacks:
            names = {name for name in dir(one) if name in ("finished_round", "started", "log")}
            if "finished_round" in names or names == {"started", "log"}:
                raise ConfigError(f"{type(one).__name__} would never be called: {_RENAMED}")

    def run_started(self, experiment: Experiment, data: FederatedData, rows: Sequence[RoundRecord]) -> None:
        self._call("run_started", lambda one: one.run_started(experiment, data, rows))

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
                    f"the callback {type(one).__name__} failed in {method} ({type(error).__name__}: {error}); "
                    "every finished round is saved: fix it, or leave it out, and run again to resume"
                ) from error

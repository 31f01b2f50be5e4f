"""Callbacks of a run: progress, trackers, and user-defined ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
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

    def on_round_end(self, row: RoundRecord) -> bool | None:
        """A round ended, and its row is about to be written; if this returns True, it becomes the last round.

        The run then ends as at its last round, with a final evaluation and an exported adapter. All callbacks are
        called, and the row has no metrics if the model was not evaluated after this round.
        """

    def on_evaluate(self, row: RoundRecord) -> None:
        """A row with metrics was written to the ledger, that before the first round included."""

    def on_save(self, round: int, checkpoint: Path) -> None:
        """A checkpoint was written.

        Args:
            round: the round after which it was made.
            checkpoint: its folder, which later checkpoints remove.
        """

    def on_refusal(self, round: int, client: int, reason: str) -> None:
        """A client's update was refused and not aggregated; not called where cohort membership is secret."""

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

    def on_round_end(self, row: RoundRecord) -> bool:
        return bool(self.reason_to_stop(row))

    def on_evaluate(self, row: RoundRecord) -> None:
        self._call("on_evaluate", lambda one: one.on_evaluate(row))

    def on_save(self, round: int, checkpoint: Path) -> None:
        self._call("on_save", lambda one: one.on_save(round, checkpoint))

    def on_refusal(self, round: int, client: int, reason: str) -> None:
        self._call("on_refusal", lambda one: one.on_refusal(round, client, reason))

    def reason_to_stop(self, row: RoundRecord) -> str:
        """Calls ``on_round_end`` of all callbacks; a sentence that names those that end the run, empty if none does."""
        names: list[str] = []

        def ask(one: Callback) -> None:
            if one.on_round_end(row):
                names.append(type(one).__name__)

        self._call("on_round_end", ask)
        return f"the callback {' and '.join(names)} ended the run" if names else ""

    def report(self, row: RoundRecord) -> None:
        """Calls the methods that concern a row of the ledger."""
        self.row_recorded(row)
        if row.metrics:
            self.on_evaluate(row)
        for client, reason in row.refused.items():
            self.on_refusal(row.round, int(client), reason)

    def message(self, text: str) -> None:
        self._call("message", lambda one: one.message(text))

    def run_finished(self, result: Result) -> None:
        self._call("run_finished", lambda one: one.run_finished(result))

    def close(self) -> None:
        with ExitStack() as left:  # the others are closed too if one fails
            for one in reversed(self._callbacks):
                left.callback(_called, one, "close", lambda one: one.close())

    def _call(self, method: str, call: Callable[[Callback], None]) -> None:
        for one in self._callbacks:
            _called(one, method, call)


def _called(one: Callback, method: str, call: Callable[[Callback], None]) -> None:
    try:
        call(one)
    except FedloraError:
        raise
    except Exception as error:
        raise CallbackError(
            f"the callback {type(one).__name__} failed in {method} ({type(error).__name__}: {error}); "
            "every finished round is saved: fix it, or leave it out, and run again to resume"
        ) from error

"""Who is told how a run goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from fedlora.config import Experiment
from fedlora.ledger import Row

if TYPE_CHECKING:
    from fedlora.experiment import Result
    from fedlora.setting import Setting


class Watcher(ABC):
    """Is told of a run's start, of each round, and of its end."""

    @abstractmethod
    def started(self, experiment: Experiment, setting: Setting, rows: list[Row]) -> None:
        """A run begins, or goes on after ``rows``."""

    @abstractmethod
    def finished_round(self, row: Row) -> None:
        """A round, or the evaluation before the first one, is in the ledger."""

    @abstractmethod
    def finished(self, result: Result) -> None:
        """The run is over."""


class Silent(Watcher):
    """Says nothing."""

    def started(self, experiment: Experiment, setting: Setting, rows: list[Row]) -> None:
        """See ``Watcher.started``."""

    def finished_round(self, row: Row) -> None:
        """See ``Watcher.finished_round``."""

    def finished(self, result: Result) -> None:
        """See ``Watcher.finished``."""

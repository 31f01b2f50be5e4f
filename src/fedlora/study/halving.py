"""Successive halving: many settings for a few rounds, the best of them for more rounds, one to the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora import config
from fedlora.config import Experiment, assign
from fedlora.core.errors import ConfigError
from fedlora.core.slots import kind_of
from fedlora.study.pool import Job, Outcome, Source, drop_checkpoints, shown
from fedlora.study.space import Values, at_ends, points
from fedlora.tasks import Sites, Validation

RUNGS = ((1 / 3, 1.0), (2 / 3, 3 / 8), (1.0, 0.0))
"""For each rung, the fraction of the rounds it runs to and the fraction of the trials it includes, at least one."""


@dataclass(eq=False)
class Trial:
    """A trial of one setting.

    Args:
        values: the value of each varied key.
        experiment: the whole configuration.
        folder: the folder of its run.
        metrics: the main metric at each rung that it reached, by round.
        failure: why it ended early; empty if it did not.
        cause: the kind of that failure, see ``Outcome``.
        seconds: time it has taken.
        ranks: sort key at each rung, higher is better: the metric, then the loss.
    """

    values: Values
    experiment: Experiment
    folder: Path
    metrics: dict[int, float] = field(default_factory=dict)
    failure: str = ""
    cause: str = ""
    seconds: float = 0.0
    ranks: dict[int, tuple[float, float]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return {
            "values": self.values,
            "metrics": {str(round_): value for round_, value in self.metrics.items()},
            "failure": self.failure,
            "cause": self.cause,
            "run": self.folder.name,
            "ranks": {str(round_): list(rank) for round_, rank in self.ranks.items()},
        }


class Halving(Source):
    """The trials of one configuration.

    Args:
        name: name for display.
        document: a TOML document; trials use ``held_out`` of it.
        vary: key -> values, see ``points``.
        folder: the folder of the runs.
        trials: maximum number of settings.
        seed: seed of the sample.
        share: fraction of the training data held out for selection.
        strict: whether an error other than a training failure stops everything.
        changed: called after every outcome.

    Raises:
        ConfigError: a key, a value or the configuration is invalid.
    """

    def __init__(
        self,
        name: str,
        document: Mapping[str, Any],
        vary: Mapping[str, Any],
        folder: Path,
        *,
        trials: int,
        seed: int = 0,
        share: float = 0.1,
        strict: bool = False,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.vary, self.document = name, dict(vary), document
        self.main_metric, self.higher_is_better = "", True
        self._changed, self._strict = changed, strict
        self.trials: list[Trial] = []
        for values in points(vary, trials, seed):
            try:
                experiment = config.parse(held_out(with_values(document, values), share, seed))
            except ConfigError as error:
                raise ConfigError(f"{error} (with {_words(values)})" if values else str(error)) from error
            place = folder / config.digest(experiment)
            if all(trial.folder != place for trial in self.trials):  # two spellings of one value are one run
                self.trials.append(Trial(values, experiment, place))
        rounds = [trial.experiment.rounds for trial in self.trials]
        if len(set(rounds)) > 1:
            raise ConfigError(
                "the varied keys change the number of rounds, by which trials are compared; keep it fixed"
            )
        counts = [max(1, math.floor(part * len(self.trials) + 0.5)) for _, part in RUNGS]
        # a single setting has nothing to be compared with
        self.rungs = [math.ceil(part * rounds[0]) for part, _ in RUNGS][-1 if len(self.trials) == 1 else 0 :]
        self._counts = counts[-len(self.rungs) :]
        self._rung = -1
        self._waiting: list[Trial] = []
        self._open: dict[Path, Trial] = {}
        self._in: list[Trial] = list(self.trials)
        self._advance()

    @property
    def done(self) -> bool:
        """Whether all trials are finished."""
        return self._rung == len(self.rungs)

    @property
    def left(self) -> int:
        """Number of rounds remaining, as far as is known."""
        steps = [after - before for before, after in zip([0, *self.rungs], self.rungs, strict=False)]
        later = sum(
            count * step
            for number, (count, step) in enumerate(zip(self._counts, steps, strict=True))
            if number > self._rung
        )
        now = len(self._waiting) + len(self._open)
        return later + (0 if self.done else now * steps[self._rung])

    @property
    def best(self) -> Trial | None:
        """Of the trials that did not fail, the best of those that got furthest; None if none of them reached a rung."""
        fine = [trial for trial in self.trials if trial.metrics and not trial.failure]
        return max(fine, key=lambda trial: (max(trial.ranks), trial.ranks[max(trial.ranks)]), default=None)

    @property
    def ends(self) -> list[str]:
        """The keys whose best value is at an end of the range tried."""
        return at_ends(self.vary, self.best.values) if self.best else []

    def take(self) -> Job | None:
        if not self._waiting:
            return None
        trial = self._waiting.pop(0)
        self._open[trial.folder] = trial
        name = f"{self.name} {_words(trial.values)}".strip()
        return Job(config.to_toml(trial.experiment), trial.folder, self.rungs[self._rung], name)

    def put_back(self, job: Job) -> None:
        self._waiting.insert(0, self._open.pop(job.folder))

    def record(self, job: Job, outcome: Outcome) -> None:
        if self._strict and outcome.cause == "refused":
            raise ConfigError(f"{job.name}: {outcome.failure}")
        if self._strict and outcome.cause == "fault":
            raise RuntimeError(f"{job.name}: {outcome.failure}")
        trial = self._open.pop(job.folder)
        if outcome.failure:
            trial.failure, trial.cause = outcome.failure, outcome.cause
        else:
            self.main_metric, self.higher_is_better = outcome.main_metric, outcome.higher_is_better
            reached, sign = self.rungs[self._rung], 1 if outcome.higher_is_better else -1
            trial.metrics[reached], trial.seconds = outcome.value, outcome.seconds
            # early figures are often tied at chance level
            trial.ranks[reached] = sign * outcome.value, -outcome.metrics.get("loss", 0.0)
        if not self._waiting and not self._open:
            self._advance()
        self._changed()

    def _advance(self) -> None:
        """Moves on to the next rung with the best trials of the last one."""
        before = self.rungs[self._rung] if self._rung >= 0 else None
        self._rung += 1
        fine = [trial for trial in self._in if not trial.failure]
        if before is not None:
            fine.sort(key=lambda trial: trial.ranks[before], reverse=True)
        last = self.done or not fine
        self._in = [] if last else fine[: self._counts[self._rung]]
        self._waiting = list(self._in)
        if last:
            self._rung = len(self.rungs)
        for trial in self.trials:
            if trial not in self._in and trial.folder.exists():
                drop_checkpoints(trial.folder)


def _words(values: Values) -> str:
    return " ".join(f"{key}={shown(value)}" for key, value in values.items())


def with_values(document: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a TOML document with some keys set, see ``fedlora.config.assign``."""
    copied: dict[str, Any] = copy.deepcopy(dict(document))
    for key, value in values.items():
        assign(copied, key, value)
    return copied


def held_out(document: Mapping[str, Any], share: float, seed: int) -> dict[str, Any]:
    """The configuration with held-out training data in place of its test data, evaluated only at the rungs.

    Args:
        document: a TOML document.
        share: the fraction of training rows to hold out; with natural clients, of the users.
        seed: seed of the draw.

    Raises:
        ConfigError: the configuration is invalid, or its training rows are held elsewhere.
    """
    experiment = config.parse(document)
    if isinstance(experiment.data, Sites | Validation):
        raise ConfigError(
            f"data.kind = {experiment.data.kind!r}: trials hold a part of the training rows out, which needs the "
            "whole data on this machine; name them in [data]"
        )
    found = copy.deepcopy(dict(document))
    source = found.get("data") or {"kind": kind_of(experiment.data)}
    unit = "clients" if experiment.clients.column() else "rows"
    found["data"] = {"kind": Validation.kind, "source": source, "share": share, "seed": seed, "hold_out": unit}
    kept = {key: value for key, value in found.get("evaluate", {}).items() if key == "dense"}
    found["evaluate"] = {**kept, "every": experiment.rounds}
    return found

"""``fedlora tune``: finds the best settings of one configuration on held-out training data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedlora import config
from fedlora.config import Experiment
from fedlora.config.handed_over import check_on_disk
from fedlora.core.errors import ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.study.halving import Halving, Trial, with_values
from fedlora.study.pool import deadline_of, execute, processes_for, shown
from fedlora.study.space import Values

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Tuned:
    """The result of a tuning.

    Args:
        metric: the main metric.
        higher_is_better: its direction.
        rounds: number of rounds of each rung.
        trials: the trials in the order in which they were drawn.
        best: the values of the best trial; None if every trial failed.
        value: its metric.
        warnings: sentences about a best value at the end of the range tried, and about an exhausted time budget.
        folder: the folder of the trials, of ``tune.json`` and of ``best.toml``.
    """

    metric: str
    higher_is_better: bool
    rounds: tuple[int, ...]
    trials: tuple[Trial, ...]
    best: Values | None
    value: float | None
    warnings: tuple[str, ...]
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "rounds": list(self.rounds),
            "best": self.best,
            "value": self.value,
            "warnings": list(self.warnings),
            "trials": [trial.row() for trial in self.trials],
        }


def tune(
    configuration: Experiment | Mapping[str, Any],
    vary: Mapping[str, Any],
    folder: Path | str,
    *,
    trials: int = 8,
    holdout: float = 0.1,
    seed: int = 0,
    jobs: int | None = 1,
    budget: float | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Tries settings by successive halving (arXiv 1502.07943) and keeps the best.

    All trials run for a third of the rounds, the best three eighths of them continue to two thirds, and the best one to
    the end. They are compared by the task's main metric on held-out training data that no client trains on; test data
    are never read. Each trial is a run in its own folder, so an interrupted tuning can be resumed.

    Args:
        configuration: an experiment, or the content of a TOML file.
        vary: key -> a list of values, or a range such as ``"1e-3..1e-1"``; keys as for ``-s``.
        folder: the folder of the trials, of ``tune.json`` and of ``best.toml``.
        trials: maximum number of settings; fewer if the lists have fewer combinations.
        holdout: fraction of the training rows held out for comparison; of the users, if clients are users.
        seed: seed of the sample of settings and of the held-out data.
        jobs: number of concurrent processes; None for one per GPU, or per core without one. More than one
            requires a script guarded by ``if __name__ == "__main__"``.
        budget: seconds after which nothing new is started.
        log: receives a line for each run that ends.

    Returns:
        The trials and the best of them.

    Raises:
        ConfigError: a key, a value or the data are invalid.
        Stopped: the user interrupted; repeating the call resumes the tuning.
    """
    if isinstance(configuration, Experiment):
        check_on_disk(configuration, "trials in processes of their own")
    document = config.resolved(configuration) if isinstance(configuration, Experiment) else configuration
    if trials < 1 or not 0 < holdout < 1:
        raise ConfigError("tuning needs one trial or more, and a holdout above 0 and below 1")
    if "seed" in vary:
        raise ConfigError("the seed is no setting to tune: the best one would be luck; set it with `-s seed=...`")
    files = RunFolder(Path(folder))
    late = False

    def write() -> None:
        files.write_json("tune.json", _tuned(halving, late, files.path).as_dict())

    halving = Halving(
        "", document, vary, files.path, trials=trials, seed=seed, share=holdout, strict=True, changed=write
    )
    late = not execute([halving], processes_for(jobs), deadline_of(budget), log)
    found = _tuned(halving, late, files.path)
    write()
    if found.best is not None:
        files.write("best.toml", tomli_w.dumps(with_values(document, found.best)))
    return found


def _tuned(halving: Halving, late: bool, folder: Path) -> Tuned:
    best = halving.best
    warnings = [end_warning(key, halving.vary[key], best.values[key]) for key in halving.ends if best]
    if late:
        reached = max(best.metrics) if best else 0
        warnings.append(
            f"the budget was spent before the end: the best so far, at round {reached} of {halving.rungs[-1]}; "
            "run the same command to resume"
        )
    return Tuned(
        metric=halving.main_metric,
        higher_is_better=halving.higher_is_better,
        rounds=tuple(halving.rungs),
        trials=tuple(halving.trials),
        best=best.values if best else None,
        value=best.metrics[max(best.metrics)] if best else None,
        warnings=tuple(warnings),
        folder=folder,
    )


def end_warning(key: str, given: Any, value: Any) -> str:
    """The warning for a best value at the end of the range tried."""
    tried = given if isinstance(given, str) else ", ".join(map(shown, given))
    return f"the best {key} = {shown(value)} is at an end of the values tried ({tried}): a better value may lie beyond"


def seconds_of(budget: str | None) -> float | None:
    """Parses a time budget such as ``45s``, ``90m``, ``2h`` or ``1h30m`` into seconds.

    Raises:
        ConfigError: it is not of this form.
    """
    if budget is None:
        return None
    parts = re.findall(r"(\d+\.?\d*)([smhd])", budget)
    if not parts or "".join(map("".join, parts)) != budget.replace(" ", ""):
        raise ConfigError(f"a budget is a time such as 45s, 90m or 2h, and {budget!r} is not")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)

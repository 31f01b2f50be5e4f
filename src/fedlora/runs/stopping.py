"""Whether a run ends before its last round, decided from its ledger."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedlora.config.stop import Stop
from fedlora.core.errors import ConfigError
from fedlora.rounds.ledger import RoundRecord


def check_stop(stop: Stop, metrics: Collection[str], main: str, accounted: bool) -> None:
    """Rejects conditions that could never hold.

    Args:
        stop: the conditions.
        metrics: the metrics of the evaluation before the first round.
        main: the task's main metric.
        accounted: whether the run keeps a privacy account.

    Raises:
        ConfigError: the metric does not exist, or its direction is missing; there is no privacy account.
    """
    if stop.epsilon is not None and not accounted:
        raise ConfigError("stop.epsilon needs a run with noise, and this one keeps no privacy account; remove it")
    if stop.patience is None:
        return
    name = stop.metric or main
    if name not in metrics:
        raise ConfigError(f"stop.metric = {name!r} is not evaluated in this run; choose from {', '.join(metrics)}")
    if name != main and stop.higher_is_better is None:
        raise ConfigError(f"stop.metric = {name!r} is not the main metric; set stop.higher_is_better for it")


def reason_to_stop(stop: Stop, rows: Sequence[RoundRecord], main: str, higher_is_better: bool) -> str:
    """The condition that holds after the last row, as a sentence; empty if none does.

    Args:
        stop: the conditions.
        rows: the ledger up to now.
        main: the task's main metric.
        higher_is_better: its direction.
    """
    last = rows[-1]
    sent = sum(sum(row.down_bytes.values()) + sum(row.up_bytes.values()) for row in rows)
    spent = max(last.epsilon or 0.0, last.example_epsilon or 0.0)
    limits = (
        ("bytes", stop.bytes, sent),
        ("seconds", stop.seconds, sum(sum(row.seconds.values()) for row in rows)),
        ("epsilon", stop.epsilon, spent),
    )
    for name, limit, value in limits:
        if limit is not None and value >= limit:
            return f"stop.{name} = {limit:g} was reached ({value:.6g})"
    name = stop.metric or main
    if stop.patience is None or name not in last.metrics:
        return ""
    higher = higher_is_better if stop.higher_is_better is None else stop.higher_is_better
    values = [row.metrics[name] if higher else -row.metrics[name] for row in rows if name in row.metrics]
    if _without_improvement(values, stop.min_delta) < stop.patience:
        return ""
    return f"{name} did not improve by more than {stop.min_delta:g} in {stop.patience} evaluations (stop.patience)"


def _without_improvement(values: Sequence[float], min_delta: float) -> int:
    """Number of values since the best one."""
    best, since = values[0], 0
    for value in values[1:]:
        best, since = (value, 0) if value > best + min_delta else (best, since + 1)
    return since

"""When a run ends before its last round."""

from __future__ import annotations

from fedlora.core.component import MODEL_CONFIG, Count, NonNegative, Positive, dataclass
from fedlora.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Stop:
    """Conditions that end a run before its last round; the first one that holds after a round does.

    The run ends as at its last round: the model is evaluated on all test examples, saved and exported. All conditions
    but ``seconds`` depend on the ledger's deterministic figures only, so that the same run ends after the same round.

    Args:
        patience: ends the run once this many evaluations in a row brought no improvement of the metric; the evaluation
            before the first round counts as the first value.
        min_delta: by how much the metric must be better than its best value so far to count as an improvement.
        metric: the metric, as in the ledger; the task's main metric if absent.
        higher_is_better: direction of ``metric``; needed for all but the task's main metric.
        bytes: ends the run after the round in which the bytes of both directions reach this sum.
        seconds: ends the run after the round in which the measured seconds of rounds and evaluations reach this sum.
        epsilon: ends the run after the round in which the privacy budget spent reaches this value, at the level of
            clients or of examples; ``privacy.max_epsilon`` keeps a run below a value.

    Raises:
        ConfigError: no condition is set, or a setting of the metric has no effect.
    """

    patience: Count | None = None
    min_delta: NonNegative = 0.0
    metric: str | None = None
    higher_is_better: bool | None = None
    bytes: Count | None = None
    seconds: Positive | None = None
    epsilon: Positive | None = None

    def __post_init__(self) -> None:
        if self.patience is None:
            for name, unset in (("metric", None), ("higher_is_better", None), ("min_delta", 0.0)):
                if getattr(self, name) != unset:
                    raise ConfigError(f"stop.{name} has no effect without stop.patience; set it, or remove stop.{name}")
        if all(one is None for one in (self.patience, self.bytes, self.seconds, self.epsilon)):
            raise ConfigError("[stop] has no condition; set patience, bytes, seconds or epsilon, or remove the table")

"""Changes of a run's configuration after it began: more rounds, other evaluations, another learning rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedlora.config import Experiment, differences, digest, resolved
from fedlora.config.federated_data import in_mode
from fedlora.privacy import CentralGaussian
from fedlora.recipe.modes import MODES

CHANGES = "changes.json"
"""The file of a run's folder that records its changes."""
_ROUNDS = re.compile(r"phases\.(\d+)\.rounds")
_RATE = re.compile(r"phases\.(\d+)\.recipe\.(local\.optimizer|server|server_head)\.lr")
_EVALUATE = re.compile(r"evaluate\.\w+")


class Position(NamedTuple):
    """How far a run has come.

    Args:
        phase: number of the phase of its latest checkpoint.
        steps: rounds done in it.
        round: rounds done altogether.
        stopped: why it ended before its last round; empty if it did not.
    """

    phase: int = 0
    steps: int = 0
    round: int = 0
    stopped: str = ""


def changed_keys(held: Experiment, experiment: Experiment) -> list[str]:
    """The keys in which two configurations differ, each with both values; those that decide no result are left out."""
    left, right = (
        {**values, "root": None, "track": None, "checkpoint_every": None, "model": {**values["model"], "hub_id": None}}
        for values in map(resolved, (held, experiment))
    )
    return differences(left, right)


def refusal(held: Experiment, experiment: Experiment, at: Position) -> str | None:
    """Why a run cannot go on with another configuration, and the remedy; None if it can.

    Rounds of the current and later phases, ``evaluate`` and learning rates may change; nothing else. Rounds so far are
    as they were, so a run that was extended equals a longer one if no schedule depends on their number.

    Args:
        held: the configuration that the run has so far.
        experiment: the new one.
        at: the position of the run.
    """
    found = changed_keys(held, experiment)
    keys = [one.partition(": ")[0] for one in found]
    known = [key for key in keys if _ROUNDS.fullmatch(key) or _RATE.fullmatch(key) or _EVALUATE.fullmatch(key)]
    other = [one for key, one in zip(keys, found, strict=True) if key not in known]
    if other:
        return f"({'; '.join(other[:4])}); choose another folder with --out, or remove that one"
    reason = _refused_now(known, held, experiment, at)
    return f"({'; '.join(found[:4])}), but {reason}; or choose another folder with --out" if reason else None


def _refused_now(keys: Sequence[str], held: Experiment, experiment: Experiment, at: Position) -> str | None:
    """Why changes of these keys come too late, and the remedy."""
    if MODES[experiment.mode].separate:
        return f"mode = {experiment.mode!r} has a run of its own for each client: leave the configuration as it was"
    rates = _phases(_RATE, keys)
    phases = rates | _phases(_ROUNDS, keys)
    if phases and at.stopped:
        return f"the run has ended early ({at.stopped}): leave rounds and learning rates as they were"
    if phases and min(phases) < at.phase:
        return f"phase {min(phases)} is over: leave its settings as they were"
    if experiment.phases[at.phase].rounds < at.steps:
        return f"{at.steps} rounds of phase {at.phase} are done: ask for as many or more"
    if at.phase in rates and experiment.phases[at.phase].rounds == at.steps:
        return f"no round of phase {at.phase} is left for the learning rate: ask for more rounds too"
    if held.rounds != experiment.rounds and any(_calibrated(phase.recipe.privacy) for phase in experiment.phases):
        return "its noise was calibrated by target_epsilon for the old number of rounds: leave rounds as they were"
    return None


def _phases(pattern: re.Pattern[str], keys: Sequence[str]) -> set[int]:
    return {int(match.group(1)) for key in keys if (match := pattern.match(key))}


def sentences(held: Experiment, experiment: Experiment, at: Position) -> list[str]:
    """The changes for the ledger; learning rate schedules that depend on the number of rounds are named."""
    found = [f"from this round on, after {at.round} rounds, {one}" for one in changed_keys(held, experiment)]
    if held.rounds != experiment.rounds:
        recipe = experiment.phases[at.phase].recipe
        for name, settings in (("local", recipe.local), ("server", recipe.server), ("server_head", recipe.server_head)):
            if settings and (settings.schedule.shape != "constant" or settings.schedule.warmup):
                found.append(f"the schedule of {name}.lr spans {experiment.rounds} rounds from this round on")
    return found


def recorded(
    before: Sequence[dict[str, Any]], held: Experiment, experiment: Experiment, at: Position
) -> list[dict[str, Any]]:
    """The content of ``CHANGES`` with one more change; the same one twice, as after a crash, is recorded once.

    Args:
        before: its content so far.
        held: the configuration that the run has so far.
        experiment: the new one.
        at: the position of the run.
    """
    old = digest(in_mode(held))
    kept = [one for one in before if (one["round"], one["config"]) != (at.round, old)]
    return [*kept, {"round": at.round, "config": old, "changes": sentences(held, experiment, at)}]


def _calibrated(privacy: Any) -> bool:
    return isinstance(privacy, CentralGaussian) and privacy.target_epsilon is not None

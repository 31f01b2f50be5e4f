"""What may be disclosed about clients besides noisy updates: one value, consulted wherever more could leak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.recipe import Recipe


@dataclass(frozen=True)
class Disclosure:
    """What a recipe's privacy mechanisms allow to be disclosed; without noise, everything.

    Args:
        figures: what a client may report: ``examples``, ``steps``, ``loss``, ``rank``, ``below`` (within the clip).
        failures: whether a client's failure may stop the run; otherwise it counts as an update of zeros.
        timing: whether a client may time out and report how long it worked: both depend on the examples' lengths.
        retries: whether a job may be sent again: example-level noise would be drawn twice for one turn.
        attempts: whether a round with too few results may be retried; otherwise whatever was sent counts.
        absence: whether a missing result may become visible: by ending a run in which no client answered, or by
            replacing the client by another one.
        cohort: whether the members of a cohort may be disclosed: in the ledger, by times and bytes of tiers, by a seed.
        replays: whether a run may return to an older checkpoint, as it would draw the same noise again.
    """

    figures: frozenset[str]
    failures: bool
    timing: bool
    retries: bool
    attempts: bool
    absence: bool
    cohort: bool
    replays: bool


def disclosure_of(recipe: Recipe) -> Disclosure:
    """What may be disclosed under a recipe's client-level and example-level noise.

    A run of several phases may disclose only what all of them allow.
    """
    clients, examples = recipe.privacy, recipe.local.gradient_source
    is_open = not clients.needs_uniform_mean and not examples.hides_examples
    figures = {"examples", "steps", "loss", "rank"} if is_open else set()
    return Disclosure(
        figures=frozenset(figures | ({"below"} if clients.adapts else set())),
        failures=is_open,
        timing=not examples.hides_examples,
        retries=not examples.hides_examples,
        attempts=is_open,
        absence=not clients.needs_uniform_mean,
        cohort=clients.repeatable,
        replays=clients.repeatable and examples.repeatable,
    )

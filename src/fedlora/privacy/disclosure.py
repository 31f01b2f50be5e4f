"""What may be known of clients beside updates with noise: one value, which every place that could say more asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.recipe import Recipe


@dataclass(frozen=True)
class Disclosure:
    """What a recipe's privacy leaves open; without noise, everything.

    Args:
        figures: what a client's report may say: ``examples``, ``steps``, ``loss``, ``rank``, ``below`` (the clip).
        failures: whether a client's failure may stop the run; else it counts as an update of zeros.
        timing: whether a client may run out of time, and say how long it worked: both tell of examples' lengths.
        retries: whether a job may be sent again: noise for examples would be drawn twice for one turn.
        attempts: whether a round with too few answers may be tried again; else what was sent counts.
        absence: whether it may show that a client did not answer: by an end of a run where nobody did, or by another
            client in its place.
        cohort: whether anybody may know who took part: in the ledger, by times and bytes of tiers, by a seed.
        replays: whether a run may go back to an older checkpoint, since it would draw the same noise again.
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
    """What may be known under a recipe's noise for clients, and for examples.

    Of a run of several phases may be known what all of them allow.
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

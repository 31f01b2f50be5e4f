"""Jobs and replies of a round as values: the same in every engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from fedlora.core.state import ClientState
from fedlora.core.tree import Tree
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe import Recipe
from fedlora.transport.base_updates import FoldMessage


def empty_report(recipe: Recipe) -> Tree:
    """What clients report besides their update, as zeros: the template of that message part.

    ``rank`` is the client's rank from then on, if clients prune ranks; ``below`` is whether the update was within the
    clip, if the clip adapts.
    """
    names = ("below",) if recipe.privacy.adapts else ("examples", "steps", "loss")
    return {name: torch.zeros(()) for name in names + recipe.rank_pruning.reports}


def report_of(recipe: Recipe, figures: Mapping[str, float]) -> Tree:
    """A client's report: the figures that may be disclosed, and zero in place of the others."""
    known = disclosure_of(recipe).figures
    return {
        name: torch.tensor(float(figures[name])) if name in known else zero
        for name, zero in empty_report(recipe).items()
    }


class Job(NamedTuple):
    """One client's turn, as a value: the same job gives the same reply in any process.

    Args:
        recipe: the recipe to run.
        client: the number of the client.
        phase: number of the phase.
        round: rounds finished in this phase.
        progress: rounds finished in the whole run, and rounds in the whole run, for the learning rate.
        seed: the seed of this turn's random draws.
        base: the number format of frozen weights, whatever the client's tier computes in.
        payload: the parameters of this round; empty once they are decoded, to ``start``.
        setup: the setup message of the phase; None if the client has it already.
        fold: the edits of frozen weights that the client lacks, if any.
        memory: what the client remembers.
        start: the parameters that ``payload`` decodes to, if they are known: the server's own tensors, so that a turn
            in its process needs no copy of them. Read-only, and never sent.
    """

    recipe: Recipe
    client: int
    phase: int
    round: int
    progress: tuple[int, int]
    seed: int
    base: Literal["fp32", "bf16"]
    payload: bytes
    setup: bytes | None
    fold: FoldMessage | None
    memory: ClientState
    start: Tree | None = None


class Reply(NamedTuple):
    """A client's result.

    Args:
        raw: the bytes that are sent; None if the client timed out, or if there is no valid result.
        memory: what stays on the client.
        seconds: how long the client worked.
        refused: why there is no valid result; empty if there is one, or if the client timed out.
        delivered: whether the client is known to have received the job.
        failed: whether there is no valid result because training failed.
        size: bytes of a reply that could not be read.
        unmoved: the groups of parameters that its steps did not change at all.
    """

    raw: bytes | None
    memory: ClientState
    seconds: float
    refused: str = ""
    delivered: bool = True
    failed: bool = False
    size: int = 0
    unmoved: tuple[str, ...] = ()

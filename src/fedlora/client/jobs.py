"""What goes to a client in a round and what comes back, as values: the same in every engine."""

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
    """What clients report beside their update, as zeros: the template of that part.

    ``rank`` is what a client's is from then on, where clients give up ranks; ``below`` says whether an update was not
    longer than the clip, where that adapts.
    """
    names = ("below",) if recipe.privacy.adapts else ("examples", "steps", "loss")
    return {name: torch.zeros(()) for name in names + recipe.rank_pruning.reports}


def report_of(recipe: Recipe, figures: Mapping[str, float]) -> Tree:
    """A client's report: of its figures those that may be known, and zero in place of the others."""
    known = disclosure_of(recipe).figures
    return {
        name: torch.tensor(float(figures[name])) if name in known else zero
        for name, zero in empty_report(recipe).items()
    }


class Job(NamedTuple):
    """One client's turn, as a value: the same job gives the same reply in any process.

    Args:
        recipe: what to do.
        client: whose turn it is.
        phase: number of the phase.
        round: rounds finished in this phase.
        progress: rounds finished in the whole run, and rounds in the whole run, for the learning rate.
        seed: where this turn's draws start.
        base: the number format of frozen weights, whatever the client's tier computes in.
        payload: the parameters of this round.
        setup: the announcement of the phase; None if the client remembers it.
        fold: the edits of frozen weights that the client lacks, if there are any.
        memory: what the client remembers.
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


class Reply(NamedTuple):
    """A client's answer.

    Args:
        raw: the bytes that travel; None where the client ran out of time, or where there is no answer that counts.
        memory: what stays with the client.
        seconds: how long it worked.
        refused: why there is no answer that counts; empty where there is one, or where time ran out.
        delivered: whether the client is known to have got the job.
    """

    raw: bytes | None
    memory: ClientState
    seconds: float
    refused: str = ""
    delivered: bool = True

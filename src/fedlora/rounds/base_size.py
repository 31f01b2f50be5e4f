"""The size of a round's base update, checked before training."""

from __future__ import annotations

from torch import nn

from fedlora.core.errors import ConfigError
from fedlora.core.slots import kind_of
from fedlora.core.state import ServerState
from fedlora.recipe import Recipe
from fedlora.server.aggregate.products import ProductExact, Stack

LARGEST_SHARE = 0.5
"""Default largest size of a round's base update, as a share of the model's parameters."""


def check_base_update(recipe: Recipe, state: ServerState, model: nn.Module, cohort: int) -> None:
    """Refuses a phase whose rounds would send more of the model as base updates than ``max_base_share`` allows.

    A base update is sent as factors, whose rank grows with the cohort, or as the sum of all so far, whichever has fewer
    entries; so it is never larger than the matrices that it edits.

    Args:
        recipe: the recipe of the phase.
        state: the state before its first round, for shapes.
        model: the model with its tuning.
        cohort: the number of clients of a round.

    Raises:
        ConfigError: a round's base update is too large.
    """
    rule = recipe.aggregator
    if not isinstance(rule, ProductExact | Stack):
        return
    sides = [(len(state.params[b]), state.params[a].shape[1]) for a, b, _ in state.schema.pairs]
    if not sides:
        return
    rank = rule.fold_rank([recipe.rank] * cohort, recipe.tuning.moving)
    factors, dense = (sum(each) for each in zip(*((rank * (m + n), m * n) for m, n in sides), strict=True))
    whole = sum(value.numel() for value in model.parameters())
    share, most = min(factors, dense) / whole, rule.max_base_share or LARGEST_SHARE
    if share > most:
        also = ", truncate it (fold_rank of fedex)," if isinstance(rule, ProductExact) else ","
        raise ConfigError(
            f"a base update of {kind_of(rule)!r} has rank {rank} with {cohort} clients of rank {recipe.rank}, and "
            f"{share:.0%} of the entries of the model, where {most:.0%} is allowed: lower clients.per_round or the "
            f"rank of the adapters{also} or raise max_base_share to {min(1.0, share + 0.01):.2f}"
        )

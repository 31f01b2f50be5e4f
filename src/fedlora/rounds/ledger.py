"""A round in the ledger, computed from what the round hands over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedlora.core import tree
from fedlora.core.byte_counts import ByteCounts, add_up
from fedlora.core.network import Network, Turn, slowest_seconds
from fedlora.core.state import Change, ServerState
from fedlora.recipe import Recipe
from fedlora.rounds.plan import Order, Plan
from fedlora.rounds.uplink import ClientResult, Uplink


@dataclass(frozen=True)
class RoundRecord:
    """A round in the ledger.

    Args:
        round: number of the round in the run, from 1.
        phase: number of its phase, from 0.
        cohort: the clients, in the order of their jobs.
        late: those of them that ran out of time.
        refused: why a client's answer did not count, by its number.
        examples: examples that the cohort trained on, passes counted.
        steps: optimiser steps of the cohort.
        loss: mean training loss over the cohort, clients weighing the same.
        down_bytes: bytes sent to clients by kind: ``adapter``, ``head``, ``init``, ``fold``, ``seed``, ``envelope``.
        up_bytes: bytes that came back by kind; ``report`` carries examples, steps and loss, ``refused`` did not count.
        density_down: share of entries sent that are not zero, over all clients.
        density_up: the same for what came back, over all clients.
        update_norm: Euclidean norm of the change the server applied to what is trained, and of the fold beside.
        references: messages to clients by what they were relative to: ``zero``, ``init``, ``last_round``.
        tiers: of each tier in the cohort its ``down_bytes`` and ``up_bytes`` by kind, and ``clients``, their ``num``.
        seconds: time by part: ``pack``, ``clients``, ``aggregate``, ``evaluate``, ``checkpoint``.
        slowest_seconds: the longest turn of a client in the cohort.
        tier_seconds: the same of each tier.
        network_seconds: what the round takes over the networks that the configuration names: the slowest client's bytes
            and work. The server's own time, waiting for clients that are late, and attempts that failed are left out.
        ranks: of the cohort, where clients give up ranks.
        clip_norm: what updates were clipped to, if they were.
        epsilon: what the run has spent of its clients' privacy so far, if it keeps an account.
        example_epsilon: what it has spent of single examples' privacy, where clients add noise to each.
        metrics: results of evaluations, if there was one after this round.
        facts: figures of a phase's start, in its first row.
        warnings: sentences about silently wrong results.
    """

    round: int
    phase: int
    cohort: tuple[int, ...]
    examples: int
    steps: int
    loss: float
    down_bytes: ByteCounts
    up_bytes: ByteCounts
    density_down: float
    density_up: float
    update_norm: float
    late: tuple[int, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    references: ByteCounts = field(default_factory=dict)
    tiers: dict[str, dict[str, ByteCounts]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    slowest_seconds: float = 0.0
    tier_seconds: dict[str, float] = field(default_factory=dict)
    network_seconds: float | None = None
    ranks: tuple[int, ...] = ()
    clip_norm: float | None = None
    epsilon: float | None = None
    example_epsilon: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def record(
    recipe: Recipe,
    after: ServerState,
    change: Change,
    plan: Plan,
    uplink: Uplink,
    seconds: Mapping[str, float],
    networks: Mapping[str, Network],
) -> RoundRecord:
    """The row of a round.

    Args:
        recipe: what it did.
        after: the state after it.
        change: what the server applied.
        plan: what was sent.
        uplink: what came back.
        seconds: of its parts on the server.
        networks: of each tier by name, and under an empty one of clients without.
    """
    orders, answers, counted = plan.orders, uplink.answers, uplink.counted
    both = list(zip(orders, answers, strict=True))
    entries = tree.num_entries({name: after.params[name] for name in after.schema.sent()})
    figures = {name: sum(one.report.get(name, 0.0) for one in counted) for name in ("examples", "steps", "loss")}
    tiers, tier_seconds = _by_tier(both)
    return RoundRecord(
        round=after.round,
        phase=after.phase,
        cohort=tuple(order.job.client for order in orders),
        late=tuple(answer.client for answer in answers if answer.late),
        refused={str(answer.client): answer.reply.refused for answer in answers if answer.reply.refused},
        examples=int(figures["examples"]),
        steps=int(figures["steps"]),
        loss=figures["loss"] / max(1, len(counted)),
        down_bytes=add_up(order.sizes for order in orders),
        up_bytes=add_up(answer.sizes for answer in answers),
        references=add_up({order.message.reference: 1} for order in orders),
        tiers=tiers,
        density_down=_density((sum(order.message.packet.kept.values()) for order in orders), entries, len(orders)),
        density_up=_density((answer.kept for answer in counted), entries, len(counted)),
        update_norm=math.hypot(tree.norm(change.delta), recipe.tuning.size_of(change.fold)),
        ranks=tuple(order.job.recipe.rank for order in orders if recipe.rank_pruning.reports),
        clip_norm=recipe.privacy.bound,
        slowest_seconds=max((answer.reply.seconds for answer in answers), default=0.0),
        tier_seconds=tier_seconds,
        network_seconds=slowest_seconds(networks, [_turn(*each) for each in both]),
        seconds=dict(seconds),
    )


def _density(kept: Iterable[int], entries: int, num: int) -> float:
    """The share of entries that are not zero, over so many messages."""
    return sum(kept) / entries / max(1, num)


def _turn(order: Order, answer: ClientResult) -> Turn:
    return Turn(order.tier, sum(order.sizes.values()), sum(answer.sizes.values()), answer.reply.seconds)


def _by_tier(both: list[tuple[Order, ClientResult]]) -> tuple[dict[str, dict[str, ByteCounts]], dict[str, float]]:
    """Of each tier its bytes and number of clients, and its longest turn."""
    shares: dict[str, dict[str, ByteCounts]] = {}
    seconds: dict[str, float] = {}
    for order, answer in both:
        if order.tier:
            share = shares.setdefault(order.tier, {})
            for key, counts in (("down_bytes", order.sizes), ("up_bytes", answer.sizes), ("clients", {"num": 1})):
                share[key] = add_up((share.get(key, {}), counts))
            seconds[order.tier] = max(seconds.get(order.tier, 0.0), answer.reply.seconds)
    return shares, seconds

"""The ledger's record of a round, computed from the round's plan, uplink and result."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedlora.core import tree
from fedlora.core.byte_counts import ByteCounts, add_up
from fedlora.core.network import Network, Turn, slowest_seconds
from fedlora.core.schema import Schema
from fedlora.core.state import Change, ServerState
from fedlora.core.tree import Tree
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe import Recipe
from fedlora.rounds.plan import Order, Plan
from fedlora.rounds.uplink import ClientResult, Uplink

_LAYER = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class RoundRecord:
    """A round in the ledger.

    Args:
        round: number of the round in the run, from 1.
        phase: number of its phase, from 0.
        cohort: the clients, in the order of their jobs.
        late: those of them that timed out.
        refused: why a client's reply was rejected, by client number.
        examples: examples processed by the cohort, counted once per epoch.
        steps: optimiser steps of the cohort.
        loss: unweighted mean training loss over the cohort's clients.
        down_bytes: bytes sent to clients by kind: ``adapter``, ``head``, ``init``, ``fold``, ``seed``, ``envelope``.
        up_bytes: bytes received by kind; ``report`` carries examples, steps and loss, ``refused`` was not counted.
        density_down: fraction of non-zero entries in the messages sent, over all clients.
        density_up: the same for the updates received, over all clients; 0 under noise, as it would disclose failures
            and the supports of updates before the noise.
        update_norm: Euclidean norm of the change applied by the server to the trained parameters and of the fold.
        update_norms: Euclidean norm of that change by layer; tensors outside numbered layers are grouped as ``head`` or
            ``other``.
        references: number of messages to clients by reference: ``zero``, ``init``, ``last_round``.
        tiers: of each tier in the cohort its ``down_bytes`` and ``up_bytes`` by kind, and ``clients``, their ``num``.
        seconds: time by part on the server: ``pack``, ``clients`` (waiting for them), ``aggregate``, ``evaluate``.
        slowest_seconds: the longest client turn in the cohort.
        tier_seconds: the same for each tier.
        network_seconds: modelled duration of the round over the configured networks: transfer and work of the slowest
            client. Excludes the server's own time, waiting for late clients, and failed attempts.
        ranks: ranks of the cohort's clients, if clients prune ranks.
        clip_norm: the clipping bound of the updates, if they were clipped.
        epsilon: client-level privacy budget spent so far, if the run keeps a privacy account.
        example_epsilon: example-level privacy budget spent so far, if clients add noise per example.
        metrics: results of evaluations, if there was one after this round.
        facts: figures of a phase's start, in its first row.
        warnings: sentences about silently wrong results.
        stopped: why the run ended after this round, before its last one; empty if it did not.
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
    update_norms: dict[str, float] = field(default_factory=dict)
    stopped: str = ""

    @property
    def reported_loss(self) -> float | None:
        """``loss``, None where no client reported any: before the first round, under noise, or if all failed."""
        return self.loss if self.steps else None


def record(
    recipe: Recipe,
    after: ServerState,
    change: Change,
    plan: Plan,
    uplink: Uplink,
    seconds: Mapping[str, float],
    networks: Mapping[str, Network],
) -> RoundRecord:
    """The ledger record of a round.

    Args:
        recipe: the recipe of the round.
        after: the state after it.
        change: the change applied by the server.
        plan: the orders sent.
        uplink: the results received.
        seconds: durations of its parts on the server.
        networks: the network of each tier by name; under an empty name, that of clients without a tier.
    """
    disclosed = disclosure_of(recipe).failures
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
        density_up=_density((answer.kept for answer in counted), entries, len(counted)) if disclosed else 0.0,
        update_norm=math.hypot(tree.norm(change.delta), recipe.tuning.size_of(change.fold, after.params)),
        update_norms=_norms_by_layer(after.schema, change.delta),
        ranks=tuple(order.job.recipe.rank for order in orders if recipe.rank_pruning.reports),
        clip_norm=recipe.privacy.bound,
        slowest_seconds=max((answer.reply.seconds for answer in answers), default=0.0),
        tier_seconds=tier_seconds,
        network_seconds=slowest_seconds(networks, [_turn(*each) for each in both]),
        seconds=dict(seconds),
        warnings=tuple(uplink.warnings),
    )


def _norms_by_layer(schema: Schema, delta: Tree) -> dict[str, float]:
    """The norm of the tensors of each layer, where a layer is the part of a name up to its first number."""
    squares: dict[str, float] = {}
    for name, value in delta.items():
        found = _LAYER.match(name)
        layer = found[0] if found else "head" if schema[name].group == "head" else "other"
        squares[layer] = squares.get(layer, 0.0) + tree.norm({name: value}) ** 2
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def _density(kept: Iterable[int], entries: int, num: int) -> float:
    """The fraction of non-zero entries over ``num`` messages."""
    return sum(kept) / entries / max(1, num)


def _turn(order: Order, answer: ClientResult) -> Turn:
    return Turn(order.tier, sum(order.sizes.values()), sum(answer.sizes.values()), answer.reply.seconds)


def _by_tier(both: list[tuple[Order, ClientResult]]) -> tuple[dict[str, dict[str, ByteCounts]], dict[str, float]]:
    """Bytes and number of clients of each tier, and the longest client turn of each."""
    shares: dict[str, dict[str, ByteCounts]] = {}
    seconds: dict[str, float] = {}
    for order, answer in both:
        if order.tier:
            share = shares.setdefault(order.tier, {})
            for key, counts in (("down_bytes", order.sizes), ("up_bytes", answer.sizes), ("clients", {"num": 1})):
                share[key] = add_up((share.get(key, {}), counts))
            seconds[order.tier] = max(seconds.get(order.tier, 0.0), answer.reply.seconds)
    return shares, seconds

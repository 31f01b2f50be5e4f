"""The server's half of a round: read this first, ``client.py`` next.

params -> down: sparsify -> round -> pack -> BYTES -> (client) -> BYTES -> unpack -> aggregate -> noise -> server step
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from fedlora import tree
from fedlora.arrival import Answer, read_reply
from fedlora.downlink import Downlink, Message
from fedlora.engines.base import Engine
from fedlora.errors import QuorumError, TrainingError
from fedlora.folds import extended
from fedlora.jobs import Job, empty_report
from fedlora.network import Network, Turn, slowest_seconds
from fedlora.privacy import CentralGaussian
from fedlora.recipe import Recipe, init_of
from fedlora.shrink import without_ranks
from fedlora.state import Change, ClientState, Fold, ServerState, Update, named_seed
from fedlora.tiers import Tier, recipes_of
from fedlora.transport.link import split_groups

Kinds = dict[str, int]


@dataclass(frozen=True)
class Row:
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
    down_bytes: Kinds
    up_bytes: Kinds
    density_down: float
    density_up: float
    update_norm: float
    late: tuple[int, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    references: Kinds = field(default_factory=dict)
    tiers: dict[str, dict[str, Kinds]] = field(default_factory=dict)
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


def run_round(
    recipe: Recipe,
    state: ServerState,
    cohort: tuple[int, ...],
    engine: Engine,
    seed: int,
    rounds: int,
    tiers: Mapping[int, Tier] | None = None,
    expected: int | None = None,
    networks: Mapping[str, Network] | None = None,
) -> tuple[ServerState, Row]:
    """One round.

    Args:
        recipe: what to do.
        state: the state before it.
        cohort: who takes part.
        engine: where clients run.
        seed: seed of the run.
        rounds: rounds of the whole run, for schedules.
        tiers: the tier of each client, if there are tiers.
        expected: how many clients a round has on average, where chance decides; what private sums are divided by.
        networks: of each tier by name, and under an empty one of clients without, to tell how long the round takes.

    Returns:
        The state after the round, and the round's row of the ledger.

    Raises:
        WireError: a reply of this process is not of the expected form; others' are refused.
        QuorumError: fewer clients than the engine is to have answered; nothing has changed.
        TrainingError: a client's training went wrong.
    """
    clock = time.perf_counter()
    if recipe.privacy.adapts:
        recipe = replace(recipe, privacy=recipe.privacy.at(state.clip_norm))
    tiers = tiers or {}
    recipes = {"": recipe, **recipes_of({client: tiers[client] for client in cohort if client in tiers}, recipe)}
    downlinks: dict[tuple[str, int | None], Downlink] = {}
    names = [tiers[client].name if client in tiers else "" for client in cohort]
    jobs: list[Job] = []
    down: Kinds = {}
    references: Kinds = {}
    messages: list[Message] = []
    shares: dict[str, dict[str, Kinds]] = {}
    given: list[int] = []
    for client, name in zip(cohort, names, strict=True):
        memory = state.clients.get(client, ClientState())
        rank = state.ranks.get(client)
        own = recipes[name] if rank is None else recipes[name].of_rank(rank)
        downlink = downlinks.setdefault((name, rank), Downlink(own, state, seed))
        message = downlink.message(state.held.get(client, {}), memory.folds.version)
        messages.append(message)
        job = Job(
            recipe=own,
            client=client,
            phase=state.phase,
            round=state.steps,
            progress=(state.round, rounds),
            seed=named_seed(seed, "client", state.round, client),
            base=recipe.local.compute,
            payload=message.packet.raw,
            setup=None if memory.has_setup else state.setup,
            fold=message.fold,
            memory=memory,
        )
        jobs.append(job)
        received = _sum(message.sizes, {} if memory.has_setup else state.setup_bytes)
        down = _sum(down, received)
        given.append(sum(received.values()))
        if name:
            _count(shares, name, "down_bytes", received)
        references = _sum(references, {message.reference: 1})
    packed = time.perf_counter()

    like = split_groups(state.params, state.groups) | {"report": empty_report(recipe)}
    answers: list[Answer] = []

    def updates() -> Iterator[Update]:
        for job, message, reply in zip(jobs, messages, engine.run(jobs), strict=True):
            answer, delta = read_reply(job, reply, like, state.groups, engine.trusted, engine.most_examples(job.client))
            answers.append(answer)  # what a cohort sent is never held together
            if delta is None:
                continue
            delta = recipe.privacy.clip(delta)  # rounding may have made it longer, or a client that was not ours
            start = message.start
            if job.recipe.shrink:
                start = without_ranks(start, int(answer.report["rank"]))
            yield Update(start, delta, answer.report.get("examples", 0.0))
        # what was given under noise has been given, and counts
        noisy = recipe.privacy.needs_uniform_mean or recipe.local.example_privacy
        if sum(answer.counts for answer in answers) < min(engine.min_clients, len(jobs)) and not noisy:
            refused = frozenset(answer.client for answer in answers if answer.reply.refused)
            raise QuorumError(_too_few(answers, engine.min_clients), refused)

    arriving = updates()
    first = list(islice(arriving, 1))
    if first or (jobs and not recipe.privacy.needs_uniform_mean):
        change = recipe.aggregator.combine(_released(first, arriving), state.params)
    else:  # under noise nobody's silence may show
        change = Change(tree.zeros_like(state.params), Fold())
    # what no client may move tells nothing of their data, and noise must not move it either
    moving = {name: value for name, value in change.delta.items() if not recipe.tuning.still(name, state.steps)}
    told = [answer for answer in answers if answer.counts]
    if recipe.privacy.needs_uniform_mean:  # the noise is that of a sum over as many clients as were to answer
        moving = tree.scale(moving, len(told) / (expected or len(jobs)))
    delta = change.delta | recipe.privacy.noise(moving, expected or len(jobs), state.round)
    rates = recipe.server.rates(state.groups, recipe.tuning.factor_of, (state.round, rounds))
    params, slots = recipe.server.step(state.params, delta, state.slots, state.steps, rates)
    if recipe.prune:
        params, slots = recipe.prune.apply(params, slots, state.groups, state.steps + 1)
    folds, init = state.folds, state.init
    if change.fold:
        folds = extended(folds, change.fold)
    if recipe.aggregator.reinitialises:
        init = init_of(recipe, init, named_seed(seed, "start", state.phase), state.steps + 1)
        params |= {name: value for name, value in init.items() if state.groups[name] == "adapter"}
    if not tree.is_finite(params | folds.total):
        raise TrainingError("the server's parameters are not finite after this round; lower the server's lr")
    ranks = {answer.client: int(answer.report["rank"]) for answer in told if answer.report.get("rank")}
    clients = dict(state.clients)
    for answer in answers:
        memory = answer.reply.memory
        if memory.folds.version == state.folds.version:  # the same bits, held once for all
            memory = replace(memory, folds=replace(state.folds, recent=()))
        # a client that remembers nothing takes no room
        if memory != ClientState() or answer.client in clients:
            clients[answer.client] = memory
    held = dict(state.held)
    if recipe.memory == "last_round":
        for answer, message in zip(answers, messages, strict=True):
            if answer.reply.heard:
                held[answer.client] = message.start
            elif answer.reply.refused:
                held.pop(answer.client, None)
    after = replace(
        state,
        round=state.round + 1,
        steps=state.steps + 1,
        params=params,
        slots=slots,
        init=init,
        folds=folds,
        clip_norm=recipe.privacy.adapted(
            sum(answer.report.get("below", 0.0) for answer in told), len(told), expected or len(jobs), state.round
        ),
        feedback=next((downlink.feedback for downlink in downlinks.values()), state.feedback),
        ranks={**state.ranks, **ranks},
        held=held,
        clients=clients,
    )
    tier_seconds: dict[str, float] = {}
    for name, answer in zip(names, answers, strict=True):
        if name:
            tier_seconds[name] = max(tier_seconds.get(name, 0.0), answer.reply.seconds)
            _count(shares, name, "up_bytes", answer.sizes)
            _count(shares, name, "clients", {"num": 1})
    turns = [
        Turn(name, size, sum(answer.sizes.values()), answer.reply.seconds)
        for name, size, answer in zip(names, given, answers, strict=True)
    ]
    done = time.perf_counter()
    working = sum(answer.reply.seconds for answer in answers)
    entries = tree.num_entries(params)
    row = Row(
        round=after.round,
        phase=state.phase,
        cohort=cohort,
        late=tuple(answer.client for answer in answers if answer.late),
        refused={str(answer.client): answer.reply.refused for answer in answers if answer.reply.refused},
        examples=int(sum(answer.report.get("examples", 0.0) for answer in told)),
        steps=int(sum(answer.report.get("steps", 0.0) for answer in told)),
        loss=sum(answer.report.get("loss", 0.0) for answer in told) / max(1, len(told)),
        down_bytes=down,
        up_bytes=_sum(*(answer.sizes for answer in answers)),
        references=references,
        tiers=shares,
        density_down=sum(sum(message.packet.kept.values()) for message in messages) / entries / max(1, len(messages)),
        density_up=sum(answer.kept for answer in told) / entries / max(1, len(told)),
        update_norm=math.hypot(tree.norm(delta), recipe.tuning.size_of(change.fold)),
        ranks=tuple(job.recipe.rank for job in jobs) if recipe.shrink else (),
        clip_norm=recipe.privacy.clip_norm if isinstance(recipe.privacy, CentralGaussian) else None,
        slowest_seconds=max((answer.reply.seconds for answer in answers), default=0.0),
        tier_seconds=tier_seconds,
        network_seconds=slowest_seconds(networks or {}, turns),
        seconds={"pack": packed - clock, "clients": working, "aggregate": done - packed - working},
    )
    return after, row


def _released(first: list[Update], others: Iterator[Update]) -> Iterator[Update]:
    """All of them in order; none is held on to."""
    while first:
        yield first.pop()
    yield from others


def _too_few(answers: list[Answer], least: int) -> str:
    """What to say where a round has too few answers."""
    silent = [answer for answer in answers if not answer.counts]
    why = "; ".join(f"client {answer.client}: {answer.reply.refused or 'out of time'}" for answer in silent[:3])
    return f"{len(answers) - len(silent)} of {len(answers)} clients answered, and {least} must ({why})"


def _count(shares: dict[str, dict[str, Kinds]], tier: str, what: str, sizes: Kinds) -> None:
    share = shares.setdefault(tier, {})
    share[what] = _sum(share.get(what, {}), sizes)


def _sum(*sizes: Mapping[str, int]) -> Kinds:
    total: Kinds = {}
    for part in sizes:
        for kind, size in part.items():
            total[kind] = total.get(kind, 0) + size
    return total

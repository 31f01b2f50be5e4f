"""The life of an update on the server: start reading here, then ``client/turn.py``.

params -> plan: sparsify, round, pack -> BYTES -> (client) -> BYTES -> uplink: unpack, check -> aggregate -> cover with
noise -> advance: server step, pruning, base update, new start -> record
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedlora.core import tree
from fedlora.core.errors import ConfigError, DivergedError, shown
from fedlora.core.network import Network
from fedlora.core.slots import kind_of
from fedlora.core.state import Change, ClientState, Fold, ServerState, named_seed
from fedlora.core.store import Memory, Store
from fedlora.engines.base import Engine
from fedlora.population.tiers import Tier
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe import Recipe
from fedlora.recipe.recipe import restarted
from fedlora.rounds.ledger import RoundRecord, record
from fedlora.rounds.outliers import Outliers
from fedlora.rounds.plan import Plan, make_plan
from fedlora.rounds.uplink import Uplink
from fedlora.server.optimizers import take_step
from fedlora.transport.base_updates import extended

OUTSTANDING = 10.0
"""Ratio to the median norm above which an update explains why most clients cannot train after it."""


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
) -> tuple[ServerState, RoundRecord]:
    """One round.

    Args:
        recipe: the recipe of the phase.
        state: the state before it.
        cohort: the participating clients.
        engine: where clients run.
        seed: seed of the run.
        rounds: total number of rounds of the run, for schedules.
        tiers: the tier of each client, if there are tiers.
        expected: the expected cohort size, if the cohort is randomly sampled; the denominator of private sums.
        networks: the network of each tier by name (under an empty name, that of clients without a tier), to model the
            duration of the round.

    Returns:
        The state after the round, and the round's row of the ledger.

    Raises:
        WireError: a reply of this process is not of the expected form; replies of other processes are rejected instead.
        QuorumError: fewer clients replied than the engine requires; the state is unchanged.
        TrainingError: a client's training failed.
        DivergedError: nobody can train from the state, or the next one is not finite.
    """
    begun = time.perf_counter()
    if recipe.privacy.adapts:
        recipe = replace(recipe, privacy=recipe.privacy.at(state.parts.value("clip", "norm")))
    nominal = expected or len(cohort)
    plan = make_plan(recipe, state, cohort, tiers or {}, seed, rounds)
    planned = time.perf_counter()
    uplink = Uplink(recipe, plan, state.schema, engine, Outliers(recipe, state.parts.store("norms")))
    change = aggregate(recipe, state, uplink)
    covered = cover(recipe, state, change, len(uplink.counted), nominal)
    after = advance(recipe, state, covered, plan, uplink, seed, rounds, nominal)
    waited = uplink.waited
    seconds = {"pack": planned - begun, "clients": waited, "aggregate": time.perf_counter() - planned - waited}
    return after, record(recipe, after, covered, plan, uplink, seconds, networks or {})


def aggregate(recipe: Recipe, state: ServerState, uplink: Uplink) -> Change:
    """Aggregates the cohort's updates; each is added as it is received.

    Raises:
        QuorumError: see ``Uplink.check_quorum``.
        TrainingError: the aggregator received too few updates, or no client's training moved anything.
        ConfigError: what it made of them is no change of these parameters.
        DivergedError: see ``check_state``.
    """
    schema, store = state.schema.sent(), state.parts.store("aggregator")
    params = {name: state.params[name] for name in schema}
    accumulator = recipe.aggregator.begin(params, schema, store)
    for update in uplink.updates(params):
        accumulator.add(update)
        del update  # it would stay in memory while the next client trains
    accumulator.refused = uplink.outliers.refused
    check_state(state, uplink)
    uplink.check_quorum()
    uplink.check_moved(params, state.init)
    visible = bool(uplink.answers) and disclosure_of(recipe).absence
    if uplink.counted or (visible and not uplink.skips(state.parts.value("norms", "longest"))):
        change = accumulator.finish()
        if not (isinstance(change, Change) and isinstance(change.fold, Fold) and isinstance(change.store, Store)):
            raise ConfigError(
                f"the aggregator {kind_of(recipe.aggregator)!r} returned {shown(change)}, but Change(delta, Fold()) "
                "was expected, with a Store if it keeps a state: correct its class"
            )
        check_form(f"the change of the aggregator {kind_of(recipe.aggregator)!r}", change.delta, params)
        return change
    return Change(tree.zeros_like(params), Fold(), store)


def check_form(what: str, given: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Rejects a tree of other names, shapes or types, as a class of the user's own may return it.

    Raises:
        ConfigError: naming the first such tensor; tensors of other shapes would be broadcast in silence.
    """
    for name in dict.fromkeys((*like, *given)):
        forms = [f"{tuple(one[name].shape)} in {one[name].dtype}" if name in one else "none" for one in (given, like)]
        if forms[0] != forms[1]:
            raise ConfigError(
                f"{what} has for {name!r} a tensor of the form {forms[0]}, but {forms[1]} was expected: correct its "
                "class"
            )


def check_state(state: ServerState, uplink: Uplink) -> None:
    """Rejects a state from which most of a cohort cannot train, if one update of the round before it explains that.

    Raises:
        DivergedError: training failed on more than half of the cohort, and either nobody replied with an update, or the
            longest update of the previous round was ``OUTSTANDING`` times as long as the median one.
    """
    longest = state.parts.value("norms", "longest")
    if not longest or not uplink.diverged:
        return
    client, norm, median = longest
    if not uplink.counted or norm > OUTSTANDING * median:
        why = next(answer.reply.refused for answer in uplink.answers if answer.reply.failed)
        text = f"most clients cannot train on the model after round {state.round} ({why})"
        raise DivergedError(text, (client, norm), recorded=True)


def cover(recipe: Recipe, state: ServerState, change: Change, answered: int, nominal: int) -> Change:
    """Adds the recipe's privacy noise to the change, on exactly the parameters that clients may change.

    Args:
        recipe: the recipe of the phase.
        state: the state before the round.
        change: the mean over the clients that replied.
        answered: the number of these clients.
        nominal: the denominator of sums.
    """
    roles = recipe.tuning.in_round(state.schema, state.steps)
    moving = {name: value for name, value in change.delta.items() if roles[name].role != "frozen"}
    return change._replace(delta=change.delta | recipe.privacy.cover(moving, answered, nominal, state.round))


def advance(
    recipe: Recipe,
    state: ServerState,
    change: Change,
    plan: Plan,
    uplink: Uplink,
    seed: int,
    rounds: int,
    nominal: int,
) -> ServerState:
    """The state after a round: server step, pruning, base update, new start, and client states.

    Raises:
        DivergedError: a parameter is not finite.
        ConfigError: the server's step gives other parameters than it was given.
    """
    shared = {name: state.params[name] for name in change.delta}
    servers, slots = (recipe.server, recipe.server_head), state.parts.store("server").trees
    stepped, slots = take_step(servers, shared, change.delta, slots, state.steps, state.schema, (state.round, rounds))
    check_form(f"the step of the server {kind_of(recipe.server)!r}", stepped, shared)
    stepped, slots = recipe.pruning.apply(stepped, slots, state.schema, state.steps + 1)
    folds = extended(state.folds, change.fold) if change.fold else state.folds
    anew = restarted(recipe, state.schema, state.init, named_seed(seed, "start", state.phase), state.steps + 1)
    params = state.params | stepped | anew
    if not tree.is_finite(params | folds.total):
        text = "the server's parameters are not finite after this round; lower the server's lr"
        raise DivergedError(text, uplink.longest)
    below = sum(answer.report.get("below", 0.0) for answer in uplink.counted)
    clip = recipe.privacy.adapted(below, len(uplink.counted), nominal, state.round)
    stores = {
        "server": Store(slots),
        "base": folds.store(),
        "clip": Store(values={"norm": clip}),
        "down": Store({"lost": plan.lost}),
        "aggregator": change.store,
        "norms": uplink.outliers.store([answer.client for answer in uplink.answers]),
    }
    return replace(
        state,
        round=state.round + 1,
        steps=state.steps + 1,
        params=params,
        init=state.init | anew,
        parts=state.parts.having(stores),
        known=_known(recipe, state, plan, uplink),
        clients=_clients(state, uplink),
    )


def _known(recipe: Recipe, state: ServerState, plan: Plan, uplink: Uplink) -> dict[int, Memory]:
    """The server's record of each client: its rank, and the parameters that it holds."""
    known = dict(state.known)
    for order, answer in zip(plan.orders, uplink.answers, strict=True):
        stores = {}
        if answer.counts and answer.report.get("rank"):
            stores["rank"] = Store(values={"rank": int(answer.report["rank"])})
        if recipe.memory == "last_round" and (answer.reply.delivered or answer.reply.refused):
            stores["down"] = Store({"held": order.message.start if answer.reply.delivered else {}})
        known[answer.client] = known.get(answer.client, Memory()).having(stores)
    return {client: memory for client, memory in known.items() if memory}


def _clients(state: ServerState, uplink: Uplink) -> dict[int, ClientState]:
    """The stored client states; empty ones take no space."""
    clients = dict(state.clients)
    shared = replace(state.folds, recent=()).store()  # identical for all clients, so stored once
    for answer in uplink.answers:
        memory = answer.reply.memory
        if memory.folds.version == state.folds.version:
            memory = replace(memory, parts=memory.parts.having({"base": shared}))
        if memory or answer.client in clients:
            clients[answer.client] = memory
    return clients

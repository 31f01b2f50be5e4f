"""Estimates a run's communication in advance: runs its first rounds with few clients and extrapolates the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData
from fedlora.config.places import located_adapter
from fedlora.core import tree
from fedlora.core.byte_counts import ByteCounts, add_up, mean, rounded, scaled
from fedlora.core.network import Network
from fedlora.core.progress import counted
from fedlora.core.slots import kind_of
from fedlora.core.state import Folds, ServerState, named_seed
from fedlora.core.store import EMPTY, Memory
from fedlora.core.tree import Tree
from fedlora.engines import Serial
from fedlora.population.clients import draw_cohort
from fedlora.population.tiers import recipes_of
from fedlora.privacy.accountant import SamplingScheme, open_account
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.modes import MODES
from fedlora.rounds.downlink import Downlink
from fedlora.rounds.phases import close_phase, open_phase
from fedlora.rounds.round import run_round
from fedlora.transport import TopK
from fedlora.transport.base_updates import message
from fedlora.tuning import LoRA

PROBED_ROUNDS = 6
PROBED_CLIENTS = 6


class TierCost(NamedTuple):
    """The cost of a round for a client of a tier.

    Args:
        down_bytes: bytes sent to it, the mean over rounds.
        up_bytes: bytes received from it, the mean over rounds.
        steps: optimiser steps of the longest turn.
        work_seconds: duration of the longest turn.
    """

    down_bytes: float
    up_bytes: float
    steps: int
    work_seconds: float

    def work(self, step_seconds: float | None) -> float:
        """Seconds of a turn, computed from its steps or as measured."""
        return self.work_seconds if step_seconds is None else self.steps * step_seconds


@dataclass(frozen=True)
class PhaseCost:
    """The communication cost of one phase.

    Args:
        rounds: its rounds.
        tuning: the kind of its tuning.
        clients: clients per round to which messages are sent; 0 if nothing is sent.
        first_bytes: bytes to one client in the first round, by kind.
        down_bytes: bytes to one client in a round, by kind; the mean over all rounds and clients.
        up_bytes: bytes from one client in a round, by kind; the same mean.
        tiers: for each tier (for all clients under an empty name): a mean client's bytes, and the longest measured
            turn, in steps and in seconds on this machine.
    """

    rounds: int
    tuning: str
    clients: int
    first_bytes: ByteCounts
    down_bytes: ByteCounts
    up_bytes: ByteCounts
    tiers: dict[str, TierCost]

    @property
    def round_bytes(self) -> tuple[int, int]:
        """Mean bytes of a round over all clients, down and up."""
        return self.clients * sum(self.down_bytes.values()), self.clients * sum(self.up_bytes.values())

    def round_seconds(self, networks: Mapping[str, Network], step_seconds: float | None) -> float:
        """Mean duration of a round over the given networks: that of the slowest tier.

        Args:
            networks: the network of each tier; under an empty name, that of clients without a tier.
            step_seconds: duration of an optimiser step; if None, the longest measured turn is used.
        """
        return max(self.tier_seconds(name, networks, step_seconds) for name in self.tiers)

    def tier_seconds(self, name: str, networks: Mapping[str, Network], step_seconds: float | None) -> float:
        """Mean duration of a turn of a tier's client; arguments as for ``round_seconds``."""
        tier = self.tiers[name]
        work = tier.work(step_seconds)
        return networks[name].seconds(tier.down_bytes, tier.up_bytes, work) if self.clients else work

    @property
    def all_bytes(self) -> tuple[int, int]:
        """Total bytes of all rounds over all clients, down and up."""
        down, up = self.round_bytes
        return down * self.rounds, up * self.rounds


def costs(experiment: Experiment, data: FederatedData) -> list[PhaseCost]:
    """The estimated communication of each phase.

    Under sparsification or quantization, the size of a message depends on its values. Therefore the first
    ``PROBED_ROUNDS`` rounds of each phase are actually run, with at most ``PROBED_CLIENTS`` clients. Later downlinks
    are built from parameters extrapolated in the same direction, by the square root of the number of rounds; later
    uplinks are taken to be like the last ones, and rank pruning by clients is not predicted. Whether a client is new to
    the run is random, so the expected number of bytes is used.

    Args:
        experiment: the configuration.
        data: its data.

    Raises:
        TrainingError: training already fails in these rounds.
    """
    return _Costs(experiment, data).of_phases()


class _Sizes(NamedTuple):
    """Bytes by kind of a message to a client new to the phase, and to a client that is not."""

    new: ByteCounts
    known: ByteCounts


@dataclass
class _Tier:
    """The measurements of a tier in a phase; of all clients if there are no tiers."""

    recipe: Recipe
    clients: tuple[int, ...]  # those that are run
    weight: float  # fraction of all clients
    down: list[tuple[int, _Sizes]] = field(default_factory=list)  # bytes to one client, for some rounds
    up: list[dict[str, float]] = field(default_factory=list)  # bytes from one client, for each round
    seconds: float = 0.0  # the longest turn


class _Costs:
    """Estimates a phase's cost in three steps: probe the first rounds, extrapolate the later ones, and sum."""

    def __init__(self, experiment: Experiment, data: FederatedData) -> None:
        self._experiment, self._data = experiment, data
        self._workspace = Workspace(data.task, experiment.seed, data.device, experiment.deterministic)
        self._sends = MODES[experiment.mode].sends
        clients = experiment.clients
        self._per_round = clients.per_round if self._sends else 1
        sampled = SamplingScheme(len(data.population), self._per_round, clients.sampling)
        _, self._phases = open_account(experiment.phases, sampled)
        private = any(phase.recipe.privacy.needs_uniform_mean for phase in self._phases)
        self._expected = self._per_round if private else None  # so that the noise is as small as in the run
        least = max(PROBED_CLIENTS, *(phase.recipe.aggregator.min_updates for phase in self._phases))
        self._probed = _probed(data, experiment.seed, min(least, self._per_round))
        self._share = self._per_round / len(data.population)

    def of_phases(self) -> list[PhaseCost]:
        """The estimated communication of each phase."""
        found, carry, done = [], None, 0
        for number, phase in enumerate(self._phases):
            adapter = None if number else located_adapter(self._experiment)
            state, _ = open_phase(self._workspace, number, phase.recipe, self._experiment.seed, done, carry, adapter)
            recipes = recipes_of(self._data.tiers, phase.recipe) or {"": phase.recipe}
            tiers = {name: _Tier(own, self._probed[name], _share(self._data, name)) for name, own in recipes.items()}
            state, change = self._probe(phase, state, tiers)
            self._extrapolate(phase, state, change, tiers)
            found.append(self._sum(phase, tiers))
            done += phase.rounds
            if number + 1 < len(self._phases):
                carry = close_phase(self._workspace, phase.recipe, state)
        return found

    def _measure(self, turn: int, states: Mapping[str, ServerState], tiers: Mapping[str, _Tier]) -> None:
        """Adds the messages of a round, built from the state of each tier."""
        # the ranks of a cohort in which each tier has its share
        ranks = [one.recipe.rank for one in tiers.values() for _ in range(max(1, round(one.weight * self._per_round)))]
        for name, one in tiers.items():
            sizes = _sizes(one.recipe, states[name], self._experiment.seed, one.clients, self._share, ranks)
            one.down.append((turn, sizes))

    def _probe(self, phase: Phase, state: ServerState, tiers: Mapping[str, _Tier]) -> tuple[ServerState, Tree]:
        """Runs the first rounds; returns the state after them and the change made by the last one."""
        experiment, data = self._experiment, self._data
        engine = Serial(self._workspace, data.population)
        cohort = tuple(client for members in self._probed.values() for client in members)
        change: Tree = {}
        for turn in counted(range(min(phase.rounds, PROBED_ROUNDS))):
            self._measure(turn, dict.fromkeys(tiers, state), tiers)
            before = state
            state, row = run_round(
                phase.recipe, state, cohort, engine, experiment.seed, experiment.rounds, data.tiers, self._expected
            )
            change = tree.subtract(state.params, before.params)
            for name, seconds in (row.tier_seconds or {"": row.slowest_seconds}).items():
                tiers[name].seconds = max(tiers[name].seconds, seconds)
            sent = {name: tier["up_bytes"] for name, tier in row.tiers.items()} or {"": row.up_bytes}
            for name, sizes in sent.items():
                tiers[name].up.append({kind: size / len(tiers[name].clients) for kind, size in sizes.items()})
        return state, change

    def _extrapolate(self, phase: Phase, state: ServerState, change: Tree, tiers: Mapping[str, _Tier]) -> None:
        """Adds the messages of the rounds after the probe."""
        for turn in _later(state.steps, phase.rounds):
            self._measure(turn, {name: _grown(one.recipe, state, turn) for name, one in tiers.items()}, tiers)
        ratios = {name: _ratios(one.recipe, state, change, phase.rounds) for name, one in tiers.items()}
        same = all(ratio == 1 for each in ratios.values() for ratio in each)
        for name, one in tiers.items():
            last = mean(one.up[len(one.up) // 2 :]) if same else one.up[-1]
            one.up += [scaled(last, ratio) for ratio in ratios[name]]

    def _sum(self, phase: Phase, tiers: Mapping[str, _Tier]) -> PhaseCost:
        """Aggregates over rounds and tiers."""
        curves = {name: _over_rounds(one.down, phase.rounds, self._share) for name, one in tiers.items()}
        down = [
            add_up(scaled(curves[name][turn], one.weight) for name, one in tiers.items())
            for turn in range(phase.rounds)
        ]
        got = {name: sum(mean(curve).values()) for name, curve in curves.items()}
        up = {name: mean(one.up) for name, one in tiers.items()}
        steps = {name: _most_steps(one.recipe, one.clients, self._data) for name, one in tiers.items()}
        found = {
            name: TierCost(got[name], sum(up[name].values()), steps[name], one.seconds) for name, one in tiers.items()
        }
        alone = PhaseCost(phase.rounds, kind_of(phase.recipe.tuning), 0, {}, {}, {}, found)
        if not self._sends:
            return alone
        return dataclasses.replace(
            alone,
            clients=self._per_round,
            first_bytes=rounded(down[0]),
            down_bytes=rounded(mean(down)),
            up_bytes=rounded(add_up(scaled(up[name], one.weight) for name, one in tiers.items())),
        )


def _most_steps(recipe: Recipe, clients: Sequence[int], data: FederatedData) -> int:
    """Optimiser steps of the longest turn among the probed clients; computed, as under noise they are not reported."""
    return max(recipe.local.num_steps(len(data.population.rows_of(client))) for client in clients)


def _probed(data: FederatedData, seed: int, most: int) -> dict[str, tuple[int, ...]]:
    """A few clients of each tier, by tier name; without tiers, of all clients under an empty name."""
    order = draw_cohort(data.population, len(data.population), named_seed(seed, "probe"))
    names = {client: tier.name for client, tier in data.tiers.items()}
    members: dict[str, list[int]] = {}
    for client in order:
        members.setdefault(names.get(client, ""), []).append(client)
    return {name: tuple(clients[:most]) for name, clients in members.items()}


def _share(data: FederatedData, tier: str) -> float:
    """The fraction of clients in a tier; 1 without tiers."""
    members = [each.name for each in data.tiers.values()]
    return members.count(tier) / len(members) if members else 1.0


def _folds(recipe: Recipe, state: ServerState, ranks: Sequence[int]) -> Folds:
    """Folds of the sizes that full cohorts would have produced by now; their values do not matter."""
    pairs = state.schema.pairs
    moving = recipe.tuning.train if isinstance(recipe.tuning, LoRA) else "both"
    most = max((len(state.params[a]) for a, _, _ in pairs), default=0)
    rank = recipe.aggregator.fold_rank([min(rank, most) for rank in ranks], moving) if pairs else 0
    if not rank:
        return Folds()
    fold: Tree = {}
    total: Tree = {}
    for a, b, name in pairs:
        rows, columns = len(state.params[b]), state.params[a].shape[1]
        fold |= {f"{name}.B": torch.ones(rows, rank), f"{name}.A": torch.ones(rank, columns)}
        total[name] = torch.ones(rows, columns)
    most = (tree.num_entries(total) - 1) // tree.num_entries(fold)
    return Folds(state.steps, total, (fold,) * min(most, state.steps))


def _sizes(
    recipe: Recipe, state: ServerState, seed: int, clients: Sequence[int], share: float, ranks: Sequence[int]
) -> _Sizes:
    folds = _folds(recipe, state, ranks)
    downlink = Downlink(recipe, dataclasses.replace(state, parts=state.parts.having({"base": EMPTY})), seed)
    whole = downlink.message({}).sizes
    new = add_up([whole, state.setup_bytes, _fold_bytes(folds, 0)])
    if recipe.memory == "none":
        return _Sizes(new, new)
    known = (state.known.get(client, Memory()).tree("down", "held") for client in clients)
    held = [downlink.message(params).sizes for params in known if params]
    # the number of rounds that a client missed is random too
    behind = range(1, min(folds.version, len(folds.recent) + 1) + 1)
    missed = [share * (1 - share) ** (rounds - 1) for rounds in behind]
    missed[-1:] = [1 - sum(missed[:-1])] if missed else []
    lacking = add_up(
        scaled(_fold_bytes(folds, folds.version - gone), chance) for chance, gone in zip(missed, behind, strict=True)
    )
    return _Sizes(new, rounded(add_up([mean(held or [whole]), lacking])))


def _fold_bytes(folds: Folds, version: int) -> ByteCounts:
    update = message(folds, version)
    return update.sizes if update else {}


def _later(done: int, rounds: int) -> list[int]:
    """Rounds whose messages are built: the first, the last, and a few in between, to follow schedules."""
    return (
        sorted({round(turn) for turn in np.linspace(done, rounds - 1, 9)} - set(range(done))) if done < rounds else []
    )


def _grown(recipe: Recipe, state: ServerState, turn: int) -> ServerState:
    """The state before a later round of the phase, with parameters extrapolated by the square root of the rounds."""
    growth = math.sqrt(turn / state.steps) - 1.0
    moved = tree.add(state.params, tree.subtract(state.params, state.init), growth)
    moved |= {n: torch.where(kept, moved[n], 0.0) for n, kept in recipe.pruning.kept(state.params, state.steps).items()}
    for steps in range(state.steps + 1, turn + 1):
        moved, _ = recipe.pruning.apply(moved, {}, state.schema, steps)
    return dataclasses.replace(state, params=moved, steps=turn, round=state.round + turn - state.steps)


def _ratios(recipe: Recipe, state: ServerState, change: Tree, rounds: int) -> list[float]:
    """Upload size of each later round relative to the last probed round, under schedules and pruning."""
    sizes: dict[object, int] = {}
    schema = state.schema.sent()

    def size(turn: int) -> int:
        sparsify = recipe.up.at(turn).sparsify
        density = sparsify.density_at(turn) if isinstance(sparsify, TopK) else None
        pruned = sum(recipe.pruning.density_after(steps) is not None for steps in range(turn + 1))
        key = (dataclasses.replace(recipe.up.at(turn), round=0), density, pruned)
        if key not in sizes:
            kept = recipe.pruning.kept(_grown(recipe, state, turn).params, turn) if turn >= state.steps else {}
            sent = {name: torch.where(kept[name], change[name], 0.0) if kept else change[name] for name in schema}
            sizes[key] = len(recipe.up.send(sent, schema, turn, 0).raw)
        return sizes[key]

    return [size(turn) / size(state.steps - 1) for turn in range(state.steps, rounds)]


def _over_rounds(samples: Sequence[tuple[int, _Sizes]], rounds: int, share: float) -> list[dict[str, float]]:
    """Expected bytes to one client in each round, if a ``share`` of all clients is drawn each time."""
    turns = np.arange(rounds)
    unknown = (1.0 - share) ** turns
    at = [turn for turn, _ in samples]
    kinds = {kind: None for _, sizes in samples for kind in {**sizes.new, **sizes.known}}
    curves = {
        kind: unknown * np.interp(turns, at, [sizes.new.get(kind, 0) for _, sizes in samples])
        + (1 - unknown) * np.interp(turns, at, [sizes.known.get(kind, 0) for _, sizes in samples])
        for kind in kinds
    }
    return [{kind: float(curve[turn]) for kind, curve in curves.items()} for turn in turns]

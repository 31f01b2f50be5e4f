"""Planning a round: the job of each client in the cohort, and the bytes needed to send it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fedlora.client.jobs import Job
from fedlora.core.byte_counts import ByteCounts, add_up
from fedlora.core.state import ClientState, ServerState, named_seed
from fedlora.core.store import Memory
from fedlora.core.tree import Tree
from fedlora.population.tiers import Tier, recipes_of
from fedlora.recipe import Recipe
from fedlora.rounds.downlink import Downlink, Message


class Order(NamedTuple):
    """The job and message for one client.

    Args:
        job: its local training, without the parameters.
        tier: its tier's name, empty without tiers.
        message: the parameters of the round, and the start parameters that result from them.
        sizes: bytes by kind of everything sent to it.
    """

    job: Job
    tier: str
    message: Message
    sizes: ByteCounts


class Plan(NamedTuple):
    """A round's orders, in the cohort's order.

    Args:
        orders: one for each client.
        jobs: the same jobs with their parameters, until they are given to an engine: a copy of the model.
        lost: compression error of the messages, if error feedback adds it to the next ones.
    """

    orders: tuple[Order, ...]
    jobs: list[Job]
    lost: Tree

    def hand_over(self) -> list[Job]:
        """The jobs for an engine, which are no longer held here afterwards."""
        jobs = self.jobs.copy()
        self.jobs.clear()
        return jobs


def make_plan(
    recipe: Recipe, state: ServerState, cohort: tuple[int, ...], tiers: Mapping[int, Tier], seed: int, rounds: int
) -> Plan:
    """The orders of a round; clients that hold the same parameters are sent the same message.

    Args:
        recipe: the recipe of the phase.
        state: the state before the round.
        cohort: the participating clients.
        tiers: the tier of each client, if there are tiers.
        seed: seed of the run.
        rounds: total number of rounds of the run, for schedules.
    """
    recipes = {"": recipe, **recipes_of({client: tiers[client] for client in cohort if client in tiers}, recipe)}
    downlinks: dict[tuple[str, int | None], Downlink] = {}
    orders, jobs = [], []
    for client in cohort:
        tier = tiers[client].name if client in tiers else ""
        known = state.known.get(client, Memory())
        memory = state.clients.get(client, ClientState())
        rank = known.value("rank", "rank")
        own = recipes[tier] if rank is None else recipes[tier].of_rank(rank)
        downlink = downlinks.setdefault((tier, rank), Downlink(own, state, seed))
        message = downlink.message(known.tree("down", "held"), memory.folds.version)
        job = Job(
            recipe=own,
            client=client,
            phase=state.phase,
            round=state.steps,
            progress=(state.round, rounds),
            seed=named_seed(seed, "client", state.round, client),
            base=recipe.local.base,
            payload=message.packet.raw,
            setup=None if memory.has_setup else state.setup,
            fold=message.fold,
            memory=memory,
            start=message.start,
        )
        message = message.without_bytes()
        sizes = message.sizes if memory.has_setup else add_up((message.sizes, state.setup_bytes))
        orders.append(Order(job._replace(payload=b""), tier, message, sizes))
        jobs.append(job)
    lost = next((downlink.lost for downlink in downlinks.values()), state.parts.tree("down", "lost"))
    return Plan(tuple(orders), jobs, lost)

"""What comes back from a cohort, read and checked before it counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fedlora.client.jobs import Job, Reply, empty_report
from fedlora.core.errors import QuorumError, WireError, plain
from fedlora.core.schema import Schema
from fedlora.core.state import ClientState, Update
from fedlora.core.tree import Tree
from fedlora.engines.base import Engine
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe import Recipe
from fedlora.rounds.plan import Order, Plan
from fedlora.transport import wire

LARGEST_COUNT = 2.0**40
"""No client has more examples than this, nor takes more steps."""


class ClientResult(NamedTuple):
    """What is kept of one reply, which is all but its bytes.

    Args:
        client: who answered.
        reply: without its bytes.
        report: the figures beside the update.
        sizes: bytes by kind.
        kept: entries of the update that are not zero.
        counts: whether it is part of the round's result.
    """

    client: int
    reply: Reply
    report: dict[str, float]
    sizes: dict[str, int]
    kept: int
    counts: bool

    @property
    def late(self) -> bool:
        """Whether it ran out of time."""
        return not self.counts and not self.reply.refused


class Uplink:
    """The updates of a cohort in the order of its jobs, each read as it comes and then let go.

    Args:
        recipe: of the phase.
        plan: what was asked.
        schema: what is trained.
        engine: where clients run.
    """

    def __init__(self, recipe: Recipe, plan: Plan, schema: Schema, engine: Engine) -> None:
        self._recipe, self._plan, self._engine = recipe, plan, engine
        self._schema = schema.sent()
        self.answers: list[ClientResult] = []

    @property
    def counted(self) -> list[ClientResult]:
        """The answers that are part of the round's result."""
        return [answer for answer in self.answers if answer.counts]

    def updates(self, params: Tree) -> Iterator[Update]:
        """Runs the jobs, once, and yields the updates that count.

        Args:
            params: the server's, for shapes.

        Raises:
            WireError: a reply of this process is not of the expected form; others' are refused.
        """
        orders, engine = self._plan.orders, self._engine
        like = self._schema.split(params) | {"report": empty_report(self._recipe)}
        for order, reply in zip(orders, engine.run([order.job for order in orders]), strict=True):
            most = engine.most_examples(order.job.client)
            answer, delta = read_reply(order.job, reply, like, self._schema, engine.trusted, most)
            self.answers.append(answer)
            if delta is not None:
                yield self._update(order, answer, delta)

    def check_quorum(self) -> None:
        """Refuses a round of too few; what was given under noise has been given, and counts.

        Raises:
            QuorumError: fewer clients than the engine is to have answered.
        """
        num, least = len(self.answers), self._engine.min_clients
        if len(self.counted) >= min(least, num) or not disclosure_of(self._recipe).attempts:
            return
        silent = [answer for answer in self.answers if not answer.counts]
        why = "; ".join(f"client {answer.client}: {answer.reply.refused or 'out of time'}" for answer in silent[:3])
        raise QuorumError(
            f"{num - len(silent)} of {num} clients answered, and {least} must ({why})",
            frozenset(answer.client for answer in silent if answer.reply.refused),
        )

    def _update(self, order: Order, answer: ClientResult, delta: Tree) -> Update:
        delta = self._recipe.privacy.clip(delta)  # rounding may have made it longer, or a client that was not ours
        recipe = order.job.recipe
        rank = int(answer.report.get("rank", recipe.rank))
        start = recipe.rank_pruning.keep_ranks(order.message.start, self._schema, rank)
        return Update(start, delta, answer.report.get("examples", 0.0))


def read_reply(
    job: Job, reply: Reply, like: Mapping[str, Tree], schema: Schema, trusted: bool, examples: int | None = None
) -> tuple[ClientResult, Tree | None]:
    """A reply's figures, and its update if it counts.

    Args:
        job: what was asked.
        reply: what came.
        like: the parts that are expected.
        schema: what travels.
        trusted: whether a reply that cannot be read is a fault of ours; else it is refused and told so.
        examples: how many the client said it has.

    Raises:
        WireError: it cannot be read, and whoever sent it is trusted.
    """
    if reply.raw is None:
        return ClientResult(job.client, reply, {}, {}, 0, counts=False), None
    try:
        largest = 4096 + sum(64 + 4 * value.numel() for part in like.values() for value in part.values())
        if len(reply.raw) > largest:
            raise WireError(f"{len(reply.raw):,} bytes, larger than any message of these parts ({largest:,})")
        packet = wire.receive(reply.raw, like, job.recipe.up.precisions)
        delta = schema.join(packet.trees)
        report = {name: float(value) for name, value in packet.trees["report"].items()}
        most = LARGEST_COUNT if examples is None else float(examples * job.recipe.local.epochs)
        _check(job, report, most)
    except WireError as error:
        if trusted:
            raise
        # what such a client remembers is not known either: it is told everything anew
        refused = Reply(
            None, ClientState(), reply.seconds, f"a reply that cannot count: {plain(error)}", delivered=False
        )
        return ClientResult(job.client, refused, {}, {"refused": len(reply.raw)}, 0, counts=False), None
    kept = sum(count for part, count in packet.kept.items() if part != "report")
    return ClientResult(job.client, reply._replace(raw=None), report, packet.sizes, kept, counts=True), delta


def _check(job: Job, report: Mapping[str, float], most: float) -> None:
    """Refuses what no client would send that does what it is asked.

    Raises:
        WireError: a count is none, or the rank is none that the client could have come to.
    """
    counts = {name: report[name] for name in ("examples", "steps") if name in report}
    if not all(0 <= value <= LARGEST_COUNT for value in counts.values()):  # NaN is not either
        raise WireError(f"the report says {counts}; these are counts")
    if report.get("below", 0.0) not in (0.0, 1.0):
        raise WireError(f"it says {report['below']:g} where it was asked whether its update is below the clip: 0 or 1")
    if report.get("examples", 0.0) > most:
        raise WireError(f"it says that it trained on {report['examples']:g} examples, and it has {most:g} at most")
    rank = job.recipe.rank
    told = report.get("rank", rank)
    if told not in (rank, job.recipe.rank_pruning.fewer(rank)):
        raise WireError(f"client {job.client} of rank {rank} says that its rank is {told:g} now; it cannot be")

"""Replies of a cohort, parsed and validated before they are counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from fedlora.client.jobs import Job, Reply, empty_report
from fedlora.core import tree
from fedlora.core.errors import QuorumError, TrainingError, WireError, plain
from fedlora.core.schema import Schema
from fedlora.core.state import ClientState, Update
from fedlora.core.tree import Tree
from fedlora.engines.base import Engine
from fedlora.privacy.disclosure import disclosure_of
from fedlora.recipe import Recipe
from fedlora.rounds.outliers import Outliers, Verdict
from fedlora.rounds.plan import Order, Plan
from fedlora.transport import wire

LARGEST_COUNT = 2.0**40
"""Upper bound on a client's reported examples and steps."""


class ClientResult(NamedTuple):
    """What is kept of one reply: everything but its bytes.

    Args:
        client: the client that replied.
        reply: the reply, without its bytes.
        report: the figures reported with the update.
        sizes: bytes by kind.
        kept: number of non-zero entries of the update.
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
        """Whether it timed out."""
        return not self.counts and not self.reply.refused


class Uplink:
    """The updates of a cohort in the order of its jobs, each parsed when received and released after use.

    Args:
        recipe: the recipe of the phase.
        plan: the orders sent.
        schema: the trained parameters.
        engine: where clients run.
        outliers: refuses updates that are far too long.
    """

    def __init__(self, recipe: Recipe, plan: Plan, schema: Schema, engine: Engine, outliers: Outliers) -> None:
        self._recipe, self._plan, self._engine = recipe, plan, engine
        self._schema = schema.sent()
        self.outliers = outliers
        self.warnings: list[str] = []
        self.answers: list[ClientResult] = []
        self.waited = 0.0
        """Seconds spent waiting for replies; clients may have worked at the same time."""

    @property
    def counted(self) -> list[ClientResult]:
        """The client results that count."""
        return [answer for answer in self.answers if answer.counts]

    def updates(self, params: Tree) -> Iterator[Update]:
        """Runs the jobs, once, and yields the updates that count.

        Args:
            params: the server's parameters, for shapes.

        Raises:
            WireError: a reply of this process is not of the expected form; replies of other processes are rejected
                instead.
        """
        orders, engine = self._plan.orders, self._engine
        like = self._schema.split(params) | {"report": empty_report(self._recipe)}
        largest = 4096 + sum(64 * len(part) + 4 * tree.num_entries(part) for part in like.values())
        replies = iter(engine.run(self._plan.hand_over()))
        for place, order in enumerate(orders):
            most = engine.most_examples(order.job.client)
            clock = time.perf_counter()
            reply = next(replies)
            self.waited += time.perf_counter() - clock
            answer, delta = read_reply(order.job, reply, like, self._schema, engine.trusted, largest, most)
            del reply
            self.answers.append(answer)
            update = None if delta is None else self._update(order, answer, delta)
            del delta  # while the next client trains, nothing here may hold the update of this one
            if update is not None:
                verdicts = self.outliers.offer(place, update)
                del update
                yield from self._admitted(verdicts)
        assert next(replies, None) is None  # the engine ends its work
        yield from self._admitted(self.outliers.rest())

    def _admitted(self, verdicts: Iterator[Verdict]) -> Iterator[Update]:
        for verdict in verdicts:
            if verdict.why:
                self.answers[verdict.place] = _refused(self.answers[verdict.place], verdict.why)
            else:
                yield verdict.update

    def check_quorum(self) -> None:
        """Rejects a round with too few replies, unless these are noised: they have been disclosed, so they count.

        Raises:
            QuorumError: fewer clients replied than the engine requires.
        """
        num = len(self.answers)
        # without this, refused and late clients would leave an aggregator without enough updates
        needed = self._recipe.aggregator.without(self.outliers.refused).min_updates
        silent = [answer for answer in self.answers if not answer.counts]
        # if all are late, the aggregator says what to change
        lacking = bool(silent) and not all(answer.late for answer in self.answers)
        least = max(self._engine.min_clients, needed if lacking else 0)
        if len(self.counted) >= min(least, num) or not disclosure_of(self._recipe).attempts:
            return
        why = "; ".join(f"client {answer.client}: {answer.reply.refused or 'out of time'}" for answer in silent[:3])
        raise QuorumError(
            f"{num - len(silent)} of {num} clients answered, but {least} are required ({why})",
            frozenset(answer.client for answer in silent if answer.reply.refused),
        )

    def skips(self, before: object) -> bool:
        """Whether a round changes nothing because nobody was in time; a warning says so.

        Twice in a row, or at the start of a phase, it is no chance: then the aggregator says what to change.

        Args:
            before: what the norms of the round before say of its longest update; empty if it had none.
        """
        if not self.answers or not before or not all(answer.late for answer in self.answers):
            return False
        self.warnings.append(
            f"none of the {len(self.answers)} clients was done in time, so the change of this round is zero; if it "
            "happens again in the next round, the run stops: raise local.timeout_seconds"
        )
        return True

    @property
    def diverged(self) -> bool:
        """Whether training failed on more than half of the cohort."""
        return 2 * sum(answer.reply.failed for answer in self.answers) > len(self.answers)

    @property
    def longest(self) -> tuple[int, float] | None:
        """The client with the longest update that counts, and its norm."""
        found = self.outliers.longest
        return (self.answers[found[0]].client, found[1]) if found else None

    def check_moved(self, params: Tree, init: Tree) -> None:
        """Rejects a round in which training changed a group of parameters on no client; warns if earlier rounds did.

        Args:
            params: the server's parameters.
            init: their values at the start of the phase; empty if all groups moved in earlier rounds.

        Raises:
            TrainingError: naming the group, the likely reason and its remedy.
        """
        unmoved = [{*answer.reply.unmoved} for answer in self.counted if answer.report.get("steps", 1.0) > 0]
        for group in sorted(set.intersection(*unmoved)) if unmoved else ():
            still = f"all {len(unmoved)} clients of a round took steps and their {group} did not move"
            left_out = self._why_left_out(group)
            if init and all(torch.equal(params[name], init[name]) for name in self._schema.names(group)):
                reason = left_out or "check the targets, the learning rate and the number of labelled examples"
                raise TrainingError(f"{still}, so nothing would be learnt: {reason}")
            diverged = (
                "it did before, so the model has probably diverged; lower the learning rates of clients and server (on "
                "convolutions, to a tenth)"
            )
            self.warnings.append(f"{still}: {left_out or diverged}")

    def _why_left_out(self, group: str) -> str:
        """How the downlink stopped a group from moving, and the remedy; empty if it did not."""
        starts = [order.message.start for order in self._plan.orders]

        def left_out(part: str) -> bool:
            names = self._schema.names(part)
            return bool(names) and not any(bool(start[name].any()) for start in starts for name in names)

        if group == "adapter" and left_out("head"):
            return (
                "the downlink's top-k left the whole head out, and no gradient passes through a head of zeros; set "
                "quota.head = 1.0 (of down.sparsify) to keep it, or take several local steps"
            )
        if group == "adapter" and left_out("adapter"):
            return (
                "the downlink's top-k left the whole adapter out, and no gradient passes through factors of zeros; "
                "raise the density of down.sparsify, or set quota.B (of down.sparsify)"
            )
        return ""

    def _update(self, order: Order, answer: ClientResult, delta: Tree) -> Update:
        delta = self._recipe.privacy.clip(delta)  # quantization or an untrusted client may have exceeded the bound
        recipe = order.job.recipe
        rank = int(answer.report.get("rank", recipe.rank))
        start = recipe.rank_pruning.keep_ranks(order.message.start, self._schema, rank)
        return Update(start, delta, self._weight(order.job, answer.report.get("examples", 0.0)))

    def _weight(self, job: Job, examples: float) -> float:
        """The examples of a client that count: how many it has is its own word."""
        limit = self._engine.counted_examples() if self._recipe.aggregator.weighs_by_examples else None
        most = examples if limit is None else limit * job.recipe.local.epochs
        if examples > most:
            self.warnings.append(
                f"client {job.client} reports {examples:g} examples and counts for {most:g}, so that it does not "
                "outweigh the others (max_weight and max_examples in server.toml)"
            )
        return min(examples, most)


def read_reply(
    job: Job,
    reply: Reply,
    like: Mapping[str, Tree],
    schema: Schema,
    trusted: bool,
    largest: int,
    examples: int | None = None,
) -> tuple[ClientResult, Tree | None]:
    """A reply's figures, and its update if it counts.

    Args:
        job: the job that was sent.
        reply: the reply received.
        like: the expected parts, for names and shapes.
        schema: the transmitted parameters.
        largest: the most bytes that a message of these parts can have.
        trusted: whether an unreadable reply is an internal error; otherwise it is rejected, with the reason recorded.
        examples: the number of examples the client reported when it connected.

    Raises:
        WireError: it cannot be read, and its sender is trusted.
    """
    if reply.raw is None:
        sizes = {"refused": reply.size} if reply.size else {}
        return ClientResult(job.client, reply, {}, sizes, 0, counts=False), None
    try:
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
        # the state of such a client is unknown too: everything is sent to it again
        refused = Reply(
            None, ClientState(), reply.seconds, f"a reply that is not counted: {plain(error)}", delivered=False
        )
        return ClientResult(job.client, refused, {}, {"refused": len(reply.raw)}, 0, counts=False), None
    kept = sum(count for part, count in packet.kept.items() if part != "report")
    return ClientResult(job.client, reply._replace(raw=None), report, packet.sizes, kept, counts=True), delta


def _refused(answer: ClientResult, why: str) -> ClientResult:
    """The result of a client whose readable reply does not count; like the others, it is sent everything again."""
    reply = Reply(None, ClientState(), answer.reply.seconds, why, delivered=False)
    return ClientResult(answer.client, reply, {}, {"refused": sum(answer.sizes.values())}, 0, counts=False)


def _check(job: Job, report: Mapping[str, float], most: float) -> None:
    """Rejects reports that a client following the protocol cannot send.

    Raises:
        WireError: a value is not a count, or the client could not have reached this rank.
    """
    counts = {name: report[name] for name in ("examples", "steps") if name in report}
    if not all(0 <= value <= LARGEST_COUNT for value in counts.values()):  # also rejects NaN
        raise WireError(f"the report has {counts}, which are not valid counts")
    if report.get("below", 0.0) not in (0.0, 1.0):
        raise WireError(
            f"it reports {report['below']:g} where 0 or 1 is expected, whether its update is below the clip"
        )
    if report.get("examples", 0.0) > most:
        raise WireError(f"it reports training on {report['examples']:g} examples, but it has {most:g} at most")
    rank = job.recipe.rank
    reported = report.get("rank", rank)
    if reported not in (rank, job.recipe.rank_pruning.fewer(rank)):
        raise WireError(
            f"client {job.client} of rank {rank} reports rank {reported:g}, which rank pruning does not allow"
        )

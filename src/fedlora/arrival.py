"""What comes back from a client, read and checked before it counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fedlora.errors import WireError, plain
from fedlora.jobs import Job, Reply
from fedlora.state import ClientState
from fedlora.transport import wire
from fedlora.transport.link import join_groups
from fedlora.tree import Tree

LARGEST_COUNT = 2.0**40
"""No client has more examples than this, nor takes more steps."""


class Answer(NamedTuple):
    """What the ledger keeps of one reply, which is all but its bytes.

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


def read_reply(
    job: Job,
    reply: Reply,
    like: Mapping[str, Tree],
    groups: Mapping[str, str],
    trusted: bool,
    examples: int | None = None,
) -> tuple[Answer, Tree | None]:
    """A reply's figures, and its update if it counts.

    Args:
        job: what was asked.
        reply: what came.
        like: the parts that are expected.
        groups: the group of each trained parameter.
        trusted: whether a reply that cannot be read is a fault of ours; else it is refused and told so.
        examples: how many the client said it has.

    Raises:
        WireError: it cannot be read, and whoever sent it is trusted.
    """
    if reply.raw is None:
        return Answer(job.client, reply, {}, {}, 0, counts=False), None
    try:
        largest = 4096 + sum(64 + 4 * value.numel() for part in like.values() for value in part.values())
        if len(reply.raw) > largest:
            raise WireError(f"{len(reply.raw):,} bytes, larger than any message of these parts ({largest:,})")
        packet = wire.receive(reply.raw, like)
        delta = join_groups(packet.trees, groups)
        report = {name: float(value) for name, value in packet.trees["report"].items()}
        most = LARGEST_COUNT if examples is None else float(examples * job.recipe.local.epochs)
        _check(job, report, most)
    except WireError as error:
        if trusted:
            raise
        # what such a client remembers is not known either: it is told everything anew
        refused = Reply(None, ClientState(), reply.seconds, f"a reply that cannot count: {plain(error)}", heard=False)
        return Answer(job.client, refused, {}, {"refused": len(reply.raw)}, 0, counts=False), None
    kept = sum(count for part, count in packet.kept.items() if part != "report")
    return Answer(job.client, reply._replace(raw=None), report, packet.sizes, kept, counts=True), delta


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

"""The slot ``Engine``: where clients run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from fedlora.client.jobs import Job, Reply


class Engine(ABC):
    """Carries jobs to clients and replies back; the only seam between a federation and the world."""

    trusted = True
    """Whether a reply that cannot be read is a fault of ours; else it is refused, and the round goes on."""
    min_clients = 0
    """How many replies a round needs."""
    attempts = 1
    """How often a round with too few is tried."""
    over_sample = 1.0
    """So many times the clients that count are asked."""

    def wait(self) -> None:  # noqa: B027 - who runs here is here
        """Waits until a round can begin.

        Raises:
            QuorumError: too few clients came.
        """

    def most_examples(self, client: int) -> int | None:
        """How many examples a client said it has; None if that is not for it to say."""
        return None

    def present(self) -> frozenset[int] | None:
        """The clients that can be asked now; None for all of them."""
        return None

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        """Yields one reply per job, in the order of the jobs, so that sums come out the same everywhere."""

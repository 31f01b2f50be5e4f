"""The slot ``Engine``: where clients run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from fedlora.client.jobs import Job, Reply


class Engine(ABC):
    """Runs jobs on clients and returns their replies; the only interface between rounds and the place clients run."""

    trusted = True
    """Whether an unreadable reply is treated as an internal error; otherwise it is rejected and the round continues."""
    min_clients = 0
    """Minimum number of replies for a round."""
    attempts = 1
    """Maximum number of attempts at a round that receives too few replies."""
    over_sample = 1.0
    """Ratio of clients asked to clients counted in a round."""

    def wait(self) -> None:  # noqa: B027 - local clients are always available
        """Waits until a round can begin.

        Raises:
            QuorumError: too few clients connected.
        """

    def most_examples(self, client: int) -> int | None:
        """The number of examples a client reported when it connected; None if clients do not report it."""
        return None

    def counted_examples(self) -> float | None:
        """The number of examples beyond which a client gains no weight, per epoch; None if there is no limit."""
        return None

    def present(self) -> frozenset[int] | None:
        """The clients currently available; None for all of them."""
        return None

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        """Yields one reply per job, in the order of the jobs, so that sums are bit-identical on every engine."""

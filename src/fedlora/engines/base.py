"""The slot ``Engine``: where clients run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from fedlora.jobs import Job, Reply


class Engine(ABC):
    """Carries jobs to clients and replies back; the only seam between a federation and the world."""

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        """Yields one reply per job, in the order of the jobs, so that sums come out the same everywhere."""

"""One client after another, in this process, on one resident model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlora.client.jobs import Job, Reply
from fedlora.client.turn import decoded, run_job
from fedlora.client.workspace import Workspace
from fedlora.engines.base import Engine
from fedlora.population.clients import Population


class Serial(Engine):
    """Runs every job on the process's own model; messages are serialised and parsed nevertheless.

    Args:
        workspace: the resident model.
        population: the examples of each client.
    """

    def __init__(self, workspace: Workspace, population: Population) -> None:
        self.workspace = workspace
        self.population = population

    def run(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        jobs = [decoded(job, self.workspace) for job in jobs]  # from here on, nothing holds the bytes of the messages
        for job in jobs:
            yield run_job(job, self.workspace, self.population.rows_of(job.client))

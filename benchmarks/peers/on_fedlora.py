"""fedlora: ``fedlora.run`` with the job's configuration, in this process or with forked workers."""

from __future__ import annotations

import json
from functools import partial

from safetensors.torch import load_file

from benchmarks.peers.job import Work, worker
from benchmarks.peers.prepare import experiment_file
from fedlora import config
from fedlora.engines import Processes
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.experiment import run


class Clock(Callback):
    """Notes when each round ended; the row before the first round is its start."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def row_recorded(self, row: RoundRecord) -> None:
        self._work.round_ended()


def main(work: Work) -> None:
    """Trains, and keeps the exported adapter."""
    experiment = config.parse(json.loads((work.job / experiment_file(work.noop)).read_text()))
    engine = partial(Processes, workers=work.workers) if work.workers > 1 else None
    result = run(experiment, work.out / "run", callbacks=[Clock(work)], engine=engine)
    work.finish(load_file(result.folder / "adapter" / "adapter_model.safetensors"))


if __name__ == "__main__":
    worker(main)

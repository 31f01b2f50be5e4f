"""A site of NVFlare's simulator: the client API around the job's local loop."""

from __future__ import annotations

import sys
from pathlib import Path

import nvflare.client as flare
import peft
import torch

from benchmarks.peers.job import Job
from benchmarks.peers.nvflare_parts import marked, plain


def main() -> None:
    """Answers until the job ends."""
    torch.set_num_threads(1)
    job, noop = Job(Path(sys.argv[1])), sys.argv[2] == "1"
    flare.init()
    place = int(flare.get_site_name().rpartition("-")[2]) - 1
    model = None if noop else job.model()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        done = received.current_round
        rows = job.rows(done, job.plan.cohorts[done][place])
        params = received.params
        if model is not None:
            peft.set_peft_model_state_dict(
                model, {plain(name): torch.as_tensor(value) for name, value in params.items()}
            )
            job.train(model, rows)
            params = {marked(name): value for name, value in peft.get_peft_model_state_dict(model).items()}
        # its weight in the average
        flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": len(rows)}))


if __name__ == "__main__":
    main()

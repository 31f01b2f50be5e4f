"""NVFlare's simulator, as its examples do it: the ``FedAvgRecipe``, and a site's script that keeps its model.

As many sites as clients in a round, each in a process of its own, which is the simulator's default. A site acts as
another client in each round: this spares NVFlare the sites of those that do not take part.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

from benchmarks.peers import nvflare_parts
from benchmarks.peers.job import Job, Work, worker


def main(work: Work) -> None:
    """Simulates, and takes the weights from the file that the server saves."""
    job = Job(work.job)
    sites = len(job.plan.cohorts[0])
    recipe = FedAvgRecipe(
        name="peers",
        model={"class_path": "benchmarks.peers.nvflare_parts.Adapter", "args": {"job": str(work.job)}},
        min_clients=sites,
        num_rounds=len(job.plan.cohorts),
        train_script=str(Path(__file__).with_name("nvflare_site.py")),
        train_args=f"{work.job} {int(work.noop)}",
    )
    # as nvflare.recipe.utils adds its own components
    recipe._job.to_server(nvflare_parts.Clock(str(work.job), str(work.out)), id="clock")
    env = SimEnv(num_clients=sites, workspace_root=str(work.out / "workspace"))
    recipe.execute(env)
    saved = next((work.out / "workspace").rglob("FL_global_model.pt"))
    state = torch.load(saved, weights_only=True)["model"]
    work.finish({nvflare_parts.plain(name): torch.as_tensor(value) for name, value in state.items()})


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    worker(main)

"""Flower's simulation under Ray, as its examples of LoRA do it: each turn loads the model and puts the adapter in.

The local loop is that of its Hugging Face quickstart rather than ``transformers.Trainer``, which is slower.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers.job import Job, Work, worker

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's turn."""
    torch.set_num_threads(1)
    settings = message.content["config"]
    job = Job(Path(str(settings["job"])))
    rows = job.rows(int(settings["server-round"]) - 1, int(settings["client"]))
    arrays, loss = message.content["arrays"], 0.0
    if not settings["noop"]:
        model = job.model()
        peft.set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        loss = job.train(model, rows)
        arrays = ArrayRecord(peft.get_peft_model_state_dict(model))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows)})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Cohorts(FedAvg):
    """FedAvg whose sampled nodes act as the clients of the job's cohort."""

    def __init__(self, job: Job) -> None:
        cohorts, num_clients = job.plan.cohorts, job.plan.num_clients
        super().__init__(
            fraction_train=len(cohorts[0]) / num_clients, fraction_evaluate=0.0, min_available_nodes=num_clients
        )
        self._cohorts = cohorts

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message, client in zip(messages, self._cohorts[server_round - 1], strict=True):
            own = ConfigRecord({**message.content["config"], "client": client})
            message.content = RecordDict({"arrays": arrays, "config": own})
        return messages


def main(work: Work) -> None:
    """Simulates with as many actors as workers, each of one processor."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    job = Job(work.job)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        result = Cohorts(job).start(
            grid=grid,
            initial_arrays=ArrayRecord(job.start()),
            num_rounds=len(job.plan.cohorts),
            train_config=ConfigRecord({"job": str(work.job), "noop": work.noop}),
            evaluate_fn=lambda done, arrays: work.round_ended(),
        )
        work.finish(dict(result.arrays.to_torch_state_dict()))

    run_simulation(
        server_app,
        client_app,
        num_supernodes=job.plan.num_clients,
        backend_config={
            "init_args": {"num_cpus": work.workers},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    worker(main)

"""pfl-research, as its benchmark of LoRA does it: one resident model in one process, its own loop of SGD steps."""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import peft
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks.peers.job import Batch, Job, Work, worker


class Idle(FederatedAveraging):
    """FedAvg whose clients train nothing."""

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        return model.get_model_difference(initial_model_state), Metrics()


class Clock(TrainingProcessCallback):
    """Notes when each round ended."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._work.round_ended()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self._work.round_ended()
        return False, Metrics()


def wrapped(job: Job) -> peft.PeftModel:
    """The job's model with the two methods that pfl asks for."""
    model = job.model()

    def loss(self: peft.PeftModel, **batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.forward(**batch).loss
        return found

    def metrics(self: peft.PeftModel, **batch: torch.Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted.from_unweighted(float(loss(self, **batch)))}

    model.loss, model.metrics = types.MethodType(loss, model), types.MethodType(metrics, model)
    return model


def main(work: Work) -> None:
    """Simulates in this process."""
    job = Job(work.job)
    plan = job.plan
    model = wrapped(job)
    turns = itertools.count()
    ordered = [(done, client) for done, cohort in enumerate(plan.cohorts) for client in cohort]

    def collate(rows: list[int]) -> Batch:
        return job.batch(rows)

    def dataset(turn: tuple[int, int]) -> PyTorchDataDataset:
        return PyTorchDataDataset(job.rows(*turn), user_id=str(turn[1]), collate_fn=collate)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    simulated = PyTorchModel(
        model=model,
        local_optimizer_create=functools.partial(torch.optim.AdamW, weight_decay=0.0),
        central_optimizer=torch.optim.SGD(trained, lr=1.0),
    )
    backend = SimulatedBackend(
        training_data=FederatedDataset(dataset, lambda: ordered[next(turns)]),
        val_data=None,
        postprocessors=[WeightByDatapoints()],
    )
    algorithm = Idle() if work.noop else FederatedAveraging()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=len(plan.cohorts),
            evaluation_frequency=len(plan.cohorts) + 1,
            train_cohort_size=len(plan.cohorts[0]),
            val_cohort_size=None,
        ),
        backend=backend,
        model=simulated,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=plan.lr, local_num_epochs=1, local_batch_size=plan.batch_size
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=plan.batch_size),
        callbacks=[Clock(work)],
    )
    work.finish(peft.get_peft_model_state_dict(model))


if __name__ == "__main__":
    worker(main)

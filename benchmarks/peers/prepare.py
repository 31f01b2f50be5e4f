"""Makes the job with fedlora, once: tokens, partition, cohorts, the order of rows, and the start of LoRA."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import CPU, opened
from benchmarks.peers.job import Job, Plan
from fedlora import config
from fedlora.config.federated_data import prepare as federated
from fedlora.core.state import named_seed
from fedlora.population.clients import draw_cohort
from fedlora.tasks import Model
from fedlora.tasks.data.sources import Docstrings
from fedlora.tasks.text import PreparedText
from fedlora.tuning import to_peft


@dataclass(frozen=True)
class Size:
    """How large a job is.

    Args:
        clients: clients there are.
        per_round: clients in a round.
        rounds: rounds; the first one warms up and is not measured.
        rows: rows of each client.
        test_rows: rows on which the result is evaluated.
        classes: packages of the standard library to tell apart.
        max_length: tokens of a text.
    """

    clients: int = 20
    per_round: int = 5
    rounds: int = 5
    rows: int = 64
    test_rows: int = 400
    classes: int = 10
    max_length: int = 64


RANK, LR, BATCH = 16, 3e-3, 16


def prepare(folder: Path, size: Size) -> Job:
    """Writes the job and the configuration with which fedlora trains it.

    Rows are docstrings of the standard library, the same number for each client and drawn at random.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder, size)
    experiment = config.parse(document(folder, size, "test.jsonl", noop=False))
    data = federated(experiment)
    task, population = data.task, data.population
    assert isinstance(task, PreparedText)
    recipe = experiment.phases[0].recipe
    _, state, _ = opened(task, recipe, population, experiment.seed)
    seeds = [named_seed(experiment.seed, "cohort", done) for done in range(size.rounds)]
    cohorts = [draw_cohort(population, size.per_round, seed) for seed in seeds]
    arrays = {}
    for split in ("train", "test"):
        batch = task.batch(np.arange(task.num_examples(split)), CPU, split)
        arrays |= {f"{split}.{name}": batch[name].contiguous() for name in ("input_ids", "attention_mask", "labels")}
    source = recipe.local.gradient_source
    for done, cohort in enumerate(cohorts):
        for client in cohort:
            rows = population.rows_of(client)
            draws = source.draws(named_seed(experiment.seed, "client", done, client))
            batches = source.batches(rows, recipe.local.num_steps(len(rows)), BATCH, draws)
            arrays[f"order.{done}.{client}"] = torch.from_numpy(np.concatenate(batches))
    plan = Plan(
        model=str(Model().resolve()),
        num_labels=len(task.label_names),
        rank=RANK,
        lr=LR,
        batch_size=BATCH,
        num_clients=size.clients,
        cohorts=[list(cohort) for cohort in cohorts],
    )
    Job.write(folder, plan, arrays, dict(to_peft(state.params)))
    for noop in (False, True):
        text = json.dumps(document(folder, size, "one.jsonl", noop), indent=1)
        (folder / experiment_file(noop)).write_text(text + "\n")
    return Job(folder)


def _write_rows(folder: Path, size: Size) -> None:
    """Writes ``train.jsonl``, ``test.jsonl`` and its first row: docstrings in an order drawn at random."""
    rows = Docstrings(num_classes=size.classes).load().train
    names = rows.features["label"].names
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    num_train = size.clients * size.rows
    test = order[num_train : num_train + size.test_rows]
    for name, chosen in (("train", order[:num_train]), ("test", test), ("one", test[:1])):
        part = rows.select(chosen)
        lines = [
            json.dumps({"text": text, "label": names[label]})
            for text, label in zip(part["text"], part["label"], strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def experiment_file(noop: bool) -> str:
    return "noop.json" if noop else "train.json"


def document(folder: Path, size: Size, test: str, noop: bool) -> dict[str, Any]:
    """The configuration of fedlora for the job: dense float32 both ways, and FedAvg by examples.

    fedlora always evaluates at the start and at the end; what is measured has one row to evaluate, as the peers have
    none.
    """
    local = {"batch_size": BATCH, "optimizer": {"kind": "adamw", "lr": LR}, "lr_scale": {"head": 1.0}}
    local |= {"max_steps": 0} if noop else {}
    return {
        "label": "peers",
        "checkpoint_every": size.rounds,  # the peers are not asked to save either
        "task": {"kind": "text_classification", "max_length": size.max_length, "pooling": "model"},
        "data": {"kind": "files", "train": str(folder / "train.jsonl"), "test": str(folder / test)},
        "clients": {"num": size.clients, "per_round": size.per_round, "partition": {"kind": "iid"}},
        "evaluate": {"every": size.rounds},
        "method": {
            "kind": "fedavg",
            "rounds": size.rounds,
            "tuning": {"kind": "lora", "rank": RANK, "alpha": RANK},
            "aggregator": {"kind": "mean", "weighting": "uniform" if noop else "examples"},
            "local": local,
        },
    }

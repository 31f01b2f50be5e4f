"""The job that every system trains: model, LoRA start, rows, order of the rows and cohorts, read from files.

Imports neither fedlora nor a peer, so that it works in every environment.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

State = dict[str, torch.Tensor]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What a job is, apart from its arrays.

    Args:
        model: folder of the pre-trained model.
        num_labels: classes.
        rank: rank and alpha of LoRA on query and value.
        lr: learning rate of AdamW, a new one for each client's turn, without weight decay.
        batch_size: examples per step; each client makes one pass over its rows.
        num_clients: clients there are.
        cohorts: clients of each round.
    """

    model: str
    num_labels: int
    rank: int
    lr: float
    batch_size: int
    num_clients: int
    cohorts: list[list[int]]


class Job:
    """A plan and its arrays: start, rows, and the order in which each client takes its rows in each round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = Plan(**json.loads((folder / "plan.json").read_text()))
        self._arrays = load_file(folder / "data.safetensors")

    @staticmethod
    def write(folder: Path, plan: Plan, arrays: State, start: State) -> None:
        """Writes a job; ``start`` has the names of ``peft``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=1) + "\n")
        save_file(arrays, folder / "data.safetensors")
        save_file(start, folder / "start.safetensors")

    def start(self) -> State:
        return load_file(self.folder / "start.safetensors")

    def rows(self, done: int, client: int) -> list[int]:
        """A client's rows in the order of its turn after ``done`` rounds."""
        found: list[int] = self._arrays[f"order.{done}.{client}"].tolist()
        return found

    def batch(self, rows: list[int], split: str = "train") -> Batch:
        """Padded to the longest text among ``rows``."""
        names = ("input_ids", "attention_mask", "labels")
        batch = {name: self._arrays[f"{split}.{name}"][rows] for name in names}
        longest = int(batch["attention_mask"].sum(1).max())
        return {name: value[:, :longest] if value.dim() == 2 else value for name, value in batch.items()}

    def model(self) -> peft.PeftModel:
        """The pre-trained model with stock ``peft`` at the job's start, its dropout off."""
        plan = self.plan
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        base = transformers.AutoModelForSequenceClassification.from_pretrained(plan.model, num_labels=plan.num_labels)
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=plan.rank, lora_alpha=plan.rank, lora_dropout=0.0, target_modules=["query", "value"]
        )
        model = peft.get_peft_model(base, config)
        peft.set_peft_model_state_dict(model, self.start())
        return model.eval()

    def train(self, model: peft.PeftModel, rows: list[int]) -> float:
        """A client's turn as the peers' examples write it: a ``DataLoader``, AdamW, one pass; returns the last loss."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.plan.lr, weight_decay=0.0)
        loss = torch.zeros(())
        for batch in DataLoader(rows, batch_size=self.plan.batch_size, collate_fn=self.batch):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def accuracy(self, state: State) -> float:
        """On all test rows, with stock ``peft``, whichever system trained ``state``."""
        model = self.model()
        peft.set_peft_model_state_dict(model, state)
        rows = range(len(self._arrays["test.labels"]))
        hits = 0
        for batch in DataLoader(rows, batch_size=64, collate_fn=lambda part: self.batch(part, "test")):
            hits += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
        return hits / len(rows)


@dataclass(frozen=True)
class Work:
    """What a worker is asked to do, and where it leaves what it found.

    Args:
        job: the job's folder.
        out: the worker's folder.
        noop: whether clients return what they received.
        workers: processes that train at the same time, where the system has such a setting.
    """

    job: Path
    out: Path
    noop: bool = False
    workers: int = 1

    def command(self, module: str) -> list[str]:
        """The arguments of Python that run a worker."""
        found = ["-m", f"benchmarks.peers.{module}", str(self.job), str(self.out), "--workers", str(self.workers)]
        return [*found, "--noop"] if self.noop else found

    def round_ended(self) -> None:
        """Notes the time: at the start of the first round, and at the end of each."""
        with open(self.out / "rounds.txt", "a") as file:
            file.write(f"{time.monotonic()!r}\n")

    def finish(self, state: State) -> None:
        """Keeps the final weights, under the names of ``peft``."""
        save_file({name: value.contiguous() for name, value in state.items()}, self.out / "final.safetensors")


def worker(run: Callable[[Work], None]) -> None:
    """The command line of a worker: reads the arguments that ``Work.command`` makes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--noop", action="store_true")
    torch.set_num_threads(1)
    run(Work(**vars(parser.parse_args())))

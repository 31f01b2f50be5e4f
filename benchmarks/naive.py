"""The usual way to simulate federated LoRA, written plainly: a deep copy per client, fixed padding, float32."""

from __future__ import annotations

import copy

import numpy as np
import peft
import torch
import transformers
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import CPU, Figure, Settings, docstrings, figure, opened
from fedlora.core.state import generator, named_seed
from fedlora.core.tree import Tree
from fedlora.population.clients import Clients, Population, build_population, draw_cohort
from fedlora.population.partitions import Iid
from fedlora.recipe import Recipe
from fedlora.recipe.local import AdamW, Local
from fedlora.rounds.round import run_round
from fedlora.tasks import Model
from fedlora.tuning import LoRA
from fedlora.tuning.peft_names import to_peft

LENGTH, RANK, BATCH, RATE = 128, 16, 16, 3e-3
NUM_CLIENTS = 20


class Outcome:
    """Seconds of each round, and the accuracy after the last one."""

    def __init__(self, seconds: list[float], accuracy: float) -> None:
        self.seconds = seconds
        self.accuracy = accuracy


def measure(settings: Settings) -> list[Figure]:
    """Same data, clients, cohorts, start, batches, optimiser and learning rate; speed, and accuracy on the test split.

    The model's own dropout is off on both sides, so that accuracies differ by number format and padding alone, not by
    other draws; with it on, fedlora's lead is larger.
    """
    rounds, per_round, seeds = (1, 2, 1) if settings.quick else (3, 2, 2)
    faster: list[float] = []
    plain_accuracy, ours_accuracy = [], []
    for seed in range(seeds):
        task = docstrings()
        clients = Clients(partition=Iid(), num=NUM_CLIENTS, per_round=per_round)
        population = build_population(clients, task.labels, None, seed).population
        cohorts = [draw_cohort(population, per_round, named_seed(seed, "cohort", done)) for done in range(rounds)]
        rows = np.arange(task.num_examples("test"))[:: 3 if settings.quick else 1]
        ours = _Ours(settings, population, cohorts, rows, seed)
        naive = _Naive(settings, population, cohorts, rows, seed, ours.state.params)
        for done in range(rounds):  # in turns, so that drift hits both alike
            naive.round(done)
            ours.round(done)
        faster += [a / b for a, b in zip(naive.seconds, ours.seconds, strict=True)]
        plain_accuracy.append(naive.accuracy())
        ours_accuracy.append(ours.accuracy())
    note = f"{seeds} seed(s), {rounds} rounds of {per_round} of {NUM_CLIENTS} clients"
    difference = [a - b for a, b in zip(ours_accuracy, plain_accuracy, strict=True)]
    return [
        figure("naive way / fedlora, time of a round", faster, "x", ">= 5", note),
        figure("accuracy, naive way", plain_accuracy, "", note="too few rounds to compare" if settings.quick else ""),
        figure("accuracy, fedlora", ours_accuracy, ""),
        figure("accuracy, fedlora - naive", difference, "", "" if settings.quick else ">= -0.02"),
    ]


class _Ours:
    """fedlora in bfloat16, with the same settings otherwise."""

    def __init__(
        self, settings: Settings, population: Population, cohorts: list[tuple[int, ...]], rows: np.ndarray, seed: int
    ) -> None:
        self.settings, self.cohorts, self.rows, self.seed = settings, cohorts, rows, seed
        self.task = docstrings()
        local = Local(optimizer=AdamW(lr=RATE), batch_size=BATCH, compute="bf16", dropout=False)
        self.recipe = Recipe(tuning=LoRA(rank=RANK, alpha=RANK), local=local)
        self.workspace, self.state, self.engine = opened(self.task, self.recipe, population, seed)
        self.seconds: list[float] = []

    def round(self, done: int) -> None:
        start = self.settings.seconds()
        self.state, _ = run_round(
            self.recipe, self.state, self.cohorts[done], self.engine, seed=self.seed, rounds=len(self.cohorts)
        )
        self.seconds.append(self.settings.seconds() - start)

    def accuracy(self) -> float:
        self.workspace.installed.load(self.state.params)
        model = self.workspace.model.eval()
        with torch.no_grad(), self.workspace.autocast("bf16"):
            return self.task.evaluate(model, self.rows, "test", CPU).metrics["accuracy"]


class _Naive:
    """``peft`` on a Hugging Face model, ``copy.deepcopy`` for each client, FedAvg over state dicts."""

    def __init__(
        self,
        settings: Settings,
        population: Population,
        cohorts: list[tuple[int, ...]],
        rows: np.ndarray,
        seed: int,
        start: Tree,
    ) -> None:
        self.settings, self.population, self.cohorts, self.rows, self.seed = settings, population, cohorts, rows, seed
        self.task = docstrings(LENGTH)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            Model().resolve(), num_labels=len(self.task.label_names)
        )
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=RANK, target_modules=["query", "value"], lora_dropout=0.0
        )
        self.model = peft.get_peft_model(model, config)
        peft.set_peft_model_state_dict(self.model, to_peft(start))
        self.train = self._tensors(np.arange(self.task.num_examples("train")), "train")
        self.seconds: list[float] = []

    def round(self, done: int) -> None:
        start = self.settings.seconds()
        states = [self._client(client, done) for client in self.cohorts[done]]
        average = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
        self.model.load_state_dict(average, strict=False)
        self.seconds.append(self.settings.seconds() - start)

    def _client(self, client: int, done: int) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(self.model)
        model.eval()  # no dropout; everything else is as in training
        rows = torch.from_numpy(np.array(self.population.rows_of(client)))
        shuffle = generator(named_seed(named_seed(self.seed, "client", done, client), "shuffle"))
        rows = rows[torch.randperm(len(rows), generator=shuffle)]
        data = TensorDataset(*(column[rows] for column in self.train))
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
        for tokens, mask, labels in DataLoader(data, batch_size=BATCH):
            optimizer.zero_grad()
            logits = model(input_ids=tokens, attention_mask=mask).logits
            functional.cross_entropy(logits, labels).backward()
            optimizer.step()
        return {name: parameter.detach() for name, parameter in trained.items()}

    def accuracy(self) -> float:
        self.model.eval()
        tokens, mask, labels = self._tensors(self.rows, "test")
        with torch.no_grad():
            found = [
                self.model(input_ids=part, attention_mask=shown).logits.argmax(1)
                for part, shown in zip(tokens.split(64), mask.split(64), strict=True)
            ]
        return float((torch.cat(found) == labels).float().mean())

    def _tensors(self, rows: np.ndarray, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = self.task.batch(rows, CPU, split)
        return batch["input_ids"], batch["attention_mask"], batch["labels"]

"""Contract checks of tasks and data sources: what is prepared, and a run of each."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.config import Evaluate, Experiment, parse, to_toml
from fedlora.config.federated_data import prepare
from fedlora.core.later import datasets
from fedlora.methods import fedavg
from fedlora.population.clients import Clients
from fedlora.population.partitions import Iid
from fedlora.runs.inference import load_run
from fedlora.tasks import Model, Prepared, Source, Task, TextClassification
from fedlora.tasks.data.columns import Raw, fingerprint
from fedlora.testing.models import save_character_model
from fedlora.testing.training import LOCAL, check_resumed, must, same

CPU = torch.device("cpu")


def check_task(
    value: Task, source: Source, inputs: Sequence[str], model: Model | None = None, learns: bool = True
) -> None:
    """Equal seeds and rows give equal models, batches and metrics, without data it predicts the same; trains, resumes.

    Args:
        value: the task.
        source: rows that it accepts, with two or more on either side.
        inputs: one or more inputs to predict.
        model: the model; a tiny BERT that reads characters if absent.
        learns: whether the training loss falls in a few rounds.
    """
    with tempfile.TemporaryDirectory() as place:
        model = model or Model(path=str(save_character_model(Path(place) / "model")))
        one, other = (value.prepare(model, source) for _ in range(2))
        must(one.fingerprint == other.fingerprint, "prepared twice, the data have another fingerprint")
        _check_classes(one)
        net, head = one.load_model(3, "fp32", CPU)
        _check_model(net, head, other.load_model(3, "fp32", CPU), "the same seed gave another model")
        for split in ("train", "test"):
            rows = np.arange(min(4, one.num_examples(split)))
            batch, again = one.batch(rows, CPU, split), other.batch(rows, CPU, split)
            must(batch.keys() == again.keys(), "the same rows gave other batches")
            must(all(torch.equal(batch[name], again[name]) for name in batch), "the same rows gave other batches")
        _check_loss(one, net)
        _check_metrics(one, net, source.load().test, Path(place))
        without = value.restore(model, one.label_names)
        _check_model(net, head, without.load_model(3, "fp32", CPU), "without data the model is another one")
        _check_predictions(one, without, net, inputs)
        one.save_pretrained(Path(place) / "saved")
        _check_run(value, source, model, Path(place), learns)
        said = load_run(Path(place) / "whole").predict(list(inputs))
        must(len(said) == len(inputs), f"a finished run makes {len(said)} predictions for {len(inputs)} inputs")


def check_source(value: Source, task: Task | None = None, model: Model | None = None, learns: bool = True) -> None:
    """Equal rows in equal order each time; a task trains on them and resumes.

    Args:
        value: the source.
        task: the task that its rows are for; ``TextClassification()`` if absent.
        model: the model; a tiny BERT that reads characters if absent.
        learns: whether the training loss falls in a few rounds.
    """
    task = task or TextClassification()
    with tempfile.TemporaryDirectory() as place:
        model = model or Model(path=str(save_character_model(Path(place) / "model")))
        raw = value.load()
        must(isinstance(raw, Raw), f"load() must return a Raw, and it returns {type(raw).__name__}")
        for rows, which in raw.sides:
            must(isinstance(rows, datasets.Dataset), f"the {which} rows are no datasets.Dataset")
            must(len(rows) > 0, f"there are no {which} rows")
        must(raw.test is not None or 0 < raw.test_fraction < 1, f"{raw.test_fraction} of the rows cannot be held out")
        must(_content(value.load()) == _content(raw), "loaded again, the rows or their order are others")
        one, other = (task.prepare(model, value) for _ in range(2))
        must(one.fingerprint == other.fingerprint, "prepared twice, the data have another fingerprint")
        must(min(one.num_examples("train"), one.num_examples("test")) > 0, "a task finds no rows on one side")
        _check_run(task, value, model, Path(place), learns)


def _check_written(experiment: Experiment) -> None:
    read = parse(tomllib.loads(to_toml(experiment)))
    must((read.task, read.data) == (experiment.task, experiment.data), "written as TOML and read again it is another")


def _content(raw: Raw) -> tuple[Any, ...]:
    return (*((fingerprint(rows), which) for rows, which in raw.sides), raw.test_fraction, raw.seed, raw.final)


def _check_classes(task: Prepared) -> None:
    labels, num = task.labels, max(1, len(task.label_names))
    must(labels.shape == (task.num_examples("train"),), "each training example needs a class")
    must(np.issubdtype(labels.dtype, np.integer), "classes of examples are integers")
    must(int(labels.min()) >= 0 and int(labels.max()) < num, f"there are {num} classes, and labels of others")


def _check_model(net: nn.Module, head: frozenset[str], other: tuple[nn.Module, frozenset[str]], message: str) -> None:
    values = dict(net.named_parameters())
    must(head <= values.keys(), f"the head has parameters that the model lacks: {sorted(head - values.keys())[:3]}")
    must(all(value.dtype == torch.float32 for value in values.values()), "parameters are not in float32")
    must(head == other[1] and same(values, dict(other[0].named_parameters())), message)


def _check_loss(task: Prepared, net: nn.Module) -> None:
    net.train()
    loss = task.loss(net, task.batch(np.arange(min(4, task.num_examples("train"))), CPU))
    must(loss.shape == () and loss.dtype == torch.float32, "the loss is no scalar in float32")
    must(bool(torch.isfinite(loss)), f"the loss is {float(loss.detach())}")
    loss.backward()  # type: ignore[no-untyped-call]
    must(any(one.grad is not None for one in net.parameters()), "the loss has no gradient")


def _check_metrics(task: Prepared, net: nn.Module, given: Any, place: Path) -> None:
    net.eval()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    rows = np.arange(task.num_examples("test"))
    file = place / "test.parquet"
    with torch.no_grad():
        found, turned = (task.evaluate(net, order, "test", CPU).metrics for order in (rows, rows[::-1]))
        must(task.main_metric in found, f"the main metric {task.main_metric!r} is not among {', '.join(found)}")
        must(_near(found, turned), f"the order of rows changes metrics: {found} and {turned}")
        if given is not None:
            given.to_parquet(str(file))
            read = task.with_rows(file, {}).evaluate(net, rows, "test", CPU).metrics
            must(_near(found, read), f"the test rows, read from a file, have other metrics: {found} and {read}")
    must(same(dict(net.named_parameters()), before), "an evaluation changes the model")


def _near(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and np.allclose(
        list(one.values()), [other[name] for name in one], rtol=1e-4, atol=1e-5, equal_nan=True
    )


def _check_predictions(task: Prepared, without: Prepared, net: nn.Module, inputs: Sequence[str]) -> None:
    with torch.no_grad():
        said, again = (one.predict(net, list(inputs), CPU) for one in (task, without))
    must(len(said) == len(inputs) > 0, f"{len(inputs)} inputs have {len(said)} predictions")
    must(json.dumps(said) == json.dumps(again), "restored without data, the task predicts something else")


def _check_run(task: Task, source: Source, model: Model, place: Path, learns: bool) -> None:
    experiment = Experiment(
        model=model,
        task=task,
        data=source,
        clients=Clients(num=2, per_round=2, partition=Iid()),
        phases=fedavg(rounds=4, local=dataclasses.replace(LOCAL, max_steps=4)),
        evaluate=Evaluate(every=2),
        device="cpu",
    )
    _check_written(experiment)
    check_resumed(experiment, prepare(experiment), place, learns)

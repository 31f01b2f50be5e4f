"""Contract checks for user-defined components of each slot: call ``check_aggregator(MyRule())`` in a test.

Each check raises ``AssertionError`` with the expected behaviour. A component that takes part in training is run for
four rounds on a tiny model, once without interruption and once interrupted after the second round; both runs must end
with bit-identical results. This is "trains and resumes" below.
"""

from __future__ import annotations

import json
import math
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.config import Evaluate, Experiment, parse, to_toml
from fedlora.config.federated_data import FederatedData
from fedlora.core import tree
from fedlora.core.errors import TrainingError
from fedlora.core.state import Change, Update
from fedlora.core.store import EMPTY
from fedlora.core.tree import Tree
from fedlora.methods import fedavg
from fedlora.population.clients import Clients
from fedlora.population.partitions import Partition
from fedlora.population.skew import Classes, Skew
from fedlora.privacy import Privacy
from fedlora.recipe import Phase
from fedlora.recipe.local import AdamW, ClientOptimizer, Local
from fedlora.rounds.checkpoint import load_state
from fedlora.runs.experiment import run
from fedlora.server.aggregate import Aggregator
from fedlora.server.optimizers import ServerOptimizer
from fedlora.testing.models import equal_population, schema_of, toy_task
from fedlora.transport import Form, Link, Precision, Sparsifier, pack, unpack
from fedlora.tuning import LoRA, LoRAInit, Tuning

LOCAL = Local(optimizer=AdamW(lr=0.02), batch_size=8, epochs=2, dropout=False)
_TIMES = ("seconds", "slowest_seconds", "tier_seconds", "network_seconds")
_NAMES = {"m.lora_A": (2, 6), "m.lora_B": (5, 2), "head.weight": (3, 5)}


def check_aggregator(value: Aggregator, learns: bool = True) -> None:
    """Identical clients count as one, their order is irrelevant, no updates are an error; trains and resumes.

    Args:
        value: the aggregator.
        learns: whether the training loss falls in a few rounds.
    """
    groups = {name: "head" if name.startswith("head") else "adapter" for name in _NAMES}
    params, schema = _tree(0), schema_of(groups)
    cohort = [Update(params, _tree(1 + k), 1.0 + k) for k in range(max(3, value.min_updates))]

    def combined(updates: Iterable[Update]) -> Change:
        accumulator = value.begin(params, schema, EMPTY)
        for update in updates:
            accumulator.add(update)
        return accumulator.finish()

    same = combined(cohort[:1] * max(3, value.min_updates))
    more = combined(cohort[:1] * (max(3, value.min_updates) + 1))
    _close(same.delta, more.delta, "equal clients: one more of them changes the result")
    _close(combined(cohort).delta, combined(cohort[::-1]).delta, "the order of clients changes the result")
    try:
        combined([])
    except TrainingError:
        pass
    else:
        raise AssertionError("without any update, finish() must raise a TrainingError")
    check_training(fedavg(rounds=4, aggregator=value, local=LOCAL), learns)


def check_sparsifier(value: Sparsifier, learns: bool = True) -> None:
    """Pure, with masks of the right shapes, consistent with its ``facts``; trains and resumes, on the uplink.

    Args:
        value: the sparsifier.
        learns: whether the training loss falls in a few rounds.
    """
    params, schema = _tree(3), schema_of({name: "head" if "head" in name else "adapter" for name in _NAMES})
    before = {name: one.clone() for name, one in params.items()}
    mask, again = value.mask(params, schema, 0, 7), value.mask(params, schema, 0, 7)
    for name, one in params.items():
        _must(mask[name].shape == one.shape and mask[name].dtype == torch.bool, f"the mask of {name} is no bool mask")
        _must(torch.equal(mask[name], again[name]), "the same tree, round and seed gave another mask")
        _must(torch.equal(one, before[name]), "the tree that was given is changed")
    sent = value(params, schema, 0, 7)
    for name, one in sent.items():
        _must(bool((one[~mask[name]] == 0).all()), "entries that are not kept must be zero")
    if not value.facts.drops:
        _must(all(bool(one.all()) for one in mask.values()), "facts.drops is False, but entries are left out")
    if not value.facts.reads_values:
        other = value.mask(_tree(4), schema, 0, 7)
        _must(all(torch.equal(mask[name], other[name]) for name in mask), "facts.reads_values is False, but it does")
    if value.facts.unbiased:
        draws = [value(params, schema, 0, seed) for seed in range(2000)]
        for name, one in params.items():
            mean = torch.stack([draw[name] for draw in draws]).mean(0)
            spread = torch.stack([draw[name] for draw in draws]).std(0) / math.sqrt(len(draws))
            _must(bool(((mean - one).abs() <= 5 * spread + 1e-6).all()), f"the mean of {name} is not the input")
    check_training(fedavg(rounds=4, up=Link(sparsify=value), local=LOCAL), learns)


def check_precision(value: Precision, learns: bool = True) -> None:
    """The values read are those the sender expects, ``lossy`` is declared correctly; trains and resumes, both ways.

    Args:
        value: the number format.
        learns: whether the training loss falls in a few rounds.
    """
    parts = {"adapter": _tree(5), "head": {"head.bias": torch.tensor([0.0, -1.5, 3e-6])}}
    packet = pack(parts, dict.fromkeys(parts, Form(value, seed=3)))
    read = unpack(packet.raw, parts, [value])
    for part, one in parts.items():
        for name, sent in one.items():
            _must(
                torch.equal(read[part][name], packet.trees[part][name]),
                "the sender's copy differs from the values received",
            )
            if not value.lossy:
                _must(torch.equal(read[part][name], sent), "lossy is False, but the values received differ")
    link = Link(precision=value)
    check_training(fedavg(rounds=4, down=link, up=link, local=LOCAL), learns)


def check_server_optimizer(value: ServerOptimizer, learns: bool = True) -> None:
    """Pure, preserving names and shapes; trains and resumes.

    Args:
        value: the optimiser.
        learns: whether the training loss falls in a few rounds.
    """
    params, delta = _tree(6), _tree(7)
    before = {name: one.clone() for name, one in (params | {f"d.{n}": d for n, d in delta.items()}).items()}
    moved, slots = value.step(params, delta, {}, 0)
    value.step(moved, delta, slots, 1)
    _must(
        {name: one.shape for name, one in moved.items()} == {name: one.shape for name, one in params.items()},
        "names or shapes of parameters are changed",
    )
    after = params | {f"d.{name}": one for name, one in delta.items()}
    _must(all(torch.equal(after[name], one) for name, one in before.items()), "an argument of step() is changed")
    still, _ = value.step(params, tree.zeros_like(params), {}, 0)
    if not value.decays:
        _close(still, params, "decays is False, but without a change parameters move")
    check_training(fedavg(rounds=4, server=value, local=LOCAL), learns)


def check_client_optimizer(value: ClientOptimizer, learns: bool = True) -> None:
    """Each learning rate scales with its multiplier; trains and resumes.

    Args:
        value: the optimiser.
        learns: whether the training loss falls in a few rounds.
    """
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = value.build(parameters, [1.0, 2.0])
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    first, second = (rates[id(one)] for one in parameters)
    _must(math.isclose(second, 2 * first), f"a factor of 2 gives the learning rate {second} where {first} is that of 1")
    local = Local(optimizer=value, batch_size=8, epochs=2, dropout=False)
    check_training(fedavg(rounds=4, local=local), learns)


def check_privacy(value: Privacy) -> None:
    """Clipped updates are within the bound, noise is reproducible if declared so; trains and resumes.

    Args:
        value: the mechanism.
    """
    now, long = value.at(None), tree.scale(_tree(8), 1e3)
    clipped, whole = now.clipped(long)
    if now.bound is not None:
        _must(tree.norm(clipped) <= now.bound * (1 + 1e-5), "a clipped update is longer than the bound")
        _must(not whole, "an update that was cut counts as whole")
        short = tree.scale(long, 0.5 * now.bound / tree.norm(long))
        _close(now.clip(short), short, "an update within the bound is changed")
    if value.repeatable:
        _close(now.noise(long, 3, 1), now.noise(long, 3, 1), "repeatable is True, but the noise of a round differs")
        check_training(fedavg(rounds=4, privacy=value, local=LOCAL), learns=False)


def check_partition(value: Partition) -> None:
    """Each row is assigned to at most one client, each client has a name, and equal draws give equal partitions.

    Args:
        value: the partition; natural ones are given a column with five owners.
    """
    labels = np.arange(60) % 4
    owners = np.asarray([f"owner {row % 5}" for row in range(60)])
    deals = [value.split(labels, owners, 5, np.random.default_rng(3)) for _ in range(2)]
    rows = np.concatenate(deals[0].groups)
    _must(len(rows) == len(set(rows.tolist())), "a row is assigned twice")
    _must(len(rows) > 0 and rows.min() >= 0 and rows.max() < 60, "there are no such rows")
    _must(len(deals[0].groups) == len(deals[0].names) == len(set(deals[0].names)), "each client needs its own name")
    again = zip(deals[0].groups, deals[1].groups, strict=True)
    _must(all(np.array_equal(*pair) for pair in again), "the same generator gave another assignment")


def check_skew(value: Skew, task: Any = None) -> None:
    """Every training row has a named class, and equal seeds give equal classes.

    Args:
        value: the skew, which defines the classes.
        task: the data, as a ``fedlora.tasks.Prepared``; ``toy_task()`` if absent.
    """
    task = toy_task() if task is None else task
    found, again = (value.classes(task, 3, torch.device("cpu")) for _ in range(2))
    _must(found.numbers.shape == (task.num_examples("train"),), "each row needs a class")
    _must(int(found.numbers.min()) >= 0 and int(found.numbers.max()) < max(1, len(found.names)), "a class has no name")
    _must(np.array_equal(found.numbers, again.numbers), "the same seed gave other classes")


def check_lora_init(value: LoRAInit, learns: bool = True) -> None:
    """Factors of the right shapes, even for ranks larger than any matrix has; LoRA trains and resumes from them.

    Args:
        value: the initialisation.
        learns: whether the training loss falls in a few rounds.
    """
    for rows, columns, rank in ((6, 6, 2), (4, 9, 3), (9, 4, 6)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        b, a = value.factors(weight, None, rank, 0.5, 3)
        _must(b.shape == (rows, rank) and a.shape == (rank, columns), f"the factors are {b.shape} and {a.shape}")
        _must(b.dtype == a.dtype == torch.float32, "the factors are not float32")
        other = value.factors(weight if not value.from_seed else weight + 1, None, rank, 0.5, 3)
        _must(torch.equal(other[0], b) and torch.equal(other[1], a), "the same seed gave other factors")
    check_training(fedavg(rounds=4, tuning=LoRA(rank=4, init=value), local=LOCAL), learns)


def check_tuning(value: Tuning, learns: bool = True) -> None:
    """Has trainable parameters; trains and resumes.

    Args:
        value: the tuning.
        learns: whether the training loss falls in a few rounds.
    """
    check_training(fedavg(rounds=4, tuning=value, local=LOCAL), learns)


def check_training(phases: tuple[Phase, ...], learns: bool = True) -> None:
    """A method round-trips through TOML, trains on a tiny model, and gives bit-identical results if interrupted.

    Args:
        phases: the method's phases, four rounds or more in total.
        learns: whether the training loss falls.
    """
    experiment, data = _toy(phases)
    _must(parse(tomllib.loads(to_toml(experiment))) == experiment, "it changes when written as TOML and read again")
    with tempfile.TemporaryDirectory() as place:
        run(experiment, Path(place) / "whole", data=data)
        run(experiment, Path(place) / "parts", data=data, until=2)
        run(experiment, Path(place) / "parts", data=data)
        whole, parts = (_end(Path(place) / name) for name in ("whole", "parts"))
    _must(whole[0] == parts[0], "a run that was interrupted has another ledger: state is kept outside of its store")
    _must(
        all(torch.equal(one, parts[1][name]) for name, one in whole[1].items()),
        "a run that was interrupted ends with other parameters",
    )
    losses = [row["loss"] for row in whole[0] if row["round"]]
    if learns:
        _must(losses[-1] < losses[0], f"the training loss does not fall: {losses}")


def _toy(phases: tuple[Phase, ...]) -> tuple[Experiment, FederatedData]:
    experiment = Experiment(
        clients=Clients(num=6, per_round=max(3, phases[0].recipe.aggregator.min_updates)),
        phases=phases,
        evaluate=Evaluate(every=2),
    )
    task, rows = toy_task(num_examples=48), np.arange(48)
    classes = Classes(task.labels, list(task.label_names))
    return experiment, FederatedData(task, equal_population(48, 6), rows, "train", torch.device("cpu"), classes)


def _end(folder: Path) -> tuple[list[dict[str, Any]], Tree]:
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    ledger = [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]
    return ledger, load_state(sorted(folder.rglob("round-*"))[-1])[0].params


def _tree(seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in _NAMES.items()}


def _close(found: Tree, expected: Tree, message: str) -> None:
    close = (torch.allclose(found[name], value, rtol=1e-4, atol=1e-5) for name, value in expected.items())
    _must(found.keys() == expected.keys() and all(close), message)


def _must(true: bool, message: str) -> None:
    if not true:
        raise AssertionError(message)

"""Contract checks for user-defined components of each slot: call ``check_aggregator(MyRule())`` in a test.

Each check raises ``AssertionError`` with the expected behaviour. A component that takes part in training is run for
four rounds on a tiny model, once without interruption and once interrupted after the second round; both runs must end
with bit-identical results. This is "trains and resumes" below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fedlora.core import tree
from fedlora.core.errors import TrainingError
from fedlora.core.state import Change, Update
from fedlora.core.store import EMPTY
from fedlora.core.tree import Tree
from fedlora.methods import fedavg
from fedlora.population.partitions import Partition
from fedlora.population.skew import Skew
from fedlora.privacy import Privacy
from fedlora.recipe.local import ClientOptimizer, Local
from fedlora.server.aggregate import Aggregator
from fedlora.server.optimizers import ServerOptimizer
from fedlora.testing.models import schema_of, toy_task
from fedlora.testing.training import LOCAL, check_training, must
from fedlora.transport import Form, Link, Precision, Sparsifier, pack, unpack
from fedlora.tuning import LoRA, LoRAInit, Tuning

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
        must(mask[name].shape == one.shape and mask[name].dtype == torch.bool, f"the mask of {name} is no bool mask")
        must(torch.equal(mask[name], again[name]), "the same tree, round and seed gave another mask")
        must(torch.equal(one, before[name]), "the tree that was given is changed")
    sent = value(params, schema, 0, 7)
    for name, one in sent.items():
        must(bool((one[~mask[name]] == 0).all()), "entries that are not kept must be zero")
    if not value.facts.drops:
        must(all(bool(one.all()) for one in mask.values()), "facts.drops is False, but entries are left out")
    if not value.facts.reads_values:
        other = value.mask(_tree(4), schema, 0, 7)
        must(all(torch.equal(mask[name], other[name]) for name in mask), "facts.reads_values is False, but it does")
    if value.facts.unbiased:
        draws = [value(params, schema, 0, seed) for seed in range(2000)]
        for name, one in params.items():
            mean = torch.stack([draw[name] for draw in draws]).mean(0)
            spread = torch.stack([draw[name] for draw in draws]).std(0) / math.sqrt(len(draws))
            must(bool(((mean - one).abs() <= 5 * spread + 1e-6).all()), f"the mean of {name} is not the input")
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
            must(
                torch.equal(read[part][name], packet.trees[part][name]),
                "the sender's copy differs from the values received",
            )
            if not value.lossy:
                must(torch.equal(read[part][name], sent), "lossy is False, but the values received differ")
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
    must(
        {name: one.shape for name, one in moved.items()} == {name: one.shape for name, one in params.items()},
        "names or shapes of parameters are changed",
    )
    after = params | {f"d.{name}": one for name, one in delta.items()}
    must(all(torch.equal(after[name], one) for name, one in before.items()), "an argument of step() is changed")
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
    must(math.isclose(second, 2 * first), f"a factor of 2 gives the learning rate {second} where {first} is that of 1")
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
        must(tree.norm(clipped) <= now.bound * (1 + 1e-5), "a clipped update is longer than the bound")
        must(not whole, "an update that was cut counts as whole")
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
    must(len(rows) == len(set(rows.tolist())), "a row is assigned twice")
    must(len(rows) > 0 and rows.min() >= 0 and rows.max() < 60, "there are no such rows")
    must(len(deals[0].groups) == len(deals[0].names) == len(set(deals[0].names)), "each client needs its own name")
    again = zip(deals[0].groups, deals[1].groups, strict=True)
    must(all(np.array_equal(*pair) for pair in again), "the same generator gave another assignment")


def check_skew(value: Skew, task: Any = None) -> None:
    """Every training row has a named class, and equal seeds give equal classes.

    Args:
        value: the skew, which defines the classes.
        task: the data, as a ``fedlora.tasks.Prepared``; ``toy_task()`` if absent.
    """
    task = toy_task() if task is None else task
    found, again = (value.classes(task, 3, torch.device("cpu")) for _ in range(2))
    must(found.numbers.shape == (task.num_examples("train"),), "each row needs a class")
    must(int(found.numbers.min()) >= 0 and int(found.numbers.max()) < max(1, len(found.names)), "a class has no name")
    must(np.array_equal(found.numbers, again.numbers), "the same seed gave other classes")


def check_lora_init(value: LoRAInit, learns: bool = True) -> None:
    """Factors of the right shapes, even for ranks larger than any matrix has; LoRA trains and resumes from them.

    Args:
        value: the initialisation.
        learns: whether the training loss falls in a few rounds.
    """
    for rows, columns, rank in ((6, 6, 2), (4, 9, 3), (9, 4, 6)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        b, a = value.factors(weight, None, rank, 0.5, 3)
        must(b.shape == (rows, rank) and a.shape == (rank, columns), f"the factors are {b.shape} and {a.shape}")
        must(b.dtype == a.dtype == torch.float32, "the factors are not float32")
        other = value.factors(weight if not value.from_seed else weight + 1, None, rank, 0.5, 3)
        must(torch.equal(other[0], b) and torch.equal(other[1], a), "the same seed gave other factors")
    check_training(fedavg(rounds=4, tuning=LoRA(rank=4, init=value), local=LOCAL), learns)


def check_tuning(value: Tuning, learns: bool = True) -> None:
    """Has trainable parameters; trains and resumes.

    Args:
        value: the tuning.
        learns: whether the training loss falls in a few rounds.
    """
    check_training(fedavg(rounds=4, tuning=value, local=LOCAL), learns)


def _tree(seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in _NAMES.items()}


def _close(found: Tree, expected: Tree, message: str) -> None:
    close = (torch.allclose(found[name], value, rtol=1e-4, atol=1e-5) for name, value in expected.items())
    must(found.keys() == expected.keys() and all(close), message)

"""What a caller in Python gives to ``run`` and to what it returns, beside an experiment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora.core.errors import ConfigError, DataError

world = pytest.fixture(scope="module")(tiny_world)


class OneClient:
    """A partitioner of the protocol of Flower Datasets that has no clients."""

    dataset: Any = None
    num_partitions = 0


def test_data_of_another_experiment_are_refused(world: Path, tmp_path: Path) -> None:
    held = experiment(world, rounds=1)
    data = fedlora.prepare(held)
    others: dict[str, Any] = {
        r"seed: 0 against 5": {"seed": 5},
        r"clients.num: 9 against 12": {"clients": dataclasses.replace(held.clients, num=12)},
        r"task.max_length: \d+ against 8": {"task": fedlora.TextClassification(max_length=8, pooling="model")},
        r"mode: 'federated' against 'local'": {"mode": "local"},
        r"clients.holdout = 0 keeps none": {"evaluate": fedlora.Evaluate(clients="always")},
    }
    for message, changes in others.items():
        with pytest.raises(ConfigError, match=message):
            fedlora.run(dataclasses.replace(held, **changes), tmp_path / "other", data=data)
    with pytest.raises(ConfigError, match=r"the data are divided already: give the partitioner to fedlora.prepare"):
        fedlora.run(held, tmp_path / "other", data=data, partitioner=OneClient())
    assert not (tmp_path / "other").exists()
    smaller = dataclasses.replace(held, clients=dataclasses.replace(held.clients, per_round=2))
    for number, chosen in enumerate((held, smaller)):  # the cohorts' size divides no data
        fedlora.run(chosen, tmp_path / str(number), data=data)
    assert len(fedlora.run(smaller, tmp_path / "1").rows[1].cohort) == 2


def test_cohorts_are_no_larger_than_the_population_of_shared_data(world: Path, tmp_path: Path) -> None:
    natural = experiment(world, "lora", "clients.partition={kind='natural', column='user'}", rounds=1)
    data = fedlora.prepare(natural)
    larger = dataclasses.replace(natural, clients=dataclasses.replace(natural.clients, per_round=10))
    with pytest.raises(ConfigError, match=r"clients.per_round = 10 exceeds the 9 clients"):
        fedlora.run(larger, tmp_path / "larger", data=data)


def test_one_input_is_no_list_of_letters(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, rounds=1), tmp_path)
    trained = fedlora.load_run(tmp_path)
    assert len(trained.predict(["red w1"])) == 1
    given: Any = "red w1"
    with pytest.raises(DataError, match=r"the inputs are 'red w1', but a list was expected: call predict\(\[...\]\)"):
        trained.predict(given)


def test_a_run_pauses_after_a_round_that_exists(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="until = -1, but the number of a round to pause after was expected"):
        fedlora.run(experiment(world, rounds=1), tmp_path / "run", until=-1)
    assert not (tmp_path / "run").exists()
    assert fedlora.run(experiment(world, rounds=1), tmp_path / "run", until=0).rounds == 0

"""What is told before training: what is trained, and the values of the slots."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny import METHODS, experiment, tiny_world

from fedlora.config.federated_data import prepare
from fedlora.core.errors import ConfigError
from fedlora.show.describe import SLOTS, choices, environment, phase_facts

world = pytest.fixture(scope="module")(tiny_world)


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_number_is_in_a_named_tensor(world: Path, method: str) -> None:
    chosen = experiment(world, method)
    for fact in phase_facts(chosen, prepare(chosen).task):
        counts = 0
        for shape in fact.tensors.values():
            size = 1
            for side in shape:
                size *= side
            counts += size
        assert counts == sum(fact.trainable.values()) <= fact.total
        assert fact.trainable["head"] == 99


def test_full_fine_tuning_trains_all_there_is(world: Path) -> None:
    chosen = experiment(world, "full")
    (fact,) = phase_facts(chosen, prepare(chosen).task)
    assert sum(fact.trainable.values()) == fact.total


def test_choices_are_names_sentences_and_settings() -> None:
    rows = {kind: (text, settings) for kind, text, settings in choices("sparsify")}
    assert rows["top_k"][1].split(", ")[0] == "density"
    assert all(text for text, _ in rows.values())


def test_a_slot_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=f"there is no slot 'x'; there are: {', '.join(SLOTS)}"):
        choices("x")


def test_the_environment_is_words() -> None:
    assert all(isinstance(value, str) and value for value in environment().values())

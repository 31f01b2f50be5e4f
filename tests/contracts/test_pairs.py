"""Every value of every slot beside every value of every other: a pair trains, with an exact resume, or is refused.

What is refused says what to do instead. All pairs that are not stand in a covering array of recipes with many choices
each, and these train and go on from a checkpoint with the same bits; pair by pair, where each learns, is marked slow.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.toy import LOCAL, Federation

from fedlora.core.errors import ConfigError
from fedlora.core.rates import LrScale, Schedule
from fedlora.methods import fedavg
from fedlora.privacy import PRIVACY, CentralGaussian
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe.local import CLIENT_OPTIMIZERS
from fedlora.recipe.local import AdamW as ClientAdamW
from fedlora.recipe.local import Sgd as ClientSgd
from fedlora.recipe.rank_pruning import RankPruning
from fedlora.rounds.checkpoint import load_state, save_state
from fedlora.server.aggregate import AGGREGATORS, Aggregator, Krum, NormBound, TrimmedMean
from fedlora.server.optimizers import SERVER_OPTIMIZERS, Adam, AdamW, FedAdagrad, FedAdam, FedYogi, Sgd
from fedlora.server.pruning import Prune
from fedlora.transport import (
    PRECISIONS,
    SPARSIFIERS,
    BFloat16,
    Float16,
    Link,
    Quota,
    RandomK,
    RankSlice,
    Stage,
    Threshold,
    TopK,
    Uniform,
)
from fedlora.tuning import (
    LORA_INITS,
    TUNINGS,
    BitFit,
    Bottleneck,
    Full,
    HeadOnly,
    LoRA,
    Orthogonal,
    Peft,
    SparseMask,
    SvdOfDelta,
    SvdOfWeight,
)

NOISE = CentralGaussian(clip_norm=5.0, noise_multiplier=0.01, seed=0)
EXAMPLES = ExampleNoise(clip_norm=10.0, noise_multiplier=0.01, seed=0)
AGGREGATOR_VALUES: dict[str, Aggregator] = {
    "trimmed_mean": TrimmedMean(trim=0.25),
    "krum": Krum(faulty=0),
    "norm_bound": NormBound(norm=10.0),
}
# a choice is settings of a recipe; those of a link or of the local turn are joined key by key
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "tuning": {
        "full": {"tuning": Full(), "local": {"optimizer": ClientAdamW(lr=0.002)}},
        "bitfit": {"tuning": BitFit()},
        "head_only": {"tuning": HeadOnly()},
        "sparse_mask": {"tuning": SparseMask(density=0.2)},
        "bottleneck": {"tuning": Bottleneck(width=4)},
        "peft": {"tuning": Peft(config={"peft_type": "LORA", "r": 4, "target_modules": ["query"]})},
        "orthogonal": {"tuning": LoRA(rank=4, init=Orthogonal())},
        "svd_of_weight": {"tuning": LoRA(rank=4, init=SvdOfWeight())},
        "svd_of_delta": {"tuning": LoRA(rank=4, init=SvdOfDelta())},
        "rslora": {"tuning": LoRA(rank=4, alpha=8.0, rslora=True)},
        "dora": {"tuning": LoRA(rank=4, dora=True)},
        "ranks by module": {"tuning": LoRA(rank=4, rank_pattern={"value": 2}, alpha_pattern={"query": 8.0})},
        "one layer": {"tuning": LoRA(rank=4, layers_to_transform=(1,))},
        "train B": {"tuning": LoRA(rank=4, train="B")},
        "train alternate": {"tuning": LoRA(rank=4, train="alternate")},
    },
    "down.sparsify": {
        "down top_k": {"down": {"sparsify": TopK(density=0.5)}},
        "down random_k": {"down": {"sparsify": RandomK(density=0.7, rescale=False)}},
        "down threshold": {"down": {"sparsify": Threshold(value=1e-3)}},
        "down rank_slice": {"down": {"sparsify": RankSlice(rank=2)}},
        "down rank_slice by norm": {"down": {"sparsify": RankSlice(rank=2, by="norm")}},
    },
    "up.sparsify": {
        "up top_k": {"up": {"sparsify": TopK(density=0.3, quota=Quota(head=1.0))}},
        "up random_k": {"up": {"sparsify": RandomK(density=0.5)}},
        "up threshold": {"up": {"sparsify": Threshold(value=1e-3)}},
        "up rank_slice": {"up": {"sparsify": RankSlice(rank=2)}},
    },
    "down.precision": {
        "down bfloat16": {"down": {"precision": BFloat16()}},
        "down float16": {"down": {"precision": Float16()}},
        "down uniform": {"down": {"precision": Uniform(bits=8)}},
    },
    "up.precision": {
        "up bfloat16": {"up": {"precision": BFloat16()}},
        "up float16": {"up": {"precision": Float16()}},
        "up uniform": {"up": {"precision": Uniform(bits=4, block=64)}},
        "up sign": {"up": {"precision": Uniform(bits=1)}},
        "up stages": {"up": {"stages": (Stage(round=2, precision=Uniform(bits=4)),)}},
    },
    "down.reference": {"reference init": {"down": {"reference": "init"}}},
    "feedback": {"up feedback": {"up": {"feedback": True}}, "down feedback": {"down": {"feedback": True}}},
    "memory": {"memory init": {"memory": "init"}, "memory last_round": {"memory": "last_round"}},
    "aggregator": {
        kind: {"aggregator": AGGREGATOR_VALUES.get(kind) or rule()}
        for kind, rule in AGGREGATORS.items()
        if kind != "mean"
    },
    "server": {
        "momentum": {"server": Sgd(lr=0.5, momentum=0.5)},
        "adam": {"server": Adam(lr=0.02)},
        "adamw": {"server": AdamW(lr=0.02)},
        "fed_adam": {"server": FedAdam(lr=0.02)},
        "fed_yogi": {"server": FedYogi(lr=0.02)},
        "fed_adagrad": {"server": FedAdagrad(lr=0.02)},
        "server lr_scale": {"server": Sgd(lr_scale=LrScale(head=1.5))},
        "server schedule": {"server": Sgd(schedule=Schedule(shape="cosine", warmup=0.2))},
    },
    "privacy": {
        "central_gaussian": {"privacy": NOISE},
        "a clip that adapts": {"privacy": replace(NOISE, quantile=0.5)},
        "noise for examples": {"local": {"example_privacy": EXAMPLES, "epochs": 1}},
    },
    "local": {
        "client sgd": {"local": {"optimizer": ClientSgd(lr=0.05)}},
        "keep_optimizer": {"local": {"keep_optimizer": True}},
        "accumulate": {"local": {"accumulate": 3}},
        "proximal": {"local": {"proximal": 0.01}},
        "clip_norm": {"local": {"clip_norm": 1.0}},
        "bf16": {"local": {"compute": "bf16"}},
        "client lr_scale": {"local": {"lr_scale": LrScale(head=2.0)}},
    },
    "server_head": {"server_head": {"server_head": AdamW(lr=0.02)}},
    "shrink": {"shrink": {"shrink": RankPruning(keep=0.6)}},
    "prune": {"prune": {"prune": Prune(density=0.6)}},
}
PAIRS = [
    (one, other) for first, second in combinations(CHOICES, 2) for one in CHOICES[first] for other in CHOICES[second]
]
VALUES = {name: choice for slot in CHOICES.values() for name, choice in slot.items()}
ROUNDS = 4


def test_every_value_of_every_table_is_here() -> None:
    there = " ".join(VALUES)
    for table in (AGGREGATORS, SPARSIFIERS, PRECISIONS, PRIVACY, TUNINGS, LORA_INITS):
        # defaults are on the other side of every pair
        assert not [kind for kind in table if kind not in there and kind not in DEFAULTS], table
    kinds = {type(choice["server"]).__name__ for choice in CHOICES["server"].values()}
    assert kinds == {cls.__name__ for cls in SERVER_OPTIMIZERS.values()}
    assert set(CLIENT_OPTIMIZERS) == {"sgd", "adamw"}


DEFAULTS = {"mean", "dense", "float32", "none", "lora", "kaiming"}


def phases_of(*names: str) -> Any:
    settings: dict[str, Any] = {"tuning": LoRA(rank=4), "down": {}, "up": {}, "local": {}}
    for name in names:
        for key, value in VALUES[name].items():
            settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    settings["down"], settings["up"] = Link(**settings["down"]), Link(**settings["up"])
    settings["local"] = replace(LOCAL, **settings["local"])
    return fedavg(rounds=ROUNDS, **settings)


@functools.cache
def refusal(*names: str) -> str:
    """Why a recipe of these choices is refused; empty if it is not."""
    try:
        phases_of(*names)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_value_alone_is_refused_only_where_it_needs_another() -> None:
    assert [name for name in VALUES if refusal(name)] == ["up feedback"]  # it needs clients that remember


def test_refusals_are_the_exception() -> None:
    refused = sum(bool(refusal(*pair)) for pair in PAIRS)
    assert refused < 0.2 * len(PAIRS)


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def covering() -> list[tuple[str, ...]]:
    """Recipes of many choices each, greedily, until every pair that is not refused is in one of them."""
    left = {pair for pair in PAIRS if not refusal(*pair)}
    found = []
    while left:
        chosen = list(min(left))
        free = [slot for slot, values in CHOICES.items() if not set(values) & set(chosen)]
        open_pairs = Counter(name for pair in left for name in pair)
        for slot in sorted(free, key=lambda slot: -sum(open_pairs[name] for name in CHOICES[slot])):
            gains = {name: sum(_ordered(name, one) in left for one in chosen) for name in CHOICES[slot]}
            fit = (name for name in sorted(gains, key=lambda name: -gains[name]) if gains[name])
            chosen += [name for name in fit if not refusal(*chosen, name)][:1]
        left -= {_ordered(*pair) for pair in combinations(chosen, 2)}
        found.append(tuple(chosen))
    return found


PLACES = {name: place for place, name in enumerate(VALUES)}


def _ordered(one: str, other: str) -> tuple[str, str]:
    return (one, other) if PLACES[one] < PLACES[other] else (other, one)


COVERING = covering()


def test_every_pair_that_is_not_refused_is_in_a_recipe() -> None:
    covered = {frozenset(pair) for recipe in COVERING for pair in combinations(recipe, 2)}
    assert all(refusal(*pair) or frozenset(pair) in covered for pair in PAIRS)


def test_a_pair_that_is_refused_says_what_to_do_instead() -> None:
    advice = ("set ", "use ", "leave ", "choose ", "is about", "beside prune")
    told = {pair: refusal(*pair) for pair in PAIRS}
    assert {pair: text for pair, text in told.items() if text and not any(word in text for word in advice)} == {}


@pytest.mark.parametrize("names", COVERING, ids=" + ".join)
def test_a_recipe_of_many_choices_trains_and_resumes(names: tuple[str, ...], tmp_path: Path) -> None:
    # a round fills every memory, and the next one reads it
    before, end = _trained_and_resumed(names, tmp_path, 12, half=1, rounds=2)
    # so many choices at once may learn slowly, never nothing
    assert end != before


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not refusal(*pair)], ids=" + ".join)
def test_a_pair_trains_and_resumes(pair: tuple[str, str], tmp_path: Path) -> None:
    before, end = _trained_and_resumed(pair, tmp_path)
    assert end < before


def _trained_and_resumed(
    names: tuple[str, ...], folder: Path, num_examples: int = 48, half: int = ROUNDS // 2, rounds: int = ROUNDS
) -> tuple[float, float]:
    """The loss before and after a run that goes on from a checkpoint with the same bits."""
    federation = Federation(phases_of(*names), num_examples)
    state = federation.start()
    before = federation.loss(state)
    stopped = federation.go_on(state, half)
    save_state(stopped, folder / "state", {})
    end = federation.go_on(stopped, rounds)
    fresh = Federation(phases_of(*names), num_examples)  # nothing is left of what was resident
    fresh.start()
    again = fresh.go_on(load_state(folder / "state")[0], rounds)
    assert all(torch.equal(again.params[name], value) for name, value in end.params.items())
    assert fresh.rows[-1].down_bytes == federation.rows[-1].down_bytes
    assert fresh.rows[-1].up_bytes == federation.rows[-1].up_bytes
    return before, federation.loss(end)

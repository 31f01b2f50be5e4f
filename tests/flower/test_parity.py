"""Every method, and links of every kind: the same bits and the same ledger in one process, under Ray, and over TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny import LOCAL, document, ledger

import fedlora
from fedlora import config
from fedlora.config import Experiment
from fedlora.federation.deploy.federate import federate
from fedlora.federation.deploy.simulate import with_ray, write_site
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.protocol.transport import Transport
from fedlora.methods import METHODS
from fedlora.rounds.checkpoint import load_state

from .conftest import Federation, needs_ray

WARM = {"warm_rounds": 1, "warm_local": LOCAL}
SETTINGS: dict[str, dict[str, Any]] = {
    "slora": {**WARM, "density": 0.1},
    "primed_lora": WARM,
    "fed_select": {"keep": 0.8},
    "adapter_lth": {"keep": 0.8},
    "sparse_adapter": {"density": 0.25},
}
FEW = {"kind": "uniform", "bits": 4, "block": 64, "rounding": "stochastic"}
OVER = {"kind": "fedavg", "tuning": {"kind": "lora", "rank": 4}}
LINKS: dict[str, dict[str, Any]] = {
    "flasc from the start": {"kind": "flasc", "reference": "init", "memory": "init"},
    "flasc, last round, 4 bits, feedback": {
        "kind": "flasc",
        "precision": FEW,
        "feedback": True,
        "memory": "last_round",
    },
    "bfloat16": {"kind": "lora", "precision": {"kind": "bfloat16"}},
    "float16, head apart": {
        **OVER,
        "down": {"precision": {"kind": "float16"}, "head_precision": {"kind": "float32"}},
    },
    "random_k up": {**OVER, "up": {"sparsify": {"kind": "random_k", "density": 0.5}}},
    "threshold up": {**OVER, "up": {"sparsify": {"kind": "threshold", "value": 1e-3}}},
    "rank slice down": {**OVER, "down": {"sparsify": {"kind": "rank_slice", "rank": 2}}},
    "1 bit up, feedback": {
        **OVER,
        "memory": "init",
        "up": {"precision": {"kind": "uniform", "bits": 1}, "feedback": True},
    },
    "stages": {**OVER, "up": {"stages": [{"round": 1, "precision": {"kind": "uniform", "bits": 8}}]}},
    "optimisers that stay": {**OVER, "memory": "init", "local": {**LOCAL, "keep_optimizer": True}},
    "folds remembered": {**OVER, "memory": "init", "aggregator": {"kind": "product_exact"}},
}
TIERS = [{"name": "weak", "share": 0.5, "rank": 1}, {"name": "strong", "share": 0.5}]


def runs(root: Path) -> dict[str, Experiment]:
    found = {}
    tables = {kind: {"kind": kind, **SETTINGS.get(kind, {})} for kind in METHODS} | LINKS | {"tiers": {"kind": "lora"}}
    for name, table in tables.items():
        values = document(root, "lora", "clients.per_round=4", "clients.num=8")
        values["method"] = {"rounds": 3, "local": LOCAL, **table}
        values["label"] = name.replace(" ", "_").replace(",", "")
        if name == "tiers":
            values["clients"]["tiers"] = TIERS
        found[name] = config.parse(values)
    return found


NAMES = [*METHODS, *LINKS, "tiers"]
SOON = ("slora", "rolora", "flora", "flasc, last round, 4 bits, feedback", "tiers")
"""What goes over TLS in every run of the tests: a phase that follows, factors, folds, memory, ranks; Ray has all."""


@pytest.fixture(scope="module")
def serial(root: Path) -> Path:
    for experiment in runs(root).values():
        fedlora.run(experiment, root / "serial" / experiment.label)
    return root / "serial"


@pytest.fixture(scope="module")
def ray(root: Path) -> Iterator[Path]:
    def main(transport: Transport) -> None:
        write_site(root / "simulation", "cpu")
        for experiment in runs(root).values():
            federate(
                experiment, root / "ray" / experiment.label, transport, ServerPolicy(round_timeout=300), anywhere=True
            )

    with_ray(main, root / "simulation", workers=2)
    return root / "ray"


def assert_same(one: Path, other: Path) -> None:
    assert ledger(one) == ledger(other)
    left, right = (load_state(sorted((each / "checkpoints").glob("round-*"))[-1])[0] for each in (one, other))
    assert left.round == right.round == 3
    for part in ("params", "init", "parts", "known"):
        assert list(getattr(left, part)) == list(getattr(right, part))
    assert [name for name, value in left.params.items() if not torch.equal(value, right.params[name])] == []
    assert [name for name, value in left.folds.total.items() if not torch.equal(value, right.folds.total[name])] == []


@needs_ray
@pytest.mark.parametrize("name", NAMES)
def test_ray_gives_the_bits_of_one_process(root: Path, serial: Path, ray: Path, name: str) -> None:
    label = runs(root)[name].label
    assert_same(ray / label, serial / label)


@pytest.mark.parametrize(
    "name", [name if name in SOON else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_four_sites_over_tls_give_the_bits_of_one_process(
    root: Path, serial: Path, federation: Federation, name: str
) -> None:
    experiment = runs(root)[name]
    before = len(federation.told.messages)
    federation.run(experiment, root / "deployed" / experiment.label, ServerPolicy(min_available=8, round_timeout=120))
    assert_same(root / "deployed" / experiment.label, serial / experiment.label)
    assert [text for text in federation.told.messages[before:] if "sent again" in text] == []

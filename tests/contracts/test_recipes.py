"""Every method through the same properties; a new one joins by its line in the table."""

from __future__ import annotations

import inspect
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.toy import LOCAL, Federation

from fedlora import config
from fedlora.config import Experiment
from fedlora.methods import METHODS, Phases
from fedlora.rounds.checkpoint import load_state, save_state
from fedlora.rounds.ledger import RoundRecord
from fedlora.server.optimizers import Sgd

COMMON: dict[str, Any] = {"rounds": 6, "local": LOCAL}
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "flasc": {"rank": 4},
    "federa": {"rank": 4},
    "slora": {"rank": 4, "warm_rounds": 2, "density": 0.2, "mask_targets": "all-linear"},
    "primed_lora": {"rank": 4, "warm_rounds": 2},
}
"""What methods want beyond rounds and a local turn on a tiny model; nothing if they are not here."""


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def phases_of(method: str) -> Phases:
    # six rounds are few for the methods' own server, whose steps do not grow with the change
    plain = {"server": Sgd()} if "server" in inspect.signature(METHODS[method]).parameters else {}
    return METHODS[method](**COMMON, **plain, **SMALL.get(method, {}))


@pytest.mark.parametrize("method", METHODS)
def test_its_configuration_survives_toml(method: str) -> None:
    experiment = Experiment(label=method, phases=phases_of(method))
    assert config.parse(tomllib.loads(config.to_toml(experiment))) == experiment


@pytest.mark.parametrize("method", METHODS)
def test_its_loss_falls_and_saved_and_loaded_in_every_round_it_ends_in_the_same_bits(
    method: str, tmp_path: Path
) -> None:
    whole = Federation(phases_of(method), 24)
    start = whole.start()
    before = whole.loss(start)
    expected = whole.go_on(start, 6)
    assert whole.loss(expected) < 0.9 * before
    state = Federation(phases_of(method), 24).start()
    rows: list[RoundRecord] = []
    for rounds in range(1, 7):
        # a workspace of its own each time, as in a process of its own
        federation = Federation(phases_of(method), 24)
        save_state(federation.go_on(state, rounds), tmp_path / "state", {})
        state, _ = load_state(tmp_path / "state")
        rows += federation.rows
    assert list(state.params) == list(expected.params)
    assert all(torch.equal(state.params[name], value) for name, value in expected.params.items())
    assert [(row.loss, row.down_bytes, row.up_bytes) for row in rows] == [
        (row.loss, row.down_bytes, row.up_bytes) for row in whole.rows
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_round_sends_parameters_both_ways_and_trains_the_head(method: str) -> None:
    federation = Federation(phases_of(method))
    start = federation.start()
    end = federation.go_on(start, 2)
    for row in federation.rows:
        assert row.down_bytes["head"] > 0
        assert row.up_bytes["head"] > 0
        assert row.up_bytes["report"] > 0
    assert any(
        not torch.equal(start.params[n], end.params[n]) for n, group in start.schema.groups.items() if group == "head"
    )


@pytest.mark.parametrize("method", METHODS)
def test_it_cites_its_paper_in_one_sentence(method: str) -> None:
    text = (METHODS[method].__doc__ or "").split("\n")[0]
    assert text
    assert "arXiv" in text or method in ("full", "primed_lora")

"""Every method through the same properties; a new one joins by its line in the table."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora import config
from fedlora.config import Experiment
from fedlora.engines import Serial
from fedlora.local import AdamW, Local
from fedlora.methods import METHODS, Phases
from fedlora.round import Row, close_phase, open_phase, run_round, view
from fedlora.server_optim import Sgd
from fedlora.state import ServerState, load_state, save_state
from fedlora.testing import equal_population, toy_task
from fedlora.workspace import Workspace

CPU = torch.device("cpu")
LOCAL = Local(optimizer=AdamW(lr=0.02), batch_size=8, epochs=2, dropout=False)
COMMON: dict[str, Any] = {"rounds": 6, "local": LOCAL}
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "flasc": {"rank": 4, "server": Sgd()},
    "federa": {"rank": 4},
    "slora": {"rank": 4, "warm_rounds": 2, "warm_local": LOCAL, "density": 0.2},
    "primed_lora": {"rank": 4, "warm_rounds": 2, "warm_local": LOCAL},
}
"""What methods want beyond rounds and a local turn on a tiny model; nothing if they are not here."""


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def phases_of(method: str) -> Phases:
    return METHODS[method](**COMMON, **SMALL.get(method, {}))


class Federation:
    """A run of six rounds over three clients, from a state or from the beginning."""

    def __init__(self, method: str) -> None:
        self.phases = phases_of(method)
        self.workspace = Workspace(toy_task(num_examples=48), 0, CPU)
        self.engine = Serial(self.workspace, equal_population(48, 3))
        self.rows: list[Row] = []

    def start(self) -> ServerState:
        return open_phase(self.workspace, 0, self.phases[0].recipe, 0, 0, None)[0]

    def go_on(self, state: ServerState, rounds: int) -> ServerState:
        self.workspace.settle(state.phase, self.phases[state.phase].recipe, state.setup)
        while state.round < rounds:
            recipe = self.phases[state.phase].recipe
            if state.steps == self.phases[state.phase].rounds:
                carry = close_phase(self.workspace, recipe, state)
                recipe = self.phases[state.phase + 1].recipe
                state, _ = open_phase(self.workspace, state.phase + 1, recipe, 0, state.round, carry)
            state, row = run_round(recipe, state, (2, 0, 1), self.engine, seed=0, rounds=6)
            self.rows.append(row)
        return state

    def loss(self, state: ServerState) -> float:
        self.workspace.installed.load(view(self.phases[state.phase].recipe, state, 0))
        return self.workspace.evaluate(np.arange(48), "train", "fp32").metrics["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_its_configuration_survives_toml(method: str) -> None:
    experiment = Experiment(label=method, phases=phases_of(method))
    assert config.parse(tomllib.loads(config.to_toml(experiment))) == experiment


@pytest.mark.parametrize("method", METHODS)
def test_its_loss_falls(method: str) -> None:
    federation = Federation(method)
    state = federation.start()
    before = federation.loss(state)
    assert federation.loss(federation.go_on(state, 6)) < 0.8 * before


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_in_every_round_it_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = Federation(method)
    expected = whole.go_on(whole.start(), 6)
    state = Federation(method).start()
    rows: list[Row] = []
    for rounds in range(1, 7):
        # a workspace of its own each time, as in a process of its own
        federation = Federation(method)
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
    federation = Federation(method)
    start = federation.start()
    end = federation.go_on(start, 2)
    for row in federation.rows:
        assert row.down_bytes["head"] > 0
        assert row.up_bytes["head"] > 0
        assert row.up_bytes["report"] > 0
    assert any(not torch.equal(start.params[n], end.params[n]) for n, group in start.groups.items() if group == "head")


@pytest.mark.parametrize("method", METHODS)
def test_it_cites_its_paper_in_one_sentence(method: str) -> None:
    text = (METHODS[method].__doc__ or "").split("\n")[0]
    assert text
    assert "arXiv" in text or method in ("full", "primed_lora")

"""Runs of the FLASC authors' own code, reproduced through our round, client, wire and PEFT import."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fixtures.shared import shared
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig

from fedlora.client.workspace import Workspace
from fedlora.engines import Serial
from fedlora.methods import flasc
from fedlora.population.clients import Population
from fedlora.recipe.local import Local
from fedlora.recipe.local import Sgd as ClientSgd
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.server.optimizers import AdamW, Sgd
from fedlora.testing import TensorTask
from fedlora.tuning import from_peft, to_peft

SERVERS = {"torch.optim.SGD": Sgd, "torch.optim.AdamW defaults (weight_decay 0.01)": AdamW}


@pytest.mark.parametrize("name", ["dense_sgd", "quarter_adamw", "asymmetric_sgd"])
def test_final_parameters_equal_the_recorded_ones(name: str) -> None:
    folder = shared(f"golden/flasc/{name}")
    settings = json.loads((folder / "settings.json").read_text())
    data = load_file(folder / "data.safetensors")
    names = sorted(key.removesuffix(".input_ids") for key in data if key.endswith(".input_ids"))
    tokens = torch.cat([data[f"{key}.input_ids"] for key in names])
    labels = torch.cat([data[f"{key}.labels"] for key in names])
    owners = np.concatenate([[int(key[6])] * len(data[f"{key}.labels"]) for key in names])
    sizes = np.bincount(owners)
    population = Population(
        tuple(map(str, range(len(sizes)))), np.arange(len(labels)), np.concatenate([[0], np.cumsum(sizes)])
    )

    def make_model() -> torch.nn.Module:
        model = AutoModelForSequenceClassification.from_config(BertConfig.from_pretrained(folder))
        model.load_state_dict(load_file(folder / "base.safetensors"))
        return model

    task = TensorTask(make_model, tokens, labels, attention=False)
    recipe = flasc(
        reference="zero",
        rounds=settings["rounds"],
        rank=settings["lora"]["r"],
        alpha=settings["lora"]["lora_alpha"],
        targets=tuple(settings["lora"]["target_modules"]),
        down=settings["download_density"],
        up=settings["upload_density"],
        server=SERVERS[settings["server_optimizer"]](lr=settings["server_lr"]),
        local=Local(
            optimizer=ClientSgd(lr=settings["client_lr"], momentum=0.9),
            epochs=settings["local_epochs"],
            batch_size=4,
            shuffle=False,
            dropout=False,
        ),
    )[0].recipe
    workspace = Workspace(task, 0, torch.device("cpu"))
    state, _ = open_phase(workspace, 0, recipe, seed=0, rounds_done=0, carry=None)
    initial = from_peft(load_file(folder / "init.safetensors"))
    assert set(initial) == set(state.params)
    order = list(state.params)
    assert order == list(from_peft(dict.fromkeys(settings["order"], torch.zeros(1))))
    params = {key: initial[key] for key in order}
    state = state.__class__(**{**vars(state), "params": params, "init": params})
    engine = Serial(workspace, population)
    for cohort in settings["cohorts"]:
        state, row = run_round(recipe, state, tuple(cohort), engine, seed=0, rounds=settings["rounds"])
        assert row.density_up <= settings["upload_density"] + 1e-9
    expected = load_file(folder / "final.safetensors")
    ours = to_peft(state.params)
    assert set(ours) == set(expected)
    worst = max(float((ours[key] - value).abs().max()) for key, value in expected.items())
    moved = max(float((ours[key] - load_file(folder / "init.safetensors")[key]).abs().max()) for key in expected)
    assert worst < 1e-5 < moved

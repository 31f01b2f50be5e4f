"""Runs with rsLoRA, DoRA, and ranks by module: exports, warm starts, bytes, folds and notes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.more import some_of
from fixtures.tiny import experiment, ledger, tiny_world
from peft import PeftModel
from safetensors.torch import load_file
from test_export import original, ours, probabilities, with_peft
from transformers import AutoModel, AutoModelForSequenceClassification

import fedlora
from fedlora.config.federated_data import prepare
from fedlora.core.errors import ConfigError
from fedlora.rounds.checkpoint import load_state
from fedlora.runs.cost import costs
from fedlora.runs.folder import RunFolder

world = pytest.fixture(scope="module")(tiny_world)
DORA = "method.tuning.dora=true"
RSLORA = "method.tuning.rslora=true"
RANKS = ("method.tuning.rank_pattern={value=2, '1.attention.self.value'=3}", "method.tuning.alpha_pattern={query=9.0}")
POOLER = "model.head=['bert.pooler']"
RUNS: dict[str, tuple[str, ...]] = {
    "rslora": ("lora", RSLORA),
    "dora": ("lora", DORA, POOLER),
    "dora, sparse": ("flasc", DORA, "method.memory='last_round'", "method.precision={kind='uniform', bits=8}"),
    "dora from svd": ("federa", DORA, *RANKS),
    "ranks": ("flasc", RSLORA, *RANKS),
    "after a mask": ("slora", RSLORA, *RANKS, "method.tuning.dropout=0.1"),
    "a layer": ("federa", "method.tuning.layers_to_transform=[1]"),
}


def run_of(world: Path, name: str) -> Path:
    folder = world / "runs" / name
    if not folder.exists():
        method, *settings = RUNS[name]
        fedlora.run(experiment(world, method, "method.alpha=12.0", *settings), folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_peft_and_a_merged_model_say_what_the_run_says(world: Path, tmp_path: Path, name: str) -> None:
    run = run_of(world, name)
    says = ours(run)
    assert float((probabilities(original(world, "bert"), world / "bert") - says).abs().max()) > 1e-3
    loaded = with_peft(world, "bert", run / "adapter")
    torch.testing.assert_close(probabilities(loaded, world / "bert"), says, atol=1e-4, rtol=0)
    fedlora.load_run(run).export(tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(probabilities(merged, world / "bert"), says, atol=1e-4, rtol=0)


def test_patterns_of_an_adapter_on_a_backbone_have_the_names_there(world: Path, tmp_path: Path) -> None:
    pooled = 'task={kind="text_classification", pooling="mean"}'
    fedlora.run(experiment(world, "federa", pooled, DORA, *RANKS, rounds=1), tmp_path)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    keys = {key for name in ("rank_pattern", "alpha_pattern") for key in settings[name]}
    assert {key.removeprefix("^").replace("\\.", ".") for key in keys} == set(settings["target_modules"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(world / "bert"), str(tmp_path / "adapter"))
    ids = torch.tensor([[2, 7, 9, 30, 3]])
    with torch.no_grad():
        says = loaded.eval()(ids).last_hidden_state.mean(1)
    model = fedlora.load_run(tmp_path).workspace.model.eval()
    with torch.no_grad():
        (inner,) = [module for name, module in model.named_modules() if name == "bert"]
        torch.testing.assert_close(inner(ids).last_hidden_state.mean(1), says, atol=1e-4, rtol=0)


def test_a_module_of_the_head_is_a_saved_module_of_peft(world: Path) -> None:
    settings = json.loads((run_of(world, "dora") / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert settings["use_dora"]


@pytest.mark.parametrize("first", ["rslora", "dora", "ranks"])
@pytest.mark.parametrize("then", [(), (RSLORA, "method.rank=6", "method.tuning.alpha_pattern={value=3.0}")])
def test_a_run_starts_where_another_ended(world: Path, tmp_path: Path, first: str, then: tuple[str, ...]) -> None:
    run = run_of(world, first)
    own = [one for one in RUNS[first][1:] if one in (DORA, POOLER)]
    begin = experiment(world, "lora", f'init_from="{run / "adapter"}"', *own, *then, rounds=1)
    result = fedlora.run(begin, tmp_path)
    ended = json.loads((run / "result.json").read_text())["after"]
    assert result.before["loss"] == pytest.approx(ended["loss"], rel=1e-4)


def test_dora_starts_from_dora_alone(world: Path, tmp_path: Path) -> None:
    for first, setting, text in (("dora", "false", "with DoRA, .* set it to true"), ("rslora", "true", "without DoRA")):
        given = f'init_from="{run_of(world, first) / "adapter"}"'
        with pytest.raises(ConfigError, match=text):
            fedlora.run(experiment(world, "lora", given, f"method.tuning.dora={setting}"), tmp_path)


def test_a_pattern_of_an_adapter_is_no_regular_expression(world: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = json.loads((run_of(world, "ranks") / "adapter" / "adapter_config.json").read_text())
    assert settings["alpha_pattern"]
    settings["alpha_pattern"] = {"(a+)+": 3.0}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"alpha_pattern of .*adapter_config.json has '\(a\+\)\+', which is no name"):
        fedlora.run(experiment(world, "lora", f'init_from="{adapter}"'), tmp_path / "run")


BYTES: dict[str, tuple[str, ...]] = {
    "dora": ("flasc", DORA),
    "flora": ("flora", *RANKS),
    "fedex": ("fedex", *RANKS, "method.memory='init'"),
}


@pytest.mark.parametrize("name", some_of(BYTES, ("dora", "fedex")))
def test_the_bytes_told_are_the_bytes_sent(world: Path, tmp_path: Path, name: str) -> None:
    method, *settings = BYTES[name]
    chosen = experiment(world, method, "method.local.batch_size=2", *settings, rounds=8)
    result = fedlora.run(chosen, tmp_path)
    (phase,) = costs(chosen, prepare(chosen))
    sent = (sum(result.down_bytes.values()), sum(result.up_bytes.values()))
    assert phase.all_bytes == pytest.approx(sent, rel=0.04)


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_rules_on_products_fold_into_modules_of_unequal_ranks(world: Path, tmp_path: Path, method: str) -> None:
    # a client alone is the mean of the cohort, so that its model is that of plain averaging
    alone = ("clients.num=1", "clients.per_round=1", *RANKS, "method.server={kind='sgd'}")
    plain = fedlora.run(experiment(world, "lora", *alone, rounds=1), tmp_path / "plain")
    averaged = (*alone, "method.server_head={kind='sgd'}")
    result = fedlora.run(experiment(world, method, *averaged, rounds=1), tmp_path / "run")
    assert result.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-4)
    if method == "flora":
        latest = RunFolder(tmp_path / "run").latest()
        assert latest is not None
        folds = latest[0].folds.total
        assert {int(torch.linalg.matrix_rank(fold)) for fold in folds.values()} == {2, 3, 4}


def test_a_rank_above_a_side_is_in_the_ledger_once(world: Path, tmp_path: Path) -> None:
    wide = ("method.rank=40", "method.targets=['query', 'output.dense']")
    fedlora.run(experiment(world, "lora", *wide), tmp_path)
    notes = [note for row in ledger(tmp_path) for note in row["warnings"] if "adapters is the smaller side" in note]
    assert len(notes) == 1
    assert "such as 32 instead of 40" in notes[0]
    assert notes[0] in ledger(tmp_path)[0]["warnings"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {32}
    with pytest.raises(ConfigError, match="rank = 40 is above the smaller side of"):
        fedlora.run(experiment(world, "lora", *wide, "method.tuning.strict_rank=true"), tmp_path / "strict")


def test_a_later_phase_says_so_in_its_first_row(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "slora", "method.rank=40"), tmp_path)
    told = [row["round"] for row in ledger(tmp_path) if any("the smaller side" in note for note in row["warnings"])]
    assert told == [2]


@pytest.mark.parametrize("name", ["dora, sparse", "ranks"])
def test_a_run_in_two_parts_has_the_same_bits(world: Path, tmp_path: Path, name: str) -> None:
    method, *settings = RUNS[name]
    chosen: Any = experiment(world, method, "method.alpha=12.0", *settings)
    fedlora.run(chosen, tmp_path, until=2)
    fedlora.run(chosen, tmp_path)
    left, right = (load_state(folder / "checkpoints" / "round-000003")[0] for folder in (tmp_path, run_of(world, name)))
    assert all(torch.equal(left.params[key], value) for key, value in right.params.items())

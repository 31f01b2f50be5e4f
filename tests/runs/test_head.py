"""What counts as the head, and a head that is not trained: groups, bytes, exports, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures.tiny import contents, experiment, ledger, save_model, tiny_world
from peft import PeftModel
from safetensors.torch import load_file
from test_export import original, ours, probabilities, with_peft
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

import fedlora
from fedlora.cli.main import app
from fedlora.config import to_toml
from fedlora.core.errors import ConfigError
from fedlora.core.state import named_seed
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.experiment import Stopped
from fedlora.show.describe import phase_facts
from fedlora.tasks import Model
from fedlora.tasks.models.heads import parameters_of
from fedlora.tasks.models.loading import load_pretrained
from fedlora.testing import tiny_model
from fedlora.tuning import LoRA
from fedlora.tuning.export import save_lora

CPU = torch.device("cpu")
POOLER = "model.head=['bert.pooler']"
FROZEN = "model.train_head=false"
HEAD = {"classifier.weight", "classifier.bias"}
POOLED = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module", autouse=True)
def _bare(world: Path) -> None:
    """A checkpoint without a classifier, so that a head that is not carried along shows."""
    AutoModel.from_pretrained(save_model(world / "bert")).save_pretrained(world / "bert")


def groups(chosen: Any) -> list[dict[str, int]]:
    task = chosen.task.restore(chosen.model, ["blue", "green", "red"])
    return [facts.trainable for facts in phase_facts(chosen, task)]


def weights(run: Path) -> dict[str, Tensor]:
    return dict(fedlora.load_run(run).workspace.model.named_parameters())


def carried(model: Any, values: dict[str, Tensor], names: set[str]) -> None:
    for name in names:
        torch.testing.assert_close(values[name], model[name], atol=1e-6, rtol=0)


# ---- modules that belong to the head


@pytest.mark.parametrize("entry", ["bert.pooler", "pooler", "pooler.dense"])
def test_a_module_is_named_whole_or_by_its_last_parts(entry: str) -> None:
    assert parameters_of(tiny_model("bert"), (entry,)) == POOLED


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("poler", r"no such module with parameters; the nearest names are: bert\.pooler"),
        ("bert.dropout", "no such module with parameters; the nearest names are"),
        ("xyz", "no such module with parameters; it has: "),
    ],
)
def test_a_module_that_is_not_there_is_refused_with_the_nearest(entry: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parameters_of(tiny_model("bert"), (entry,))


def test_a_tied_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the weight of lm_head is that of transformer\.wte too"):
        parameters_of(tiny_model("gpt2", head="CausalLM"), ("lm_head",))


def test_a_pooler_that_pooling_leaves_out_is_refused(world: Path) -> None:
    chosen = experiment(world, "lora", POOLER, "task={kind='text_classification', pooling='mean'}")
    with pytest.raises(ConfigError, match=r"model.head has 'bert.pooler', but a classifier that reads pooled tokens"):
        groups(chosen)


def test_the_pooler_in_the_head_learns_and_is_exported(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", POOLER, "method.targets='all-linear'")
    run = tmp_path / "run"
    result = fedlora.run(chosen, run)
    assert result.after["loss"] < result.before["loss"]
    model = fedlora.load_run(run).workspace
    assert {name for name, group in model.installed.schema.groups.items() if group == "head"} == HEAD | POOLED
    base = dict(AutoModel.from_pretrained(world / "bert").named_parameters())
    moved = weights(run)["bert.pooler.dense.weight"] - base["pooler.dense.weight"]
    assert float(moved.detach().abs().max()) > 1e-3
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    found = with_peft(world, "bert", run / "adapter")
    torch.testing.assert_close(probabilities(found, world / "bert"), ours(run), atol=1e-4, rtol=0)
    fedlora.load_run(run).export(tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(probabilities(merged, tmp_path / "merged"), ours(run), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["full", "bitfit", "slora", "bottleneck", "peft", "head_only"])
def test_every_tuning_trains_it(world: Path, method: str) -> None:
    plain, more = groups(experiment(world, method)), groups(experiment(world, method, POOLER))
    for one, other in zip(plain, more, strict=True):
        assert other["head"] - one["head"] == 32 * 33
        assert one.get("adapter", 0) >= other.get("adapter", 0)


def test_a_whole_layer_may_be_head(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "model.head=['encoder.layer.1', 'embeddings']")
    run = tmp_path / "run"
    fedlora.run(chosen, run)
    trained = fedlora.load_run(run).workspace.installed.schema.groups
    assert not any("layer.1." in name for name, group in trained.items() if group == "adapter")
    found = with_peft(world, "bert", run / "adapter")
    torch.testing.assert_close(probabilities(found, world / "bert"), ours(run), atol=1e-4, rtol=0)


# ---- a head that is not trained


@pytest.mark.parametrize("method", ["lora", "flasc", "slora", "full", "bitfit", "bottleneck", "peft"])
def test_a_frozen_head_is_neither_trained_nor_sent(world: Path, tmp_path: Path, method: str) -> None:
    chosen = experiment(world, method, FROZEN)
    assert all(set(found) == {"adapter"} for found in groups(chosen))
    fedlora.run(chosen, tmp_path / "run")
    for row in ledger(tmp_path / "run")[1:]:
        assert row["update_norm"] > 0
        assert set(row["up_bytes"]) == {"envelope", "adapter", "report"}
        assert set(row["down_bytes"]) <= {"envelope", "adapter", "seed", "init", "fold"}
    trained = fedlora.load_run(tmp_path / "run")
    fresh = dict(trained.task.load_model(_head_seed(chosen), "fp32", CPU)[0].named_parameters())
    now = dict(trained.workspace.installed.frozen_head)
    assert {name.replace(".modules_to_save", "") for name in now} == HEAD
    for name, value in now.items():
        assert torch.equal(value, fresh[name.replace(".modules_to_save", "")])
        assert not value.requires_grad


class Stopping(Callback):
    """Ends a run after its second round."""

    def row_recorded(self, row: RoundRecord) -> None:
        if row.round == 2:
            raise KeyboardInterrupt


def _head_seed(chosen: Any) -> int:
    return named_seed(chosen.seed, "head")


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "federa", "peft"])
def test_an_adapter_carries_the_frozen_head(world: Path, tmp_path: Path, method: str, compute: str) -> None:
    run = tmp_path / "run"
    fedlora.run(experiment(world, method, FROZEN, f"method.local.compute='{compute}'"), run)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    found = with_peft(world, "bert", run / "adapter")
    close = 1e-4 if compute == "fp32" else 2e-2
    torch.testing.assert_close(probabilities(found, world / "bert"), ours(run), atol=close, rtol=0)
    drawn_anew = probabilities(original(world, "bert"), world / "bert")
    assert float((drawn_anew - ours(run)).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "slora", "fedex"])
def test_a_merged_model_carries_the_frozen_head(world: Path, tmp_path: Path, method: str) -> None:
    run = tmp_path / "run"
    fedlora.run(experiment(world, method, FROZEN), run)
    fedlora.load_run(run).export(tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(probabilities(merged, tmp_path / "merged"), ours(run), atol=1e-4, rtol=0)


def test_bottleneck_adapters_have_the_frozen_head_beside_them(world: Path, tmp_path: Path) -> None:
    fedlora.run(experiment(world, "bottleneck", FROZEN), tmp_path / "run")
    assert set(load_file(tmp_path / "run" / "adapter" / "params.safetensors")) > HEAD


def test_a_fold_of_everything_leaves_the_frozen_head_out(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fedlora.run(experiment(world, "slora", FROZEN, "method.fold='rest'"), run)
    merged = AutoModelForSequenceClassification.from_pretrained(run / "model")
    torch.testing.assert_close(probabilities(merged, run / "model"), ours(run), atol=1e-4, rtol=0)


@pytest.mark.parametrize("overrides", [(FROZEN,), (POOLER,), (FROZEN, POOLER)], ids=["frozen", "pooler", "both"])
def test_a_resumed_run_ends_where_one_without_a_stop_does(
    world: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    chosen = experiment(world, "slora", *overrides, rounds=4)
    whole = fedlora.run(chosen, tmp_path / "whole")
    with pytest.raises(Stopped):
        fedlora.run(chosen, tmp_path / "cut", callbacks=[Stopping()])
    again = fedlora.run(chosen, tmp_path / "cut")
    assert again.after == whole.after
    written = contents(tmp_path / "whole" / "adapter")
    assert "adapter_model.safetensors" in written
    assert contents(tmp_path / "cut" / "adapter") == written


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("kind", "family", "entry", "task_type"),
    [
        ("TokenClassification", "bert", "encoder.layer.1", "TOKEN_CLS"),
        ("QuestionAnswering", "distilbert", "layer.1.ffn", "QUESTION_ANS"),
        ("ImageClassification", "vit", "layernorm", None),
        ("CausalLM", "gpt2", "ln_f", "CAUSAL_LM"),
    ],
)
def test_heads_of_every_task_are_exported(
    tmp_path: Path, kind: Any, family: str, entry: str, task_type: str | None, frozen: bool
) -> None:
    tiny_model(family, head=kind).base_model.save_pretrained(str(tmp_path / "base"))
    chosen = Model(path=str(tmp_path / "base"), head=(entry,))
    model, head = load_pretrained(f"AutoModelFor{kind}", chosen, 0, CPU, fresh_head=kind != "CausalLM")
    assert any(f"{entry}." in name for name in head)
    installed = LoRA(rank=2, targets="all-linear").install(model, head, 0)
    assert not any(name.rsplit(".", 1)[0] + ".weight" in head for name in installed.schema if "lora" in name)
    if frozen:
        installed.freeze_head()
        assert set(installed.schema.groups.values()) == {"adapter"}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == installed.parameters.keys()
    params = {name: value + 0.1 * torch.randn(value.shape) for name, value in installed.read().items()}
    installed.load(params)
    save_lora(LoRA(rank=2), installed, {}, params, chosen.path, tmp_path / "adapter", task_type)
    base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(chosen.path)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    inputs = (
        {"pixel_values": torch.randn(2, 3, 16, 16)} if family == "vit" else {"input_ids": torch.arange(8, 16)[None]}
    )
    with torch.no_grad():
        for one, other in zip(model.eval()(**inputs)[:1], theirs(**inputs)[:1], strict=True):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


def test_a_linear_probe_of_a_frozen_head_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"head_only would train nothing: model.train_head = false freezes the head"):
        groups(experiment(world, "head_only", FROZEN))


def test_frozen_modules_stay_out_of_full_fine_tuning(world: Path) -> None:
    plain, frozen = groups(experiment(world, "full"))[0], groups(experiment(world, "full", FROZEN, POOLER))[0]
    assert plain["adapter"] - frozen["adapter"] == 32 * 33


def test_show_lists_the_groups(world: Path, tmp_path: Path) -> None:
    for overrides, expected in (((FROZEN,), False), ((POOLER,), True)):
        file = tmp_path / "run.toml"
        file.write_text(to_toml(experiment(world, "lora", *overrides)))
        result = CliRunner().invoke(app, ["show", str(file)])
        assert result.exit_code == 0, result.output
        assert ("head" in result.output.replace("train_head", "").replace("head = ", "")) == expected

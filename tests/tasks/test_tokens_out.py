"""Learnt tokens: loss, gradients and metrics against slow loops and ``transformers``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fixtures.tiny import write_rows
from fixtures.tiny_language import CPU, TEXTS, language_world, model_of, prepare, slow_loss, targets
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fedlora.core.errors import DataError, TrainingError
from fedlora.tasks.lm import tokens_out
from fedlora.testing import tiny_model

world = pytest.fixture(scope="module")(language_world)


# ---- packing


@pytest.mark.parametrize("limit", [7, 10, 30])
def test_blocks_hold_each_sequence_once_and_no_more_than_fits(limit: int) -> None:
    lengths = np.array([7, 1, 3, 3, 6, 2, 5, 5])
    bins = tokens_out.pack(lengths, limit)
    assert sorted(number for one in bins for number in one) == list(range(8))
    assert all(lengths[one].sum() <= limit for one in bins)
    # no two blocks could have been one
    loads = sorted(int(lengths[one].sum()) for one in bins)
    assert len(loads) == 1 or loads[0] + loads[1] > limit


# ---- the loss


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_the_mean_over_all_tokens_of_the_batch(world: Path, packing: bool) -> None:
    task = prepare(world, block_size=12, packing=packing)
    model, batch = model_of(task), task.batch(np.arange(len(TEXTS)), CPU)
    total, _, count = slow_loss(model, batch)
    with torch.no_grad():
        assert float(task.loss(model, batch)) == pytest.approx(total / count, abs=1e-5)


def custom(name: str, **settings: Any) -> transformers.PreTrainedModel:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    sizes = {"vocab_size": 64, "pad_token_id": 0, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(getattr(transformers, name)(**small, **sizes, **settings))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    assert isinstance(made, transformers.PreTrainedModel)
    return made


@pytest.mark.parametrize("chunk", [2**24, 64 * 7])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "softcap", "scaled"])
def test_loss_and_gradients_are_those_of_transformers(
    world: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a family does to its logits afterwards, and if the last matrix is applied in chunks."""
    monkeypatch.setattr(tokens_out, "CHUNK_ENTRIES", chunk)
    made = {
        "softcap": lambda: custom("Gemma2Config", final_logit_softcapping=2.0, head_dim=8),
        "scaled": lambda: custom("CohereConfig", logit_scale=0.5),
    }
    model = made[kind]() if kind in made else tiny_model(kind, head="CausalLM")
    batch = prepare(world, block_size=12).batch(np.arange(8), CPU)
    model.eval()  # without dropout
    grads = []
    for loss in (lambda: model(**batch).loss, lambda: tokens_out.mean_loss(model, batch)):
        model.zero_grad()
        loss().backward()
        grads.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    assert len(grads[0]) == len(grads[1]) > 5
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


def test_a_loss_in_chunks_is_the_same(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = torch.arange(50)
    expected = functional.cross_entropy(logits, wanted, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, logits)
    monkeypatch.setattr(tokens_out, "CHUNK_ENTRIES", 64 * 7)
    found = tokens_out.summed_cross_entropy(logits, wanted)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], gradient)
    with torch.inference_mode():
        torch.testing.assert_close(tokens_out.summed_cross_entropy(logits, wanted), expected.detach())


def test_the_last_matrix_is_applied_where_a_token_is_learnt_alone(world: Path) -> None:
    task = prepare(world)
    model, batch = model_of(task), task.batch(np.arange(4), CPU)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))  # type: ignore[union-attr]
    task.loss(model, batch)
    assert sum(shape[1] for shape in seen) == len(targets(batch)) == 19
    assert model(batch["input_ids"]).logits.shape == (4, 16, 64), "and as ever afterwards"


@pytest.mark.parametrize("kind", ["llama", "softcap"])
def test_with_many_logits_few_are_held_at_a_time(world: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = prepare(world)
    model = custom("Gemma2Config", final_logit_softcapping=2.0, head_dim=8) if kind == "softcap" else model_of(task)
    batch = task.batch(np.arange(4), CPU)
    tokens: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: tokens.append(out.numel() // 64))  # type: ignore[union-attr]
    monkeypatch.setattr(tokens_out, "CHUNK_ENTRIES", 64 * 7)
    task.loss(model, batch).backward()
    assert max(tokens) == (19 if kind == "softcap" else 7), "a cap after the matrix needs its whole result"


def test_trying_how_a_model_ends_leaves_no_trace(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run tries it again, at another place."""
    monkeypatch.setattr(tokens_out, "CHUNK_ENTRIES", 64 * 7)
    task = prepare(world)
    model = custom("LlamaConfig", attention_dropout=0.5).train()
    batch = task.batch(np.arange(4), CPU)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(float(task.loss(model, batch).detach()))
    assert model in tokens_out._ENDS
    assert losses[0] == losses[1]
    torch.manual_seed(1)
    assert float(task.loss(model, batch).detach()) != losses[0], "dropout is active"


def test_a_model_whose_last_matrix_is_hidden_gives_the_same(world: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    task = prepare(world)
    model, batch = model_of(task), task.batch(np.arange(8), CPU)
    with torch.no_grad():
        torch.testing.assert_close(task.loss(Hidden(model), batch), task.loss(model, batch))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_tokens_that_a_tuning_puts_in_front_are_passed_over(world: Path) -> None:
    batch = prepare(world, block_size=12).batch(np.arange(8), CPU)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_model("llama", head="CausalLM"), settings).eval()
    with torch.no_grad():
        torch.testing.assert_close(tokens_out.mean_loss(model, batch), model(**batch).loss, atol=1e-5, rtol=0)


def test_a_batch_with_nothing_to_learn_is_refused(world: Path) -> None:
    task = prepare(world)
    batch = task.batch(np.arange(2), CPU)
    batch["labels"][:] = -100
    with pytest.raises(TrainingError, match="no token of a batch is to be learnt"):
        task.loss(model_of(task), batch)


# ---- metrics


@pytest.mark.parametrize("packing", [False, True])
def test_metrics_are_those_of_a_slow_loop(world: Path, packing: bool) -> None:
    task = prepare(world, block_size=5, eval_batch_size=3, packing=packing)
    model, rows = model_of(task), np.array([4, 0, 2])
    total, correct, count = slow_loss(model, prepare(world, block_size=5).batch(rows, CPU, "test"))
    with torch.inference_mode():
        found = task.evaluate(model, rows, "test", CPU)
    assert list(found.metrics) == ["accuracy", "loss", "perplexity"]
    assert found.metrics["accuracy"] == correct / count
    assert found.metrics["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.warnings == ()
    assert (task.main_metric, task.higher_is_better) == ("accuracy", True)


def test_a_model_that_says_one_token_only_is_told_of(world: Path) -> None:
    task = prepare(world)
    model = model_of(task)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # type: ignore[union-attr,operator]
        found = task.evaluate(model, np.arange(6), "test", CPU)
    assert found.metrics["loss"] == pytest.approx(math.log(64), abs=1e-5)
    assert found.warnings == ("the model predicts the same token everywhere: it has learnt nothing useful",)


def test_other_data_can_be_evaluated(world: Path, tmp_path: Path) -> None:
    task = prepare(world)
    model = model_of(task)
    file = write_rows(tmp_path / "other.jsonl", [{"body": TEXTS[2]}])
    with torch.no_grad():
        other = task.with_rows(file, {"text": "body"}).evaluate(model, np.array([0]), "test", CPU)
        same = task.evaluate(model, np.array([2]), "test", CPU)
    assert other == same
    with pytest.raises(DataError, match="no column 'text', only body"):
        task.with_rows(file, {})

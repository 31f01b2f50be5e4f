"""Language modelling: blocks and packing by hand, loss and metrics against slow loops, generation, federated runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shared import shared
from tiny import LOCAL, save_model, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fedlora
from fedlora import config
from fedlora.errors import ConfigError, DataError, TrainingError
from fedlora.tasks import CausalLM, Files, Model, tokens_out
from fedlora.tasks.language import PreparedLanguage
from fedlora.testing import tiny_model

CPU = torch.device("cpu")
PAD, UNK, BOS, EOS = range(4)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = [*SPECIAL, "<user>", "<bot>", *(f"w{number}" for number in range(58))]
TEXTS = [
    "w0 w1 w2 w3 w4 w5 w6 w7 w8",
    "w9",
    "w10 w11 w12",
    "w13 w14",
    *(f"w{n} w{n + 1} w{n} w{n + 1} w{n}" for n in range(12)),
]


def save_language_model(folder: Path, family: str = "llama", adds: str = "<s> $A") -> Path:
    """A tiny language model and its tokenizer of 64 words, which puts the special tokens of ``adds`` around a text."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL + WORDS[4:6])
    if adds != "$A":
        tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **names
    )
    fast.save_pretrained(str(folder))
    model = tiny_model(family, head="CausalLM")
    model.config.bos_token_id, model.config.eos_token_id = BOS, EOS
    model.generation_config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=[EOS, WORDS.index("w57")], pad_token_id=PAD
    )
    model.save_pretrained(str(folder))
    return folder


def language_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``llama`` and ``texts.jsonl``; make it a fixture in the module that needs it."""
    root = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        patch.setenv("FEDLORA_CACHE", str(root / "cache"))
        patch.setattr(os, "fsync", lambda handle: None)
        save_language_model(root / "llama")
        rows = [{"text": text, "speaker": f"s{number % 4}"} for number, text in enumerate(TEXTS)]
        write_rows(root / "texts.jsonl", rows)
        write_rows(root / "test.jsonl", [{**row, "speaker": "other"} for row in rows[:6]])
        yield root


world = pytest.fixture(scope="module")(language_world)


def prepare(world: Path, model: str = "llama", source: Path | None = None, **settings: Any) -> PreparedLanguage:
    files = Files(train=str(source or world / "texts.jsonl"), test=str(source or world / "test.jsonl"))
    prepared = CausalLM(**settings).prepare(Model(path=str(world / model)), files)
    assert isinstance(prepared, PreparedLanguage)
    return prepared


def model_of(task: Any) -> nn.Module:
    return task.load_model(0, "fp32", CPU)[0].eval()  # type: ignore[no-any-return]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def targets(batch: dict[str, Tensor]) -> list[int]:
    """The tokens that a batch asks for, sorted."""
    labels = batch["labels"][:, 1:]
    return sorted(labels[labels != -100].tolist())


def slow_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float, int]:
    """Sum of losses, correct tokens and tokens, one sequence and one place at a time."""
    total, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for tokens, labels, mask in zip(*(batch[n] for n in ("input_ids", "labels", "attention_mask")), strict=True):
            length = int(mask.sum())
            logits = model(tokens[None, :length]).logits[0]
            for place in range(1, length):
                if labels[place] != -100:
                    total -= float(logits[place - 1].log_softmax(0)[labels[place]])
                    correct += int(logits[place - 1].argmax() == labels[place])
                    count += 1
    return total, correct, count


# ---- blocks


def test_a_text_is_cut_into_blocks_that_share_one_token(world: Path) -> None:
    batch = prepare(world, block_size=4).batch(np.array([0]), CPU)
    whole = [BOS, *ids(TEXTS[0]), EOS]
    assert batch["input_ids"].tolist() == [whole[:4], whole[3:7], whole[6:10], [*whole[9:11], PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 4] * 3 + [[1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, *whole[1:4]],
        [-100, *whole[4:7]],
        [-100, *whole[7:10]],
        [-100, whole[10], -100, -100],
    ]


@pytest.mark.parametrize("block_size", [2, 3, 5, 11, 12, 32])
@pytest.mark.parametrize("packing", [False, True])
def test_every_token_but_the_first_is_asked_for_once(world: Path, block_size: int, packing: bool) -> None:
    task = prepare(world, block_size=block_size, packing=packing)
    batch = task.batch(np.arange(4), CPU)
    assert targets(batch) == sorted(token for text in TEXTS[:4] for token in [*ids(text), EOS])
    assert batch["input_ids"].shape[1] <= block_size
    assert (batch["attention_mask"].sum(1) >= 2).all()


def test_all_blocks_of_an_example_come_in_the_order_of_the_rows(world: Path) -> None:
    task = prepare(world, block_size=4)
    batch = task.batch(np.array([1, 0, 3]), CPU)
    assert batch["input_ids"][:, 0].tolist() == [BOS, BOS, *(ids(TEXTS[0])[place] for place in (2, 5, 8)), BOS]


def test_the_end_of_a_text_is_learnt_unless_it_is_not_wanted(world: Path) -> None:
    with_end = prepare(world).batch(np.array([3]), CPU)
    without = prepare(world, end_of_text=False).batch(np.array([3]), CPU)
    assert with_end["labels"].tolist() == [[-100, *ids("w13 w14"), EOS, *[-100] * 4]]
    assert without["labels"].tolist() == [[-100, *ids("w13 w14"), *[-100] * 5]]


def test_an_end_that_the_tokenizer_puts_there_is_not_doubled(world: Path) -> None:
    save_language_model(world / "ending", adds="<s> $A </s>")
    assert targets(prepare(world, "ending").batch(np.array([3]), CPU)) == sorted([*ids("w13 w14"), EOS])


def test_texts_with_nothing_to_predict_are_left_out_and_told_of(world: Path) -> None:
    save_language_model(world / "bare", adds="$A")
    task = prepare(world, "bare", end_of_text=False)
    assert task.num_examples("train") == len(TEXTS) - 1
    assert task.texts("train")[:2] == [TEXTS[0], TEXTS[2]]
    assert task.labels.tolist() == [0] * (len(TEXTS) - 1)
    assert task.column("speaker", "train").tolist()[:3] == ["s0", "s2", "s3"]
    assert task.batch(np.array([1]), CPU)["input_ids"][0, :3].tolist() == ids("w10 w11 w12")
    with torch.no_grad():
        found = task.evaluate(model_of(task), np.arange(3), "test", CPU)
    assert found.warnings == (
        "1 of 16 train rows have fewer than two tokens and are left out",
        "1 of 6 test rows have fewer than two tokens and are left out",
    )


def test_data_without_anything_to_predict_are_refused(world: Path, tmp_path: Path) -> None:
    save_language_model(world / "bare", adds="$A")
    short = write_rows(tmp_path / "short.jsonl", [{"text": "w1"}, {"text": ""}])
    with pytest.raises(DataError, match="all 2 train rows have fewer than two tokens, so nothing can be learnt"):
        prepare(world, "bare", short, end_of_text=False)


def test_an_empty_text_is_a_begin_and_an_end(world: Path, tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [{"text": ""}])
    batch = prepare(world, source=empty).batch(np.array([0]), CPU)
    assert batch["labels"].tolist() == [[-100, EOS, *[-100] * 6]]


# ---- packing


def test_sequences_are_joined_into_full_blocks(world: Path) -> None:
    # with begin and end they have 11, 3, 5 and 4 tokens
    batch = prepare(world, block_size=12, packing=True).batch(np.arange(4), CPU)
    whole, one, three, two = ([BOS, *ids(text), EOS] for text in TEXTS[:4])
    assert batch["input_ids"].tolist() == [[*whole, PAD], [*three, *two, *one]]
    # the begin of a text is never asked for, nor is attention told where texts meet
    asked = [-100, *three[1:], -100, *two[1:], -100, *one[1:]]
    assert batch["labels"].tolist() == [[-100, *whole[1:], -100], asked]
    assert batch["attention_mask"].tolist() == [[1] * 11 + [0], [1] * 12]


def test_packing_spares_padding(world: Path) -> None:
    rows = np.arange(len(TEXTS))
    sizes = [
        prepare(world, block_size=32, packing=packing).batch(rows, CPU)["input_ids"].numel()
        for packing in (False, True)
    ]
    assert sizes[1] < sizes[0] * 0.7


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "softcap", "scaled"])
def test_loss_and_gradients_are_those_of_transformers(world: Path, kind: str) -> None:
    """Whatever a family does to its logits afterwards."""
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
    assert found.warnings == ("the model says the same token everywhere: it has learnt nothing useful",)


def test_other_data_can_be_evaluated(world: Path, tmp_path: Path) -> None:
    task = prepare(world)
    model = model_of(task)
    file = write_rows(tmp_path / "other.jsonl", [{"body": TEXTS[2]}])
    with torch.no_grad():
        other = task.with_test(file, {"text": "body"}).evaluate(model, np.array([0]), "test", CPU)
        same = task.evaluate(model, np.array([2]), "test", CPU)
    assert other == same
    with pytest.raises(DataError, match="no column 'text', only body"):
        task.with_test(file, {})


# ---- the model


def test_a_pre_trained_last_matrix_is_no_head(world: Path) -> None:
    model, head = prepare(world).load_model(0, "fp32", CPU)
    assert "lm_head.weight" in dict(model.named_parameters())
    assert head == frozenset()


def test_a_last_matrix_that_is_the_embedding_is_no_head_either(world: Path) -> None:
    save_language_model(world / "gpt2", "gpt2")
    assert prepare(world, "gpt2").load_model(0, "fp32", CPU)[1] == frozenset()


def test_what_the_checkpoint_lacks_is_the_head_and_starts_from_the_seed(world: Path, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    task = CausalLM().restore(Model(path=str(folder)), [])
    loaded = [task.load_model(seed, "fp32", CPU) for seed in (0, 0, 1)]
    assert [head for _, head in loaded] == [{"lm_head.weight"}] * 3
    first, again, other = (model.get_parameter("lm_head.weight") for model, _ in loaded)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_blocks_longer_than_the_model_reads_are_refused(world: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "long.jsonl", [{"text": " ".join(["w1"] * 60)}])
    with pytest.raises(
        ConfigError, match=r"sequences of 62 tokens, but .*llama' reads 32 at most: set task\.block_size"
    ):
        prepare(world, source=rows, block_size=100).load_model(0, "fp32", CPU)
    prepare(world, source=rows, block_size=32).load_model(0, "fp32", CPU)
    prepare(world, block_size=100).load_model(0, "fp32", CPU)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(tmp_path: Path) -> None:
    task = CausalLM().restore(Model(path=str(save_model(tmp_path / "bert"))), [])
    with pytest.raises(ConfigError, match="sees the tokens that it is to predict, as encoders such as BERT do"):
        task.load_model(0, "fp32", CPU)


def test_the_second_time_nothing_is_tokenised(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    first = prepare(world, block_size=6).batch(np.arange(5), CPU)
    made = len(list((tmp_path / "tokens").iterdir()))
    monkeypatch.setattr("fedlora.tasks.language._tokenise", None)
    again = prepare(world, block_size=6).batch(np.arange(5), CPU)
    assert made == 2
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(TypeError):
        prepare(world, block_size=7)
    with pytest.raises(TypeError):
        prepare(world, block_size=6, end_of_text=False)


@pytest.mark.parametrize("packing", [False, True])
def test_embeddings_are_means_over_blocks(world: Path, packing: bool) -> None:
    task = prepare(world, block_size=4, packing=packing)
    found = task.embeddings("test", CPU)
    model = model_of(task)
    assert found.shape == (6, 32)
    with torch.no_grad():
        for row in (0, 1):
            tokens = [BOS, *ids(TEXTS[row]), EOS]
            blocks = [tokens[first : first + 4] for first in range(0, len(tokens) - 1, 3)]
            means = [model.model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in blocks]  # type: ignore
            np.testing.assert_allclose(found[row], torch.stack(means).mean(0).numpy(), atol=1e-5)


# ---- continuations


def slow_greedy(model: nn.Module, prompt: list[int], stops: set[int], most: int) -> list[int]:
    """One prompt at a time, everything computed anew for each token."""
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < most:
            token = int(model(torch.tensor([prompt + tokens])).logits[0, -1].argmax())
            if token in stops:
                break
            tokens.append(token)
    return tokens


def said(tokens: list[int]) -> list[str]:
    """The words of tokens; special ones are not shown."""
    return [WORDS[token] for token in tokens if token >= 6]


def test_continuations_are_those_of_a_slow_loop(world: Path) -> None:
    task = prepare(world, max_new_tokens=12, eval_batch_size=3)
    model = model_of(task)
    inputs = ["w1", "w5 w6 w7 w8", "w20", "w30 w31", "w2 w3 w4"]
    with torch.inference_mode():
        found = task.predict(model, inputs, CPU)
        again = task.predict(model, inputs[::-1], CPU)[::-1]
    tokens = [slow_greedy(model, [BOS, *ids(text)], {EOS, WORDS.index("w57")}, 12) for text in inputs]
    assert [one["continuation"].split() for one in found] == [said(one) for one in tokens]
    assert found == again
    assert len({tuple(one) for one in tokens}) > 2


def test_a_continuation_stops_at_the_ends_that_the_model_came_with(world: Path) -> None:
    task = prepare(world, max_new_tokens=10)
    model = model_of(task)
    counted = {"steps": 0}

    def say(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        counted["steps"] += 1
        wanted = WORDS.index("w57") if counted["steps"] == 4 else WORDS.index("w1")
        return torch.nn.functional.one_hot(torch.full(logits.shape[:2], wanted), 64).float()

    model.lm_head.register_forward_hook(say)  # type: ignore[union-attr]
    with torch.inference_mode():
        assert task.predict(model, ["w3"], CPU) == [{"continuation": " w1 w1 w1"}]
    assert counted["steps"] == 4


def test_long_prompts_are_cut_from_the_left(world: Path) -> None:
    task = prepare(world, max_new_tokens=8)
    model = model_of(task)
    text = " ".join(f"w{number}" for number in range(50))
    with torch.inference_mode():
        (found,) = task.predict(model, [text], CPU)
    expected = slow_greedy(model, [BOS, *ids(text)[-23:]], {EOS, WORDS.index("w57")}, 8)
    assert found["continuation"].split() == said(expected)


def test_no_room_for_a_prompt_is_refused(world: Path) -> None:
    task = prepare(world, max_new_tokens=32)
    with pytest.raises(ConfigError, match="max_new_tokens = 32 leaves no room for a prompt"):
        task.predict(model_of(task), ["w1"], CPU)


def test_nothing_cannot_be_continued_without_a_begin(world: Path) -> None:
    save_language_model(world / "bare", adds="$A")
    task = prepare(world, "bare", max_new_tokens=4)
    with pytest.raises(DataError, match="the text ' ' has no tokens to continue from"):
        task.predict(model_of(task), ["w1", " "], CPU)


# ---- whole runs


METHODS = {
    "lora": {"kind": "lora"},
    # without `reference` nothing of B would come down in the first rounds
    "flasc": {"kind": "flasc", "reference": "init", "server": {"kind": "sgd", "lr": 1.0}},
    "federa": {"kind": "federa"},
}


def document(world: Path, method: str, **task: Any) -> dict[str, Any]:
    return {
        "label": method,
        "model": {"path": str(world / "llama")},
        "task": {"kind": "causal_lm", "block_size": 6, "max_new_tokens": 4, **task},
        "data": {"kind": "files", "train": str(world / "texts.jsonl"), "test": str(world / "test.jsonl")},
        "clients": {"per_round": 2, "partition": {"kind": "natural", "column": "speaker"}},
        "evaluate": {"every": 1},
        "method": {**METHODS[method], "rank": 4, "alpha": 12.0, "rounds": 2, "local": LOCAL},
    }


def peft_agrees(run: Path, base: Path, least: float = 1e-3) -> None:
    """The exported adapter, on the original base, says what the run's model says, and something new."""
    tokens = torch.arange(4, 24).view(2, 10)
    trained = fedlora.load_run(run)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "adapter"))
    with torch.no_grad():
        ours = trained.workspace.model.eval()(tokens).logits
        theirs = loaded.eval()(tokens).logits
        before = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert float((before - ours).abs().max()) > least


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("method", ["flasc", "federa"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_federated_run_learns_and_is_exported(world: Path, tmp_path: Path, method: str, packing: bool) -> None:
    result = fedlora.run(config.parse(document(world, method, packing=packing)), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert result.main_metric == "accuracy"
    # where there is no head, none travels
    assert "head" not in {**result.down_bytes, **result.up_bytes}
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    assert not settings["modules_to_save"]
    peft_agrees(tmp_path / "run", world / "llama")
    trained = fedlora.load_run(tmp_path / "run")
    assert trained.evaluate(world / "test.jsonl").metrics["loss"] == pytest.approx(result.after["loss"], abs=1e-4)
    assert set(trained.predict(["w1 w2"])[0]) == {"continuation"}


@pytest.mark.parametrize(
    "method",
    [
        {
            "kind": "slora",
            "rank": 4,
            "density": 0.2,
            "warm_rounds": 1,
            "rounds": 2,
            "local": LOCAL,
            "warm_local": LOCAL,
        },
        {"kind": "full", "rounds": 2, "local": LOCAL},
        {"kind": "lora", "rank": 4, "rounds": 2, "local": {**LOCAL, "compute": "bf16"}},
    ],
    ids=["slora", "full", "bf16"],
)
def test_other_methods_run_without_a_head(world: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    result = fedlora.run(config.parse({**document(world, "lora"), "method": method}), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert "head" not in {**result.down_bytes, **result.up_bytes}
    assert set(fedlora.load_run(tmp_path / "run").predict(["w1 w2"])[0]) == {"continuation"}


def test_a_merged_model_needs_nothing(world: Path, tmp_path: Path) -> None:
    fedlora.run(config.parse(document(world, "federa")), tmp_path / "run")
    trained = fedlora.load_run(tmp_path / "run")
    trained.export(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        ours = trained.workspace.model.eval()(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, ours, atol=1e-4, rtol=0)
    assert merged.generation_config.eos_token_id == [EOS, WORDS.index("w57")]


# ---- what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "w1"}], "have no column 'text', only body"),
        ([{"text": "w1"}, {"text": None}], "column 'text' has no value in 1 of 2"),
        ([{"text": 3}], "holds int64, not text"),
        ([{"text": ["w1", "w2"]}], "not text"),
    ],
)
def test_garbage_is_refused(world: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(world, source=write_rows(tmp_path / "rows.jsonl", rows))


def test_a_block_of_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.*block_size = 1: input should be greater than or equal to 2"):
        config.parse({"task": {"kind": "causal_lm", "block_size": 1}})


# ---- a real model on real text


@pytest.fixture(scope="module")
def plays(world: Path) -> Path:
    """The first turns of the plays; all of them would take most of the time."""
    rows = datasets.Dataset.from_json(str(shared("data/shakespeare_by_speaker.jsonl.gz")), cache_dir=str(world))
    return write_rows(world / "plays.jsonl", list(rows.select(range(500))))


def test_a_real_model_tells_stories_and_not_plays(plays: Path) -> None:
    path = shared("models/stories260K")
    task = CausalLM(max_new_tokens=40).prepare(Model(path=str(path)), Files(train=str(plays)))
    model, head = task.load_model(0, "fp32", CPU)
    assert head == frozenset()
    with torch.inference_mode():
        (told,) = task.predict(model.eval(), ["Once upon a time, there was a little"], CPU)
        found = task.evaluate(model, np.arange(60), "test", CPU)
    assert told["continuation"].startswith(" girl named Lily.")
    assert 4.0 < found.metrics["loss"] < 6.0
    assert 0.1 < found.metrics["accuracy"] < 0.3


def test_a_real_model_learns_from_speakers(plays: Path, tmp_path: Path) -> None:
    values = {
        "model": {"path": str(shared("models/stories260K"))},
        "task": {"kind": "causal_lm", "block_size": 64},
        "data": {"kind": "files", "train": str(plays)},
        "clients": {
            "per_round": 2,
            "test_clients": 0.2,
            "partition": {"kind": "natural", "column": "speaker", "min_examples": 8},
        },
        "evaluate": {"every": 2},
        "method": {**METHODS["flasc"], "rank": 8, "rounds": 2, "local": {**LOCAL, "max_steps": 6}},
    }
    result = fedlora.run(config.parse(values), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"] - 0.3

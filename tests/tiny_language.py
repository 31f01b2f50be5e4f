"""A tiny language model that tests share, with a tokenizer of 64 words, and slow loops to compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import PeftModel
from tiny import write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fedlora
from fedlora.tasks import CausalLM, Files, Instruction, Model
from fedlora.tasks.instruction import PreparedInstruction
from fedlora.tasks.language import PreparedLanguage
from fedlora.testing import tiny_model

CPU = torch.device("cpu")
PAD, UNK, BOS, EOS, USER, BOT = range(6)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = [*SPECIAL, "<user>", "<bot>", *(f"w{number}" for number in range(58))]
TEXTS = [
    "w0 w1 w2 w3 w4 w5 w6 w7 w8",
    "w9",
    "w10 w11 w12",
    "w13 w14",
    *(f"w{n} w{n + 1} w{n} w{n + 1} w{n}" for n in range(12)),
]
STOPS = {EOS, WORDS.index("w57")}
TEMPLATE = "<user> {prompt} <bot>"
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} <user> {{ m.content }}"
    "{% else %} <bot> {{ m.content }} </s>{% endif %}{% endfor %}{% if add_generation_prompt %} <bot>{% endif %}"
)
PAIRS = [
    ("w1 w2", "w3 w4"),
    ("w5", "w6 w7 w8"),
    ("w9 w10 w11 w12", "w13"),
    *((f"w{n} w{n + 1}", f"w{n + 1} w{n + 1}") for n in range(20, 32)),
]
TALKS = [
    ["w1 w2", "w3 w4", "w5", "w6"],
    ["w7", "w8"],
    *([f"w{n}", f"w{n + 1} w{n}"] for n in range(10, 16)),
]
METHODS = {
    "lora": {"kind": "lora"},
    # without `reference` nothing of B would come down in the first rounds
    "flasc": {"kind": "flasc", "reference": "init", "server": {"kind": "sgd", "lr": 1.0}},
    "federa": {"kind": "federa"},
}


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


def messages(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def save_chat_model(folder: Path, chat: str = CHAT) -> Path:
    save_language_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def instruction_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same with ``chat``, ``pairs.jsonl`` and ``talks.jsonl``."""
    for base in language_world(tmp_path_factory):
        save_chat_model(base / "chat")
        pairs = [{"prompt": one, "answer": two, "user": f"u{n % 4}"} for n, (one, two) in enumerate(PAIRS)]
        write_rows(base / "pairs.jsonl", pairs)
        write_rows(base / "talks.jsonl", [{"messages": messages(turns), "user": "u0"} for turns in TALKS])
        yield base


def prepare_answers(
    world: Path, source: str | Path = "pairs.jsonl", model: str = "llama", **settings: Any
) -> PreparedInstruction:
    settings = {"template": TEMPLATE, **settings}
    files = Files(train=str(world / source), test=str(world / source))
    prepared = Instruction(**settings).prepare(Model(path=str(world / model)), files)
    assert isinstance(prepared, PreparedInstruction)
    return prepared


def prepare_talks(world: Path, source: str | Path = "talks.jsonl", **settings: Any) -> PreparedInstruction:
    return prepare_answers(world, source, "chat", template="chat", **settings)

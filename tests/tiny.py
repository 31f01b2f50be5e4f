"""A tiny world that tests share: a model, a tokenizer, and texts whose class is a word in them."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedlora import config
from fedlora.config import Experiment
from fedlora.testing import tiny_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [f"w{number}" for number in range(57)]
COLOURS = ("blue", "green", "red")
LOCAL = {"optimizer": {"kind": "adamw", "lr": 0.01}, "batch_size": 8, "lr_scale": {"head": 1.0}, "dropout": True}
PLAIN = {"kind": "sgd"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "flasc": {"kind": "flasc", "rank": 4},
    "federa": {"kind": "federa", "rank": 4},
    "slora": {"kind": "slora", "rank": 4, "density": 0.1, "warm_rounds": 1, "warm_local": LOCAL},
    "fedex": {"kind": "fedex", "rank": 4},
    "flora": {"kind": "flora", "rank": 4},
    "full": {"kind": "full"},
    "bitfit": {"kind": "fedavg", "tuning": {"kind": "bitfit"}},
    "bottleneck": {"kind": "fedavg", "tuning": {"kind": "bottleneck", "width": 4}},
    "peft": {
        "kind": "fedavg",
        "tuning": {"kind": "peft", "config": {"peft_type": "LORA", "r": 4, "target_modules": ["query"]}},
    },
    "head_only": {"kind": "fedavg", "tuning": {"kind": "head_only"}},
}


def save_model(folder: Path, family: str = "bert") -> Path:
    """A tiny model with a tokenizer of 64 words, as ``from_pretrained`` reads it."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, *COLOURS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "attention_mask", *["token_type_ids"] * (family in ("bert", "albert"))]
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_input_names=inputs, **names
    )
    fast.save_pretrained(str(folder))
    tiny_model(family).save_pretrained(str(folder))
    return folder


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Texts of 3 to 12 words, some of them a colour, which is the class; nine users."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        colour = COLOURS[number % 3]
        words = [*draw.choices(WORDS, k=draw.randint(2, 8)), *[colour] * draw.randint(1, 4)]
        rows.append({"text": " ".join(draw.sample(words, len(words))), "label": colour, "user": f"u{number % 9}"})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``bert``, ``train.jsonl`` and ``test.jsonl``; make it a fixture in the module that needs it."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        patch.setenv("FEDLORA_CACHE", str(root / "cache"))
        # only a power cut would tell the difference, and on a busy disk it is most of the time
        patch.setattr(os, "fsync", lambda handle: None)
        save_model(root / "bert")
        write_rows(root / "train.jsonl", make_rows(72, 0))
        write_rows(root / "test.jsonl", [{**row, "user": "other"} for row in make_rows(24, 1)])
        yield root


def document(root: Path, method: str = "lora", *overrides: str, rounds: int = 3) -> dict[str, Any]:
    """A configuration over the tiny world."""
    values: dict[str, Any] = {
        "label": method,
        "model": {"path": str(root / "bert")},
        # exports that the stock class loads
        "task": {"kind": "text_classification", "pooling": "model"},
        "data": {"kind": "files", "train": str(root / "train.jsonl"), "test": str(root / "test.jsonl")},
        "clients": {"num": 9, "per_round": 3, "partition": {"kind": "iid"}},
        "evaluate": {"every": 2},
        "method": {"rounds": rounds, "local": LOCAL, "server": PLAIN, **METHODS[method]},
    }
    values = copy.deepcopy(values)  # overrides must not reach the tables above
    for one in overrides:
        config.override(values, one)
    return values


def experiment(root: Path, method: str = "lora", *overrides: str, rounds: int = 3) -> Experiment:
    return config.parse(document(root, method, *overrides, rounds=rounds))


def ledger(folder: Path) -> list[dict[str, Any]]:
    """The ledger without what the clock says."""
    lines = (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("seconds", "slowest_seconds", "tier_seconds", "network_seconds")
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

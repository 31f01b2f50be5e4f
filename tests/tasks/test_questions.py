"""Question answering: windows by hand, spans against a slow reference, metrics on known cases, whole runs."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.shared import shared
from fixtures.tiny import COLOURS, SPECIAL, document, save_model, tiny_world, write_rows
from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoTokenizer

import fedlora
from fedlora import config
from fedlora.config.federated_data import prepare as deal
from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import Files, Model, QuestionAnswering
from fedlora.tasks.models.encoded import by_length
from fedlora.tasks.models.loading import load_tokenizer
from fedlora.tasks.qa import spans
from fedlora.tasks.qa.passages import check_stride, encode
from fedlora.tasks.qa.questions import PreparedQuestions, span_losses
from fedlora.tasks.qa.spans import Answer, Window, best_spans, decode, exact_match, f1, locate, normalise

CPU = torch.device("cpu")
world = pytest.fixture(scope="module")(tiny_world)
CONTEXT = " ".join(f"w{number}" for number in range(10, 22))
Rows = list[dict[str, Any]]


def ids(*words: str) -> list[int]:
    """The tiny tokenizer's: four special ones, then w0, w1 and so on."""
    return [SPECIAL.index(word) if word in SPECIAL else 4 + int(word[1:]) for word in words]


def row(context: str, question: str, *answers: str, **others: Any) -> dict[str, Any]:
    found = {"text": list(answers), "answer_start": [context.index(answer) for answer in answers]}
    return {"context": context, "question": question, "answers": found, **others}


def colour_rows(count: int, seed: int, titles: str) -> Rows:
    """Which word of a context is a colour? Contexts of 3 to 9 words."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.sample([f"w{number}" for number in range(50)], draw.randint(2, 8))
        colour = COLOURS[number % 3]
        words.insert(draw.randint(0, len(words)), colour)
        rows.append(row(" ".join(words), "w55 w56", colour, title=f"{titles}{number % 6}"))
    return rows


@pytest.fixture
def prepare(world: Path, tmp_path: Path) -> Callable[..., PreparedQuestions]:
    """Prepares rows as training and test data of a tiny model."""

    def make(rows: Rows, test: Rows | None = None, family: str = "bert", **settings: Any) -> PreparedQuestions:
        if not (world / family).exists():
            save_model(world / family, family)
        train = write_rows(tmp_path / "train.jsonl", rows)
        files = Files(train=str(train), test=str(write_rows(tmp_path / "test.jsonl", rows if test is None else test)))
        task = QuestionAnswering(**{"max_length": 12, "stride": 2, **settings})
        prepared = task.prepare(Model(path=str(world / family)), files)
        assert isinstance(prepared, PreparedQuestions)
        return prepared

    return make


Prepare = Callable[..., PreparedQuestions]


def model_of(task: PreparedQuestions) -> nn.Module:
    return task.load_model(0, "fp32", CPU)[0].eval()


# ---- windows


def test_a_long_context_makes_windows_that_overlap(prepare: Prepare) -> None:
    # of 12 tokens a window has 2 of the question, 3 special ones and 7 of the context, 2 of them shared
    batch = prepare([row(CONTEXT, "w1 w2", "w15 w16")]).batch(np.array([0]), CPU)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions"}
    assert batch["input_ids"].tolist() == [
        ids("[CLS]", "w1", "w2", "[SEP]", "w10", "w11", "w12", "w13", "w14", "w15", "w16", "[SEP]"),
        ids("[CLS]", "w1", "w2", "[SEP]", "w15", "w16", "w17", "w18", "w19", "w20", "w21", "[SEP]"),
    ]
    assert batch["token_type_ids"].tolist() == [[0] * 4 + [1] * 8] * 2
    assert batch["attention_mask"].tolist() == [[1] * 12] * 2
    assert batch["start_positions"].tolist() == [9, 4]
    assert batch["end_positions"].tolist() == [10, 5]


def test_a_window_without_the_whole_answer_points_at_its_first_token(prepare: Prepare) -> None:
    answers = ("w16 w17", "w10", "w12 w13 w14 w15 w16 w17")
    batch = prepare([row(CONTEXT, "w1 w2", answer) for answer in answers]).batch(np.array([2, 0, 1]), CPU)
    assert batch["start_positions"].tolist() == [0, 0, 0, 5, 4, 0]
    assert batch["end_positions"].tolist() == [0, 0, 0, 6, 4, 0]


def test_a_batch_holds_all_windows_of_the_rows_asked_for_in_their_order(prepare: Prepare) -> None:
    rows = [row("w5 red", "w1", "red"), row(CONTEXT, "w1 w2", "w21"), row("blue", "w2", "blue")]
    task = prepare(rows, max_length=16)
    batch = task.batch(np.array([2, 1, 0]), CPU)
    assert batch["attention_mask"].sum(1).tolist() == [5, 16, 8, 6]
    assert batch["input_ids"].shape == (4, 16)
    # the second window starts at w19, of which w21 is the third token
    assert batch["start_positions"].tolist() == [3, 0, 6, 4]
    assert task.num_examples("train") == 3


def test_a_question_that_is_too_long_is_cut_to_half_the_length(prepare: Prepare) -> None:
    question = " ".join(f"w{number}" for number in range(1, 10))
    batch = prepare([row("w20 w21 w22 w23 w24", question, "w23 w24")]).batch(np.array([0]), CPU)
    asked = ids("[CLS]", "w1", "w2", "w3", "w4", "w5", "w6", "[SEP]")
    assert batch["input_ids"].tolist() == [
        [*asked, *ids("w20", "w21", "w22", "[SEP]")],
        [*asked, *ids("w21", "w22", "w23", "[SEP]")],
        [*asked, *ids("w22", "w23", "w24", "[SEP]")],
    ]
    assert batch["start_positions"].tolist() == [0, 0, 9]


def test_tokens_know_their_characters(world: Path) -> None:
    tokenizer = load_tokenizer(Model(path=str(world / "bert")))
    arrays = encode(["w1"], ["  w10,  red"], tokenizer, 12, 2)
    assert arrays["chars"].tolist() == [[0, 0], [0, 0], [0, 0], [2, 5], [5, 6], [8, 11], [0, 0]]
    assert arrays["contexts"].tolist() == [[3, 6]]
    assert arrays["examples"].tolist() == [0, 1]


def test_many_questions_are_tokenised_in_parts(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(Model(path=str(world / "bert")))
    texts = ["w1 w2", "w3", "w1", "w2 w4", "w5"], ["w9", CONTEXT, "red", CONTEXT, "blue w7"]
    whole = encode(*texts, tokenizer, 12, 2)
    assert whole["examples"].tolist() == [0, 1, 3, 4, 6, 7]
    monkeypatch.setattr("fedlora.tasks.qa.passages.CHUNK", 2)
    parts = encode(*texts, tokenizer, 12, 2)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_an_answer_within_a_word_is_that_word(prepare: Prepare) -> None:
    task = prepare([row("w10 w11 w12 w13", "w1", "11 w1")])
    batch = task.batch(np.array([0]), CPU)
    assert (batch["start_positions"].item(), batch["end_positions"].item()) == (4, 5)


def test_answers_as_a_list_of_tables_are_the_same(prepare: Prepare) -> None:
    rows = [row(CONTEXT, "w1 w2", "w16 w17", "w10"), row("red", "w1", "red")]
    pairs = [zip(*one["answers"].values(), strict=True) for one in rows]
    tables = [
        {**one, "answers": [{"text": text, "answer_start": start} for text, start in found]}
        for one, found in zip(rows, pairs, strict=True)
    ]
    first, second = prepare(rows).batch(np.arange(2), CPU), prepare(tables).batch(np.arange(2), CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("context", "text", "start", "expected"),
    [
        ("a red bus", "red", 2, (2, 5)),
        ("a  red   bus", "red bus", 1, (3, 12)),
        ("a red\u00a0bus", "red bus", 2, (2, 9)),
        ("( 5 % )", "(5%)", 0, (0, 7)),
        ("a red bus", " red ", 1, (2, 5)),
        ("a red bus", "red", 3, None),
        ("a red bus", "Red", 2, None),
        ("a red bus", "red bust", 2, None),
        ("a red bus", " ", 1, None),
        ("a red bus", "s", -1, None),
        ("a red bus", "s", 90, None),
    ],
)
def test_an_answer_stands_where_it_is_said_to_but_for_blanks(
    context: str, text: str, start: int, expected: tuple[int, int] | None
) -> None:
    assert locate(context, text, start) == expected


def test_nothing_is_tokenised_twice(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return encode(*arguments)

    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedlora.tasks.qa.questions.encode", counted)
    rows = [row(CONTEXT, "w1 w2", "w16 w17")]
    first = prepare(rows).batch(np.array([0]), CPU)
    assert len(calls) == 1
    # other answers, same texts
    moved = prepare([row(CONTEXT, "w1 w2", "w10")]).batch(np.array([0]), CPU)
    assert len(calls) == 1
    assert torch.equal(first["input_ids"], moved["input_ids"])
    assert moved["start_positions"].tolist() == [4, 0]
    prepare(rows, stride=1)
    assert len(calls) == 2


def test_equal_contexts_are_held_out_together(world: Path, tmp_path: Path) -> None:
    rows = [row(f"w{number // 4} red", f"w{number % 4}", "red") for number in range(160)]
    files = Files(train=str(write_rows(tmp_path / "all.jsonl", rows)))
    task = QuestionAnswering(max_length=12, stride=2).prepare(Model(path=str(world / "bert")), files)
    sides = [set(task.data[side]["context"]) for side in ("train", "test")]
    assert len(sides[0] | sides[1]) == 40
    assert sides[0] & sides[1] == set()
    assert min(map(len, sides)) > 2


# ---- loss


def test_the_loss_is_the_mean_over_windows_whatever_they_are_padded_to(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(CONTEXT, "w1 w2", "w15 w16"), row("red", "w1", "red"), row("w3 w4 w5 w6 blue", "w1 w2", "w5 w6")]
    task = prepare(rows, max_length=14, eval_batch_size=3)
    model = model_of(task).requires_grad_(False)
    batch = task.batch(np.arange(3), CPU)
    alone = []
    for window in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][window].sum())
        inputs = {name: batch[name][[window], :length] for name in ("input_ids", "attention_mask", "token_type_ids")}
        found = model(**inputs)
        for logits, name in ((found.start_logits, "start_positions"), (found.end_logits, "end_positions")):
            alone.append(-float(logits[0].log_softmax(0)[batch[name][window]]))
    assert len(alone) == 2 * 4
    assert float(task.loss(model, batch)) == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    # a group for each length, which here are not equally many
    monkeypatch.setattr("fedlora.tasks.models.encoded.GROUP_COST", 0)
    assert [len(part["input_ids"]) for part in by_length(batch)] == [1, 2, 1]
    assert float(task.loss(model, batch)) == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    evaluated = task.evaluate(model, np.arange(3), "test", CPU)
    assert evaluated.metrics["loss"] == pytest.approx(sum(alone) / len(alone), abs=1e-5)


def test_padding_takes_no_part_in_the_softmax() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), 50.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])
    loss = span_losses(logits, logits, mask, torch.tensor([0]), torch.tensor([1]))
    # -log(1/4) and -log(3/4)
    assert float(loss.detach()) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    loss.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25, 0.0]]))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "albert", "deberta-v2", "gpt2", "llama", "qwen3"])
def test_every_family_has_its_backbone_and_a_fresh_head_of_two_and_learns(
    world: Path, prepare: Prepare, family: str
) -> None:
    task = prepare(colour_rows(24, 0, "t"), family=family)
    model, head = task.load_model(0, "fp32", CPU)
    assert head == {"qa_outputs.weight", "qa_outputs.bias"}
    assert model.get_parameter("qa_outputs.weight").shape[0] == 2
    saved = AutoModel.from_pretrained(world / family).get_input_embeddings().weight
    assert torch.equal(model.get_submodule(str(model.base_model_prefix)).get_input_embeddings().weight, saved)
    batch = task.batch(np.arange(24), CPU)
    assert ("token_type_ids" in batch) == (family in ("bert", "albert"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = task.loss(model.train(), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_is_saved_as_it_is_loaded(prepare: Prepare, tmp_path: Path, family: str) -> None:
    model = prepare(colour_rows(3, 0, "t"), family=family).load_model(0, "fp32", CPU)[0]
    model.save_pretrained(str(tmp_path / "saved"))  # type: ignore[operator]
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


# ---- decoding


def slow_spans(start: Any, end: Any, longest: int) -> list[tuple[float, int, int]]:
    pairs = [
        (float(start[i]) + float(end[j]), i, j)
        for i, j in itertools.product(range(len(start)), range(len(end)))
        if i <= j < i + longest and math.isfinite(float(start[i]) + float(end[j]))
    ]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))


@pytest.mark.parametrize("seed", range(30))
def test_the_best_spans_are_those_of_all_pairs(seed: int) -> None:
    draw = np.random.default_rng(seed)
    # small integers make ties
    start, end = draw.integers(-3, 4, (2, int(draw.integers(1, 30)))).astype(np.float32)
    start[draw.random(len(start)) < 0.2] = -np.inf
    end[draw.random(len(end)) < 0.2] = np.nan if seed % 5 == 0 else -np.inf
    n_best, longest = int(draw.integers(1, 40)), int(draw.integers(1, 12))
    assert best_spans(start, end, n_best, longest) == slow_spans(start, end, longest)[:n_best]


def test_no_tokens_have_no_spans() -> None:
    assert best_spans(np.zeros(0, np.float32), np.zeros(0, np.float32), 5, 5) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_is_the_best_span_of_all_windows(seed: int) -> None:
    draw = np.random.default_rng(seed)
    words = [f"w{number}" for number in range(20)]
    context = " ".join(words)
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    # as byte pairs do, a token takes the blank before it
    chars = np.array([(max(0, at - 1), at + len(word)) for at, word in zip(starts, words, strict=True)])
    cuts = [slice(0, 9), slice(6, 15), slice(12, 20)]
    windows = [
        Window(*draw.normal(size=(2, len(chars[cut]))).astype(np.float32), chars[cut], float(draw.normal() * 2))
        for cut in cuts
    ]
    best: dict[tuple[int, int], float] = {}
    for cut, window in zip(cuts, windows, strict=True):
        for score, i, j in slow_spans(window.start, window.end, 4):
            span = (int(starts[cut.start + i]), int(chars[cut.start + j, 1]))
            best[span] = max(score, best.get(span, -np.inf))
    span = max(best, key=lambda one: best[one])
    top = sorted(best.values(), reverse=True)[:7]
    found = decode(windows, context, 7, 4, None)
    assert (found.text, found.start) == (context[slice(*span)], span[0])
    assert found.text == found.text.strip()
    assert found.score == pytest.approx(1 / sum(math.exp(score - best[span]) for score in top))
    null = min(window.null for window in windows)
    for threshold in (null - best[span] - 0.01, null - best[span] + 0.01):
        answer = decode(windows, context, 7, 4, threshold)
        empty = threshold < null - best[span]
        assert answer.text == ("" if empty else found.text)
        chosen = null if empty else best[span]
        assert answer.score == pytest.approx(1 / sum(math.exp(score - chosen) for score in [*top, null]))


def test_a_context_without_tokens_has_no_answer() -> None:
    empty = Window(np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros((0, 2), np.int32), 1.0)
    assert decode([empty], "\u200b", 5, 5, None) == Answer("", -1, 0.0, None)
    assert decode([empty], "\u200b", 5, 5, 0.0) == Answer("", -1, 1.0, None)


# ---- metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("a cat, an owl & the dog.", "cat owl dog"),
        ("don't", "dont"),
        ("theatre  another\tan", "theatre another"),
        ("U.S.A.", "usa"),
        ("  ", ""),
        ("The", ""),
        ("«Ärger»", "«ärger»"),
    ],
)
def test_answers_are_compared_without_case_articles_punctuation_and_blanks(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "overlap", "exact"),
    [
        ("the cat sat", ["cat sat down"], 0.8, 0.0),
        ("The cat!", ["dog", "a cat"], 1.0, 1.0),
        ("cat cat", ["cat"], 2 / 3, 0.0),
        ("cat cat", ["cat cat dog"], 0.8, 0.0),
        ("red", ["blue"], 0.0, 0.0),
        ("", ["blue"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("red", [], 0.0, 0.0),
        ("The", ["a"], 1.0, 1.0),
        ("one two three", ["two", "two three four five"], 4 / 7, 0.0),
    ],
)
def test_metrics_of_an_answer(answer: str, references: list[str], overlap: float, exact: float) -> None:
    assert f1(answer, references) == pytest.approx(overlap)
    assert exact_match(answer, references) == exact


def test_figures_with_and_without_questions_that_have_no_answer() -> None:
    answers = [Answer("red", 0, 1.0, (0, 0)), Answer("blue sky", 0, 1.0, (1, 2)), Answer("", -1, 1.0, None)]
    references = [["red"], ["sky"], []]
    assert spans.score(answers, references, 0.5, False).metrics == pytest.approx(
        {"f1": (1 + 2 / 3 + 1) / 3, "exact_match": 2 / 3, "loss": 0.5}
    )
    found = spans.score([*answers, answers[0]], [*references, []], 0.5, True).metrics
    assert found == pytest.approx(
        {
            "f1": (1 + 2 / 3 + 1 + 0) / 4,
            "exact_match": 0.5,
            "has_answer_f1": 5 / 6,
            "has_answer_exact_match": 0.5,
            "no_answer_accuracy": 0.5,
            "loss": 0.5,
        }
    )


def test_a_model_that_always_points_at_the_same_place_is_reported() -> None:
    same = [Answer(f"w{number}", 0, 1.0, (0, 3)) for number in range(40)]
    references = [[f"w{number % 4}"] for number in range(40)]
    (warning,) = spans.score(same, references, 1.0, False).warnings
    assert "token 1 to 4 of the context, as the answer to 40 of 40 questions" in warning
    (warning,) = spans.score([Answer("", -1, 1.0, None)] * 40, references, 1.0, True).warnings
    assert "predicts no answer to 40 of 40 questions" in warning
    mixed = [one._replace(place=(number % 9, 9)) for number, one in enumerate(same)]
    assert spans.score(mixed, references, 1.0, False).warnings == ()
    # right, and few
    assert spans.score(same, [[one.text] for one in same], 1.0, False).warnings == ()
    assert spans.score(same[:9], references[:9], 1.0, False).warnings == ()


class Oracle(nn.Module):
    """Points at given tokens, by id; otherwise at the first one."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted

    def forward(self, input_ids: torch.Tensor, **others: torch.Tensor) -> Any:
        logits = 9.0 * (input_ids == self.wanted).float()
        logits[:, 0] = 4.0
        return SimpleNamespace(start_logits=logits, end_logits=logits)


def test_an_evaluation_reads_every_window_and_keeps_the_order(prepare: Prepare) -> None:
    rows = [row(CONTEXT, "w1 w2", "w21"), row("w3 w21", "w1", "w21"), row(CONTEXT, "w2", "w10"), row("w5", "w1")]
    task = prepare(rows, no_answer=True, eval_batch_size=2)
    found = task.evaluate(Oracle(*ids("w21")), np.array([3, 1, 0, 2]), "test", CPU).metrics
    expected = {"f1": 0.75, "exact_match": 0.75, "has_answer_f1": 2 / 3, "no_answer_accuracy": 1.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert task.evaluate(Oracle(*ids("w21")), np.array([2]), "test", CPU).metrics["f1"] == 0.0


def test_a_question_in_the_context_is_no_answer(prepare: Prepare) -> None:
    task = prepare([row("w5 w7", "w9 w9", "w7")])
    (found,) = task.predict(Oracle(*ids("w9")), ['{"context": "w5 w7", "question": "w9 w9"}'], CPU)
    assert found["answer"] in ("w5", "w7", "w5 w7")


def test_predictions_are_the_contexts_own_characters(prepare: Prepare) -> None:
    task = prepare([row("w5", "w1", "w5")], no_answer=True)
    lines = [
        json.dumps({"context": f"  {CONTEXT}", "question": "w1", "id": 7}),
        json.dumps({"context": "red w4,", "question": "w2"}),
    ]
    first, second = task.predict(Oracle(*ids("w17")), lines, CPU)
    assert list(first) == ["answer", "score", "start"]
    assert (first["answer"], first["start"]) == ("w17", 2 + CONTEXT.index("w17"))
    assert 0 < first["score"] <= 1
    assert (second["answer"], second["start"]) == ("", -1)
    assert task.predict(Oracle(0), [], CPU) == []


# ---- garbage


@pytest.mark.parametrize(
    "line",
    [
        "what is it?",
        "[]",
        "null",
        '{"context": "a"}',
        '{"context": "a", "question": 3}',
        '{"context": " ", "question": "a"}',
        '{"context": "a", "question": "\\u00a0"}',
        '{"context": "\\ud800", "question": "a"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_question_is_refused_in_a_sentence(prepare: Prepare, line: str) -> None:
    task = prepare([row("w5", "w1", "w5")])
    good = '{"context": "w1", "question": "w2"}'
    with pytest.raises(DataError, match=r'^input 2 is .*but a question is asked as \{"context"') as caught:
        task.predict(Oracle(0), [good, line], CPU)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answers": {"text": ["red"], "answer_start": [1]}}, "'red' of training row 1 is not found at character 1"),
        ({"answers": {"text": ["red"], "answer_start": [-1]}}, "is not found at character -1"),
        ({"answers": {"text": ["w5", "blue"], "answer_start": [0, 0]}}, "the answer 'blue' of training row 1"),
        ({"answers": {"text": [], "answer_start": []}}, r"1 of 2 training rows have no answer \(first: row 1\)"),
        ({"answers": {"text": ["w5"], "answer_start": []}}, "column 'answers' of training row 1 holds"),
        ({"answers": {"text": ["w5"], "start": [0]}}, "column 'answers' of training row 0 holds"),
        ({"answers": None}, "column 'answers' has no value in 1 of 2 training rows"),
        ({"context": " "}, "column 'context' is blank in 1 of 2 training rows"),
        ({"question": ""}, "column 'question' is blank in 1 of 2 training rows"),
        ({"question": None}, "column 'question' has no value in 1 of 2 training rows"),
    ],
)
def test_rows_of_another_form_are_refused(prepare: Prepare, wrong: dict[str, Any], message: str) -> None:
    rows = [row("w5 red", "w1", "red"), {**row("w5 red", "w1", "red"), **wrong}]
    if "training row 0" in message:
        rows.reverse()
    with pytest.raises(DataError, match=message):
        prepare(rows)


def test_answers_that_are_words_are_refused(prepare: Prepare) -> None:
    with pytest.raises(DataError, match="column 'answers' of training row 0 holds 'red', but answers are texts and"):
        prepare([{**row("w5 red", "w1", "red"), "answers": "red"}])


def test_test_rows_are_checked_too(prepare: Prepare, tmp_path: Path) -> None:
    good, bad = row("w5 red", "w1", "red"), row("w5", "w1")
    with pytest.raises(DataError, match="1 of 2 test rows have no answer"):
        prepare([good], [good, bad])
    task = prepare([good])
    with pytest.raises(DataError, match=r"1 of 1 .*more.jsonl rows have no answer"):
        task.with_rows(write_rows(tmp_path / "more.jsonl", [bad]), {})
    other = write_rows(tmp_path / "good.jsonl", [{**good, "body": good["context"], "context": "w1"}])
    with pytest.raises(DataError, match="is to become 'context'"):
        task.with_rows(other, {"context": "body"})
    assert task.with_rows(write_rows(tmp_path / "better.jsonl", [good, good]), {}).num_examples("test") == 2


def test_settings_that_cannot_be_are_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"null_threshold = 1.5 .*task.no_answer = true"):
        QuestionAnswering(null_threshold=1.5)
    with pytest.raises(ConfigError, match="so set stride below 3"):
        QuestionAnswering(max_length=12, stride=3).restore(Model(path=str(world / "bert")), [])
    with pytest.raises(ConfigError, match="use a model with a fast tokenizer"):
        check_stride(SimpleNamespace(is_fast=False), 384, 128)


# ---- whole runs


@pytest.fixture(scope="module")
def run_of(world: Path) -> Callable[[str], Path]:
    """Two rounds of SLoRA over six titles, made once for a family; other titles are the test data."""
    write_rows(world / "colours.jsonl", colour_rows(96, 0, "train"))
    write_rows(world / "more_colours.jsonl", colour_rows(24, 1, "test"))

    def run(family: str) -> Path:
        folder = world / "runs" / family
        if not folder.exists():
            if not (world / family).exists():
                save_model(world / family, family)
            fedlora.run(config.parse(colour_document(world, family)), folder)
        return folder

    return run


def colour_document(world: Path, family: str = "bert") -> dict[str, Any]:
    values = document(world, "slora", rounds=2)
    files = {"train": str(world / "colours.jsonl"), "test": str(world / "more_colours.jsonl")}
    values["model"] = {"path": str(world / family)}
    values["data"] = {"kind": "files", **files}
    values["task"] = {"kind": "question_answering", "max_length": 16, "stride": 2}
    values["clients"] = {"per_round": 6, "partition": {"kind": "natural", "column": "title"}}
    return values


def test_a_federated_run_learns(run_of: Callable[[str], Path]) -> None:
    result = json.loads((run_of("bert") / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert set(after) == {"f1", "exact_match", "loss"}
    assert after["loss"] < before["loss"]
    assert all(0 <= found[name] <= 1 for found in (before, after) for name in ("f1", "exact_match"))
    manifest = json.loads((run_of("bert") / "manifest.json").read_text())
    assert manifest["label_names"] == []
    assert manifest["partition"]["num_clients"] == 6


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_peft_on_the_original_base_answers_as_the_run_does(
    run_of: Callable[[str], Path], world: Path, family: str
) -> None:
    adapter = run_of(family) / "adapter"
    trained = fedlora.load_run(run_of(family))
    task = trained.task
    assert isinstance(task, PreparedQuestions)
    # peft's class for the task drops the types of tokens that BERT takes
    task_type = None if family == "bert" else "QUESTION_ANS"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == task_type
    # transformers needs to be told where Llama's backbone goes
    renamed = {"key_mapping": {r"^model\.": "transformer."}} if family == "llama" else {}
    card = (adapter / "README.md").read_text()
    assert ("key_mapping={'^model\\\\.': 'transformer.'}" in card) == bool(renamed), card
    base = AutoModelForQuestionAnswering.from_pretrained(world / family, num_labels=2, **renamed).eval()
    lines = [json.dumps(one) for one in colour_rows(8, 5, "t")]
    with torch.no_grad():
        fresh = task.predict(base, lines, CPU)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            loaded = PeftModel.from_pretrained(base, str(adapter)).eval()
        theirs = task.predict(loaded, lines, CPU)
    ours = trained.predict(lines)
    assert [one["answer"] for one in ours] == [one["answer"] for one in theirs]
    assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)
    assert [one["score"] for one in ours] != pytest.approx([one["score"] for one in fresh], abs=1e-3)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_merged_model_needs_no_peft(run_of: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    trained = fedlora.load_run(run_of(family))
    trained.export(tmp_path / "model", merge=True)
    lines = [json.dumps(one) for one in colour_rows(4, 6, "t")]
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w1")["input_ids"] == ids("[CLS]", "w1", "[SEP]")
    with torch.no_grad():
        found = trained.task.predict(model, lines, CPU)
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in trained.predict(lines)], abs=1e-5)


def test_a_run_is_evaluated_on_other_files(run_of: Callable[[str], Path], world: Path) -> None:
    found = fedlora.load_run(run_of("bert")).evaluate(world / "more_colours.jsonl")
    after = json.loads((run_of("bert") / "result.json").read_text())["after"]
    assert found.metrics == pytest.approx(after, abs=1e-5)


def test_questions_have_no_classes_to_deal_by(run_of: Callable[[str], Path], world: Path) -> None:
    by_class = {"partition": {"kind": "dirichlet"}, "num": 3, "per_round": 3}
    chosen = config.parse({**colour_document(world), "clients": by_class})
    with pytest.raises(DataError, match="the task has no classes"):
        deal(chosen)
    task = chosen.task.prepare(chosen.model, chosen.data)
    assert task.labels.tolist() == [0] * 96
    assert task.label_names == []
    assert task.texts("train")[0] == f"w55 w56 {task.table()['context'][0]}"
    assert task.embeddings("test", CPU).shape == (24, 32)


@pytest.mark.parametrize("name", ["policyqa", "squad"])
def test_real_answers_are_found_in_their_windows(world: Path, tmp_path: Path, name: str) -> None:
    path = shared(f"data/{name}.train.jsonl.gz")
    rows = Files(train=str(path)).load().train.select(range(0, 3600, 9))
    rows.to_json(tmp_path / "some.jsonl")
    files = Files(train=str(tmp_path / "some.jsonl"))
    task = QuestionAnswering(max_length=320, stride=100).prepare(Model(path=str(world / "bert")), files)
    tokenizer = AutoTokenizer.from_pretrained(world / "bert")
    for example, one in enumerate(task.data["train"]):
        batch = task.batch(np.array([example]), CPU)
        found = [pair for pair in zip(batch["start_positions"], batch["end_positions"], strict=True) if pair[0]]
        assert found
        text, start = one["answers"]["text"][0], one["answers"]["answer_start"][0]
        offsets = tokenizer(one["context"], return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        inside = [pair for pair in offsets if pair[0] < start + len(text) and pair[1] > start]
        assert int(found[0][1] - found[0][0]) + 1 == len(inside)

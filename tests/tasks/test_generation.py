"""Generated text: continuations and answers against a slow loop, exact match, answer patterns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import write_rows
from fixtures.tiny_language import (
    BOS,
    BOT,
    CPU,
    EOS,
    STOPS,
    USER,
    WORDS,
    ids,
    instruction_world,
    messages,
    model_of,
    prepare,
    prepare_answers,
    prepare_talks,
    said,
    save_language_model,
    slow_greedy,
)
from torch import Tensor, nn

from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks.lm.answers import extract

world = pytest.fixture(scope="module")(instruction_world)


# ---- continuations


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


@pytest.mark.parametrize(
    "setting",
    [
        "no_repeat_ngram_size",
        "suppress_tokens",
        "repetition_penalty",
        "bad_words_ids",
        "guidance_scale",
        "stop_strings",
    ],
)
def test_generation_settings_of_the_model_change_nothing(world: Path, setting: str) -> None:
    task = prepare(world, max_new_tokens=8)
    model = model_of(task)
    with torch.inference_mode():
        expected = task.predict(model, ["w1", "w5 w6"], CPU)
        first = task.tokenizer.convert_tokens_to_ids(expected[0]["continuation"].split()[0])
        values = {
            **{"no_repeat_ngram_size": 1, "suppress_tokens": [first], "repetition_penalty": 5.0},
            **{"bad_words_ids": [[first]], "guidance_scale": 3.0, "stop_strings": ["w1"]},
        }
        setattr(model.generation_config, setting, values[setting])
        assert task.predict(model, ["w1", "w5 w6"], CPU) == expected
        assert getattr(model.generation_config, setting) == values[setting]


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


# ---- answers


def test_answers_are_those_of_a_slow_loop(world: Path) -> None:
    task = prepare_answers(world, max_new_tokens=8, eval_batch_size=2)
    model = model_of(task)
    asked = ["w1 w2", "w5", "w9 w10 w11 w12"]
    with torch.inference_mode():
        found = task.predict(model, asked, CPU)
    for text, one in zip(asked, found, strict=True):
        expected = slow_greedy(model, [BOS, USER, *ids(text), BOT], STOPS, 8)
        assert one["answer"].split() == said(expected)


def test_exact_match_counts_answers_that_are_the_same(world: Path, tmp_path: Path) -> None:
    task = prepare_answers(world, max_new_tokens=8)
    model = model_of(task)
    asked = ["w1 w2", "w5", "w9", "w12 w13"]
    with torch.inference_mode():
        answers = [one["answer"] for one in task.predict(model, asked, CPU)]
    wanted = [answers[0], "w0", answers[2], f" {answers[3]} "]
    assert all(answers[n] for n in (0, 2, 3))
    assert answers[1] != "w0"
    rows = [{"prompt": one, "answer": two} for one, two in zip(asked, wanted, strict=True)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    for generate, expected in ((4, 0.75), (100, 0.75), (2, 1.0), (1, 1.0)):
        some = prepare_answers(world, file, generate=generate, max_new_tokens=8)
        with torch.inference_mode():
            found = some.evaluate(model, np.arange(4), "test", CPU)
        assert next(iter(found.metrics)) == "exact_match"
        assert found.metrics["exact_match"] == expected
    with torch.inference_mode():
        assert some.evaluate(model, np.array([1]), "test", CPU).metrics["exact_match"] == 0.0


def test_exact_match_of_conversations_asks_for_the_last_turn(world: Path, tmp_path: Path) -> None:
    model = model_of(prepare_talks(world))
    asked = messages(["w1 w2", "w3 w4", "w5"])
    task = prepare_talks(world, max_new_tokens=6, generate=1)
    with torch.inference_mode():
        (found,) = task.predict(model, [json.dumps({"messages": asked})], CPU)
    expected = said(
        slow_greedy(model, [BOS, USER, *ids("w1 w2"), BOT, *ids("w3 w4"), EOS, USER, *ids("w5"), BOT], STOPS, 6)
    )
    assert found["answer"].split() == expected
    assert expected
    for answer, score in ((found["answer"], 1.0), ("w3 w4", 0.0)):
        rows = write_rows(tmp_path / f"{score}.jsonl", [{"messages": [*asked, messages(["", answer])[1]]}])
        with torch.inference_mode():
            other = task.with_rows(rows, {})
            assert other.evaluate(model, np.array([0]), "test", CPU).metrics["exact_match"] == score


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4 and 5 make 9\n#### 9", "9"),
        ("#### 1,200\nand 7 more", "1200"),
        ("#### $3.50", "3.5"),
        ("It is 1,000,000.", "1000000"),
        ("He has 18.00 dollars", "18"),
        ("16-3", "3"),
        ("minus -3.", "-3"),
        ("#### none, but 4 before", "4"),
        ("no number", None),
        ("", None),
        ("about .5", "0.5"),
        ("#### -.50", "-0.5"),
        ("20", "20"),
        ("v2x 7", "7"),
    ],
)
def test_the_final_number_of_a_text(text: str, found: str | None) -> None:
    assert extract("gsm8k", text) == found


def test_other_patterns() -> None:
    assert extract("exact", " w1 \n") == "w1"
    assert extract(r"answer: (\w+)", "the answer: yes!") == "yes"
    assert extract(r"answer: (\w+)", "I do not know") is None
    assert extract(r"a(b)?", "a") is None


def test_an_answer_without_what_is_looked_for_never_matches(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "answer": "w3"}, {"prompt": "w2", "answer": "#### 5"}]
    task = prepare_answers(
        world, write_rows(tmp_path / "rows.jsonl", rows), generate=2, answer_pattern="gsm8k", max_new_tokens=4
    )
    with torch.inference_mode():
        found = task.evaluate(model_of(task), np.arange(2), "test", CPU)
    assert found.metrics["exact_match"] == 0.0
    assert "answer_pattern finds nothing in 1 of 2 test answers, which count as wrong" in found.warnings
    with pytest.raises(DataError, match="finds nothing in any of the 15 test answers"):
        prepare_answers(world, generate=2, answer_pattern=r"(\d{7})")


def test_a_prompt_is_a_turn_of_the_user_where_there_is_a_chat_template(world: Path) -> None:
    task = prepare_talks(world, max_new_tokens=4)
    model = model_of(task)
    as_json = json.dumps({"messages": messages(["w1 w2"])})
    with torch.inference_mode():
        plain, told = task.predict(model, ["w1 w2", as_json], CPU)
        # without one, JSON is a prompt like any other
        prepare_answers(world, max_new_tokens=4).predict(model, [as_json], CPU)
    assert plain == told
    with pytest.raises(DataError, match=r"turn 0 of input 1 \(user\) has no content"):
        task.predict(model, ["w1", '{"messages": [{"role": "user"}]}'], CPU)

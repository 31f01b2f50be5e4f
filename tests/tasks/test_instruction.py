"""Instruction tuning: which tokens are learnt, templates, cutting, packing, federated runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fixtures.shared import shared
from fixtures.tiny import LOCAL, write_rows
from fixtures.tiny_language import (
    BOS,
    BOT,
    CHAT,
    CPU,
    EOS,
    METHODS,
    PAD,
    TEMPLATE,
    USER,
    ids,
    instruction_world,
    messages,
    model_of,
    peft_agrees,
    prepare_answers,
    prepare_talks,
    save_chat_model,
    save_language_model,
    slow_loss,
    targets,
)
from transformers import AutoTokenizer

import fedlora
from fedlora import config
from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import Files, Instruction, Model
from fedlora.tasks.lm.instruction import cut

world = pytest.fixture(scope="module")(instruction_world)


def learnt(task: Any, row: int) -> tuple[list[int], list[int]]:
    """An example's tokens, and those of them that are learnt."""
    batch = task.batch(np.array([row]), CPU)
    length = int(batch["attention_mask"].sum())
    labels = batch["labels"][0, :length]
    return batch["input_ids"][0, :length].tolist(), labels[labels != -100].tolist()


# ---- which tokens are learnt


def test_the_answer_and_its_end_are_learnt_and_nothing_else(world: Path) -> None:
    batch = prepare_answers(world).batch(np.array([0, 1]), CPU)
    first, second = [BOS, USER, *ids("w1 w2"), BOT], [BOS, USER, *ids("w5"), BOT]
    assert batch["input_ids"].tolist() == [
        [*first, *ids("w3 w4"), EOS],
        [*second, *ids("w6 w7 w8"), EOS],
    ]
    assert batch["labels"].tolist() == [
        [-100] * 5 + [*ids("w3 w4"), EOS],
        [-100] * 4 + [*ids("w6 w7 w8"), EOS],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8] * 2


def test_the_default_template_asks_and_ends_in_a_line_break(world: Path) -> None:
    asked = "Question: w1 w2\nAnswer:\n"
    assert Instruction().template.replace("{prompt}", "w1 w2") == asked
    tokens, wanted = learnt(prepare_answers(world, template=Instruction().template), 0)
    assert tokens == [BOS, *AutoTokenizer.from_pretrained(world / "llama")(asked).input_ids[1:], *ids("w3 w4"), EOS]
    assert wanted == [*ids("w3 w4"), EOS]


def test_braces_of_a_prompt_mean_nothing_and_those_of_a_template_are_doubled(world: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "{answer} {0} {prompt}", "answer": "w1"}])
    tokens, _ = learnt(prepare_answers(world, rows, template="{{w2}} w3 {prompt}"), 0)
    assert tokens == [BOS, *[1] * 1, *ids("w3"), 1, 1, 1, *ids("w1"), EOS]


def test_an_end_that_the_tokenizer_puts_after_a_prompt_is_taken_away(world: Path) -> None:
    save_language_model(world / "ending", adds="<s> $A </s>")
    assert learnt(prepare_answers(world, model="ending"), 0) == learnt(prepare_answers(world), 0)


def test_all_turns_of_the_assistant_are_learnt_or_the_last(world: Path) -> None:
    tokens = [BOS, USER, *ids("w1 w2"), BOT, *ids("w3 w4"), EOS, USER, *ids("w5"), BOT, *ids("w6"), EOS]
    assert learnt(prepare_talks(world), 0) == (tokens, [*ids("w3 w4"), EOS, *ids("w6"), EOS])
    assert learnt(prepare_talks(world, learn="last"), 0) == (tokens, [*ids("w6"), EOS])
    labels = prepare_talks(world).batch(np.array([0]), CPU)["labels"][0, :13].tolist()
    assert labels == [-100] * 5 + [*ids("w3 w4"), EOS] + [-100] * 3 + [*ids("w6"), EOS]


def test_prompts_and_answers_can_be_put_into_the_chat_template(world: Path) -> None:
    assert learnt(prepare_talks(world, "pairs.jsonl"), 0) == learnt(prepare_answers(world), 0)


def test_an_end_is_put_where_the_chat_template_has_none(world: Path) -> None:
    save_chat_model(world / "endless", CHAT.replace(" </s>", ""))
    task = prepare_answers(world, "talks.jsonl", "endless", template="chat")
    tokens = [BOS, USER, *ids("w1 w2"), BOT, *ids("w3 w4"), USER, *ids("w5"), BOT, *ids("w6"), EOS]
    assert learnt(task, 0) == (tokens, [*ids("w3 w4"), *ids("w6"), EOS])


def test_what_comes_after_the_last_answer_is_left_out(world: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": messages(["w1", "w2", "w3"])}])
    assert learnt(prepare_talks(world, rows), 0) == ([BOS, USER, *ids("w1"), BOT, *ids("w2"), EOS], [*ids("w2"), EOS])


def test_turns_with_further_entries_and_turns_as_text_are_read(world: Path, tmp_path: Path) -> None:
    one = messages(["w1", "w2"])
    more = [{**one[0], "name": "me"}, one[1]]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": more}, {"messages": one}])
    assert learnt(prepare_talks(world, rows), 0) == learnt(prepare_talks(world, rows), 1)
    text = write_rows(tmp_path / "text.jsonl", [{"messages": json.dumps(one)}])
    assert learnt(prepare_talks(world, text), 0) == learnt(prepare_talks(world, rows), 1)


def test_rows_without_an_answer_are_left_out_and_told_of(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "answer": " "}, {"prompt": "w2", "answer": "w3"}, {"prompt": "w4", "answer": ""}]
    task = prepare_answers(world, write_rows(tmp_path / "rows.jsonl", rows))
    assert (task.num_examples("train"), task.texts("train")) == (1, ["w2"])
    with torch.no_grad():
        found = task.evaluate(model_of(task), np.array([0]), "test", CPU)
    assert found.warnings[-1] == "2 of 3 test rows have no answer to train on and are left out"
    silent = write_rows(
        tmp_path / "silent.jsonl", [{"messages": messages(["w1"])}, {"messages": messages(["w2", " "])}]
    )
    with pytest.raises(DataError, match="all 2 train rows have no answer to train on"):
        prepare_talks(world, silent)


# ---- cutting


def test_long_prompts_lose_their_left_and_keep_their_begin(world: Path) -> None:
    task = prepare_answers(world, max_length=6)
    # begin, user, four words, bot, one word, end: nine tokens
    assert learnt(task, 2) == ([BOS, *ids("w11 w12"), BOT, *ids("w13"), EOS], [*ids("w13"), EOS])
    # a prompt is cut to its begin before an answer is touched
    assert learnt(prepare_answers(world, max_length=4), 1) == ([BOS, *ids("w6 w7 w8")], ids("w6 w7 w8"))
    with torch.no_grad():
        found = task.evaluate(model_of(task), np.array([0]), "test", CPU)
    assert found.warnings == (
        "15 of 15 train rows were cut to max_length = 6 tokens",
        "15 of 15 test rows were cut to max_length = 6 tokens",
    )


@pytest.mark.parametrize(
    ("tokens", "marks", "size", "expected"),
    [
        ([2, 5, 6, 7], [0, 0, 1, 1], 4, ([2, 5, 6, 7], [0, 0, 1, 1])),
        ([2, 5, 6, 7, 8], [0, 0, 0, 1, 1], 3, ([2, 7, 8], [0, 1, 1])),
        ([2, 5, 6, 7, 8], [0, 0, 0, 1, 1], 2, ([2, 7], [0, 1])),
        ([5, 6, 7, 8], [0, 0, 1, 1], 3, ([6, 7, 8], [0, 1, 1])),
        ([5, 6, 7, 8], [0, 0, 1, 1], 2, ([6, 7], [0, 1])),
        # an earlier answer goes before the last one does
        ([2, 5, 6, 7, 8, 9], [0, 0, 1, 0, 1, 1], 4, ([2, 7, 8, 9], [0, 0, 1, 1])),
        ([6, 7, 8], [1, 1, 1], 2, ([6, 7], [1, 1])),
    ],
)
def test_cutting_by_hand(tokens: list[int], marks: list[int], size: int, expected: Any) -> None:
    assert cut(tokens, marks, size, bos=2) == expected


# ---- packing, loss and metrics


def test_whole_examples_are_joined(world: Path) -> None:
    batch = prepare_answers(world, max_length=17, packing=True).batch(np.arange(3), CPU)
    first, second = [BOS, USER, *ids("w1 w2"), BOT, *ids("w3 w4"), EOS], [BOS, USER, *ids("w5"), BOT]
    third = [BOS, USER, *ids("w9 w10 w11 w12"), BOT, *ids("w13"), EOS]
    assert batch["input_ids"].tolist() == [
        [*third, *first],
        [*second, *ids("w6 w7 w8"), EOS, *[PAD] * 9],
    ]
    assert batch["labels"][0].tolist() == [-100] * 7 + [*ids("w13"), EOS] + [-100] * 5 + [*ids("w3 w4"), EOS]
    assert targets(batch) == targets(prepare_answers(world).batch(np.arange(3), CPU))


@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_metrics_are_those_of_a_slow_loop(world: Path, packing: bool) -> None:
    task = prepare_answers(world, packing=packing, max_length=24, eval_batch_size=4)
    model, rows = model_of(task), np.array([14, 2, 0, 7, 1])
    total, _, count = slow_loss(model, task.batch(rows, CPU))
    alone = slow_loss(model, prepare_answers(world).batch(rows, CPU))
    with torch.inference_mode():
        assert float(task.loss(model, task.batch(rows, CPU))) == pytest.approx(total / count, abs=1e-5)
        found = task.evaluate(model, rows, "test", CPU).metrics
    assert count == alone[2] == 3 + 4 + 2 + 3 + 3
    assert found["loss"] == pytest.approx(alone[0] / count, abs=1e-5)
    assert found["accuracy"] == alone[1] / count
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_without_generation_the_main_metric_is_the_accuracy_of_tokens(world: Path) -> None:
    assert prepare_answers(world).main_metric == "accuracy"
    assert prepare_answers(world, generate=2).main_metric == "exact_match"


@pytest.mark.parametrize("packing", [False, True])
def test_embeddings_are_means_over_examples(world: Path, packing: bool) -> None:
    task = prepare_answers(world, packing=packing)
    found, model = task.embeddings("test", CPU), model_of(task)
    with torch.no_grad():
        hidden = model.model(torch.tensor([learnt(prepare_answers(world), 1)[0]])).last_hidden_state  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(found[1], hidden[0].mean(0).numpy(), atol=1e-5)


# ---- what is refused


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no place for the prompt"):
        Instruction(template="Question:")
    with pytest.raises(ConfigError, match="has 0 groups"):
        Instruction(answer_pattern="gsm")
    with pytest.raises(ConfigError, match="has 2 groups"):
        Instruction(answer_pattern="(a)(b)")
    with pytest.raises(ConfigError, match="is not a regular expression"):
        Instruction(answer_pattern="(a")
    with pytest.raises(ConfigError, match=r"task.*learn = 'first'"):
        config.parse({"task": {"kind": "instruction", "learn": "first"}})


def test_a_chat_template_that_is_not_there_is_told_of(world: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template, which task"):
        prepare_answers(world, "talks.jsonl", template="chat")
    with pytest.raises(ConfigError, match=r'set task\.template = "chat"'):
        prepare_answers(world, "talks.jsonl", "chat")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "w1"}], "no column 'answer', only prompt"),
        ([{"prompt": "w1", "answer": 3}], "column 'answer' of the training rows holds int64, not text"),
        ([{"prompt": "w1", "answer": "w1"}, {"prompt": "w1", "answer": None}], "has no value in 1 of 2"),
    ],
)
def test_garbage_is_refused(world: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_answers(world, write_rows(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("w1 w2", "row 0 of the training rows is not a conversation: 'messages' should be a list"),
        ([], "row 0 of the training rows is not a conversation"),
        (["w1"], "row 0 of the training rows is not a conversation"),
        ([{"role": "user"}], r"turn 0 of row 0 of the training rows \(user\) has no content and calls no tool"),
        ([{"role": "user", "content": {"type": "image_url"}}], "has the part {'type': 'image_url'}, but only text"),
        ([{"content": "w1"}], "turn 0 of row 0 of the training rows has no role as text, only content"),
        (
            [{"role": "user", "content": "w1"}, {"role": "critic", "content": "w2"}],
            "has the roles user, critic, but critic is none that is read",
        ),
        ([{"role": "assistant", "content": "w1", "weight": 0.5}], "has weight 0.5, but a turn is learnt"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "calls a tool by {'id': '1'}"),
    ],
)
def test_conversations_that_are_none_are_refused(world: Path, tmp_path: Path, bad: Any, message: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": bad}])
    with pytest.raises(DataError, match=message):
        prepare_talks(world, rows)


def test_turns_that_the_template_refuses_are_told_of(world: Path) -> None:
    save_chat_model(world / "strict", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"chat template refuses row 0 \(roles must alternate\)"):
        prepare_answers(world, "talks.jsonl", "strict", template="chat")


def test_a_template_that_rewrites_what_was_said_can_learn_the_last_turn_alone(world: Path) -> None:
    # as templates do that drop what was thought before earlier answers
    save_chat_model(
        world / "forgetful",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} <user> {{ m.content }}{% else %} <bot>"
        "{% if loop.last %} w50{% endif %} {{ m.content }} </s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} <bot>{% endif %}",
    )
    with pytest.raises(DataError, match=r'row 0 differently once turn 1 is added.*set task.learn = "last"'):
        prepare_answers(world, "talks.jsonl", "forgetful", template="chat")
    task = prepare_answers(world, "talks.jsonl", "forgetful", template="chat", learn="last")
    assert learnt(task, 0)[1] == [*ids("w50 w6"), EOS]


def test_a_template_that_writes_the_day_writes_the_same_one_on_every_day(world: Path) -> None:
    save_chat_model(
        world / "dated",
        "w{{ strftime_now('%Y')[2:] }} w{{ strftime_now( \"%m\" )[1:] }} w0 " + CHAT,
    )
    task = prepare_answers(world, "talks.jsonl", "dated", template="chat")
    assert learnt(task, 0)[0][:4] == [*ids("w24 w7 w0"), BOS]
    assert any("2024-07-26 is written on every day" in note for note in task.notes)
    assert not any("is written" in note for note in prepare_talks(world).notes)
    save_chat_model(world / "forms", "{% set form = '%Y' %}{{ strftime_now(form) }}" + CHAT)
    with pytest.raises(ConfigError, match="reads the clock in a form that it computes"):
        prepare_answers(world, "talks.jsonl", "forms", template="chat")


def test_the_cache_tells_settings_apart(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    prepare_answers(world)
    first = len(list((tmp_path / "tokens").iterdir()))
    for settings in ({"template": "{prompt}"}, {"max_length": 9}, {"learn": "last"}):
        prepare_answers(world, **settings)
    prepare_talks(world)
    assert (first, len(list((tmp_path / "tokens").iterdir()))) == (1, 5)
    monkeypatch.setattr("fedlora.tasks.lm.instruction._pairs", None)
    prepare_answers(world)


# ---- whole runs


def document(world: Path, method: str, **task: Any) -> dict[str, Any]:
    return {
        "label": method,
        "model": {"path": str(world / "llama")},
        "task": {"kind": "instruction", "template": TEMPLATE, "max_new_tokens": 4, **task},
        "data": {"kind": "files", "train": str(world / "pairs.jsonl"), "test_fraction": 0.3},
        "clients": {"per_round": 2, "partition": {"kind": "natural", "column": "user"}, "test_clients": 0.25},
        "evaluate": {"every": 1},
        "method": {**METHODS[method], "rank": 4, "alpha": 12.0, "rounds": 2, "local": LOCAL},
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("method", ["flasc", "federa"])
@pytest.mark.parametrize("settings", [{}, {"packing": True, "generate": 2}])
def test_a_federated_run_learns_and_is_exported(
    world: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    result = fedlora.run(config.parse(document(world, method, **settings)), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert result.main_metric == ("exact_match" if settings else "accuracy")
    assert result.main_metric in result.after
    assert "head" not in {**result.down_bytes, **result.up_bytes}
    peft_agrees(tmp_path / "run", world / "llama")
    trained = fedlora.load_run(tmp_path / "run")
    assert set(trained.predict(["w1 w2"])[0]) == {"answer"}
    assert trained.evaluate(world / "pairs.jsonl").metrics["loss"] < 10


def test_what_can_be_learnt_is_learnt_and_answered(world: Path, tmp_path: Path) -> None:
    values = document(world, "lora", generate=12, max_new_tokens=3)
    values["clients"] = {"num": 2, "per_round": 2, "partition": {"kind": "iid"}}
    values["data"] = {"kind": "files", **dict.fromkeys(("train", "test"), str(world / "pairs.jsonl"))}
    local = {"optimizer": {"kind": "adamw", "lr": 0.01}, "batch_size": 4, "epochs": 8}
    lora = {"kind": "lora", "rank": 8, "alpha": 8.0, "targets": "all-linear", "server": {"kind": "sgd", "lr": 1.0}}
    values |= {"method": {**lora, "rounds": 8, "local": local}, "evaluate": {"every": 8}}
    result = fedlora.run(config.parse(values), tmp_path / "run")
    assert result.before["exact_match"] == 0.0
    assert result.after["exact_match"] > 0.8
    assert fedlora.load_run(tmp_path / "run").predict(["w1 w2"]) == [{"answer": "w3 w4"}]


# ---- a real model on real problems


def test_a_real_model_on_real_problems(world: Path, tmp_path: Path) -> None:
    folder = shared("models/stories260K")
    rows = datasets.Dataset.from_json(str(shared("data/gsm8k.test.jsonl.gz")), cache_dir=str(tmp_path))
    file = write_rows(tmp_path / "rows.jsonl", list(rows.select(range(40))))
    files = Files(train=str(file), test=str(file), columns={"prompt": "question"})
    settings = {"max_length": 400, "generate": 2, "max_new_tokens": 16, "answer_pattern": "gsm8k"}
    task = Instruction(**settings).prepare(Model(path=str(folder)), files)
    model, head = task.load_model(0, "fp32", CPU)
    model.eval()
    assert head == frozenset()
    batch = task.batch(np.array([1]), CPU)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels, length = batch["labels"][0], int(batch["attention_mask"].sum())
    # what is learnt is the answer, to the letter, and its end
    answer = labels[labels != -100]
    assert tokenizer.decode(answer, skip_special_tokens=True) == rows[1]["answer"]
    assert answer[-1] == tokenizer.eos_token_id
    shown = tokenizer.decode(batch["input_ids"][0, : length - len(answer)], skip_special_tokens=True)
    assert shown == f"Question: {rows[1]['question']}\nAnswer:\n"
    with torch.inference_mode():
        found = task.evaluate(model, np.arange(12), "test", CPU)
        answers = task.predict(model, ["How many legs has a dog?"], CPU)
    assert 4.0 < found.metrics["loss"] < 10.0
    assert 0.0 <= found.metrics["exact_match"] <= 1.0
    assert answers[0]["answer"]

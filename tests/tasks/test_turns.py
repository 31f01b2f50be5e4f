"""Conversations and instruction data in the forms of others, tools, weights, and templates over any column."""

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
    USER,
    ids,
    instruction_world,
    messages,
    model_of,
    prepare_answers,
    prepare_talks,
    save_chat_model,
)

from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import Instruction, Model, Rows
from fedlora.tasks.lm.chat import Conversation, render
from fedlora.tasks.lm.forms import standard
from fedlora.tasks.lm.tools import fitted
from fedlora.tasks.lm.turns import LEARNT, read_messages

world = pytest.fixture(scope="module")(instruction_world)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
QWEN = "{% for m in messages %}{% if m.role == 'tool' %}{{ m.tool_calls }}{% endif %}{% endfor %}"


def learnt(task: Any, row: int) -> tuple[list[int], list[int]]:
    batch = task.batch(np.array([row]), CPU)
    length = int(batch["attention_mask"].sum())
    labels = batch["labels"][0, :length]
    return batch["input_ids"][0, :length].tolist(), labels[labels != -100].tolist()


# ---- roles and content


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}],
        [{"role": "human", "content": "w1"}, {"role": "gpt", "content": "w2"}],
        [{"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "1"}]}, "ASSISTANT"],
        [{"role": "user", "content": ["w1"]}, "ASSISTANT"],
        [{"role": "user", "content": {"type": "text", "text": "w1"}}, "ASSISTANT"],
        {"role": ["user", "assistant"], "content": ["w1", "w2"]},
        {"from": ["human", "gpt"], "value": ["w1", "w2"]},
    ],
)
def test_turns_in_every_form_are_messages(turns: Any) -> None:
    answer = {"role": "assistant", "content": "w2"}
    given = [answer if one == "ASSISTANT" else one for one in turns] if isinstance(turns, list) else turns
    assert read_messages(given, "it") == [{"role": "user", "content": "w1"}, answer]
    assert read_messages(json.dumps(given), "it") == [{"role": "user", "content": "w1"}, answer]


def test_conversations_of_sharegpt_are_read_with_their_system(world: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"conversations": talk}, {"conversations": talk}])
    assert learnt(prepare_talks(world, rows), 0) == ([BOS, USER, *ids("w1"), BOT, *ids("w2"), EOS], [*ids("w2"), EOS])
    row = {"conversations": talk, "system": "w9"}
    found = standard(Rows(train=[row, {**row, "system": " "}]).load().train, ["prompt"])
    roles = [[one["role"] for one in read_messages(value, "it")] for value in found["messages"]]
    assert (found.column_names, roles) == (["messages"], [["system", "user", "assistant"], ["user", "assistant"]])


def test_turns_of_weight_0_are_read_and_not_learnt(world: Path, tmp_path: Path) -> None:
    talk = messages(["w1", "w2", "w3", "w4"])
    marked = [{**one, "weight": weight} for one, weight in zip(talk, (1, 0, 0, 1), strict=True)]
    late = [{**one, "weight": weight} for one, weight in zip(talk, (1, 1, 1, 0), strict=True)]
    trained = [talk[0], {**talk[1], "train": False}, *talk[2:]]
    rows = [{"messages": one} for one in (marked, late, trained, [talk[0], {**talk[1], "weight": 0}])]
    task = prepare_talks(world, write_rows(tmp_path / "rows.jsonl", rows))
    whole = [BOS, USER, *ids("w1"), BOT, *ids("w2"), EOS, USER, *ids("w3"), BOT, *ids("w4"), EOS]
    assert learnt(task, 0) == learnt(task, 2) == (whole, [*ids("w4"), EOS])
    assert learnt(task, 1) == (whole[:6], [*ids("w2"), EOS])
    assert task.num_examples("train") == 3
    with torch.no_grad():
        found = task.evaluate(model_of(task), np.array([0]), "test", CPU)
    assert found.warnings[-1].startswith("1 of 4 test rows have no answer to train on (blank, or marked with weight 0)")


def test_weight_0_of_every_turn_leaves_nothing_to_learn(world: Path, tmp_path: Path) -> None:
    silent = [{**one, "weight": 0} for one in messages(["w1", "w2"])]
    with pytest.raises(DataError, match="all 2 train rows have no answer to train on"):
        prepare_talks(world, write_rows(tmp_path / "rows.jsonl", [{"messages": silent}] * 2))


# ---- tools


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ],
)
def test_calls_of_tools_in_every_form_are_kept(turn: dict[str, Any]) -> None:
    (found,) = read_messages([turn], "it")
    assert found == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_tools_are_text_where_the_template_has_no_place_for_them(world: Path, tmp_path: Path) -> None:
    talk = [
        {"role": "developer", "content": "d"},
        {"role": "assistant", "content": "c", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "assistant", "content": "w2"},
    ]
    read = read_messages(talk, "it")
    assert fitted("{{ messages }}", read) == [
        {"role": "system", "content": "d"},
        {
            "role": "assistant",
            "content": 'c\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"},
        {"role": "assistant", "content": "w2"},
    ]
    kept = fitted(QWEN + "{{ 'developer' }}", read)
    assert kept == read
    task = prepare_talks(world, write_rows(tmp_path / "rows.jsonl", [{"messages": [*messages(["w1"]), *talk[1:]]}]))
    calls, answers = task.notes
    assert calls.startswith("2 of 2 rows call tools, for which the chat template has no place: calls are written as")
    assert answers.startswith("2 of 2 rows have answers of tools")
    # the call and the answer are learnt, and what tools say is not
    assert learnt(task, 0)[1] == [1] * 8 + [EOS, *ids("w2"), EOS]


def test_a_template_gets_calls_and_tools_as_its_makers_mean(world: Path, tmp_path: Path) -> None:
    source = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} ARGUMENTS]{% endfor %}|{% endfor %}"
    )
    talk = [*messages(["a"]), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    for written, arguments in (
        ("{{ c.function.arguments | tojson }}", '{"x": 1}'),
        ("{{ '' + c.function.arguments }}", '{"x": 1}'),
    ):
        save_chat_model(tmp_path / "tools", source.replace("ARGUMENTS", written))
        tokenizer = prepare_answers(world, model=str(tmp_path / "tools")).tokenizer
        one = Conversation(read_messages(talk, "it"), [{"type": "function", "function": {"name": "f"}}])
        assert render(tokenizer, one, "it", answer_next=False) == f"f user:a|assistant:[f {arguments}]|"
    rows = [{"messages": talk, "tools": json.dumps([{"function": {"name": "f"}}])}]
    task = prepare_talks(world, write_rows(tmp_path / "rows.jsonl", rows))
    assert any("describe tools, which the chat template leaves out" in note for note in task.notes)
    assert task.reads == {"messages", "tools"}


def test_rows_in_memory_may_mix_text_and_parts(world: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}, {"role": "assistant", "content": "w2"}]
    source = Rows(train=[{"messages": parts}, {"messages": messages(["w1", "w2"])}], test=[{"messages": parts}])
    task = Instruction(template="chat").prepare(Model(path=str(world / "chat")), source)
    assert learnt(task, 0) == learnt(task, 1)


# ---- columns of others


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w1 w2", "completion": "w3 w4"},
        {"instruction": "w1", "input": "w2", "output": "w3 w4"},
        {"instruction": "w1 w2", "input": "", "output": "w3 w4"},
        {"instruction": "w1", "context": "w2", "response": "w3 w4"},
    ],
)
def test_columns_of_trl_alpaca_and_dolly_are_prompts_and_answers(world: Path, tmp_path: Path, row: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [row])
    assert learnt(prepare_answers(world, file), 0) == learnt(prepare_answers(world), 0)
    assert learnt(prepare_talks(world, file), 0) == learnt(prepare_answers(world), 0)
    assert prepare_answers(world, file).texts("train") in (["w1 w2"], ["w1\nw2"])


def test_prompts_and_completions_that_are_messages_learn_the_completion(world: Path, tmp_path: Path) -> None:
    talk = messages(["w1", "w2", "w3", "w4"])
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": talk[:3], "completion": talk[3:]}])
    whole = [BOS, USER, *ids("w1"), BOT, *ids("w2"), EOS, USER, *ids("w3"), BOT, *ids("w4"), EOS]
    assert learnt(prepare_talks(world, file), 0) == (whole, [*ids("w4"), EOS])
    with pytest.raises(ConfigError, match=r'set task\.template = "chat"'):
        prepare_answers(world, file)


# ---- templates


def test_a_template_takes_any_column(world: Path, tmp_path: Path) -> None:
    rows = [{"task": "w1", "number": n, "more": more, "answer": "w3"} for n, more in ((1, "w2"), (2, None))]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    task = prepare_answers(world, file, template="{task} w{number} {more} w9", max_new_tokens=4)
    assert task.texts("train") == ["w1 w1 w2 w9", "w1 w2  w9"]
    assert learnt(task, 1)[0] == [BOS, *ids("w1 w2 w9 w3"), EOS]
    assert task.notes[0].startswith("column 'more' has no value in 1 of 2 train rows, where the template's {more} is")
    assert task.reads == {"task", "number", "more", "answer"}
    one = json.dumps({"task": "w1", "number": 1, "more": "w2"})
    with torch.inference_mode():
        assert len(task.predict(model_of(task), [one], CPU)) == 1
        with pytest.raises(DataError, match=r"input 0 lacks task, number, more of the template: give JSON such as"):
            task.predict(model_of(task), ["w1"], CPU)
    assert json.loads(task.inputs_of(task.data["train"], "given")[0]) == json.loads(one)


def test_one_column_of_a_template_is_asked_for_as_a_text(world: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "w1", "answer": "w3"}])
    task = prepare_answers(world, file, template="{question} w9", max_new_tokens=4)
    with torch.inference_mode():
        plain, told = task.predict(model_of(task), ["w1", '{"question": "w1"}'], CPU)
    assert plain == told


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("w1", "has no place for the prompt"),
        ("{prompt} {", "has the brace '{' at character 9, which is not around the name of a column"),
        ("{prompt} {}", "has the brace '{' at character 9"),
        ("{{{prompt}}", "has the brace '}'"),
        ("{prompt} {answer}", "has the answer in the text before the answer"),
    ],
)
def test_braces_around_no_name_are_refused_when_they_are_set(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Instruction(template=template)


def test_names_that_are_no_columns_are_refused_with_the_columns(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has \{input\}, but the training rows have no such column, only prompt, answer"
    ):
        prepare_answers(world, template="{prompt} {input}")
    rows = [{"prompt": "w1", "list": ["w2"], "answer": "w3"}]
    with pytest.raises(
        DataError, match=r"column 'list' of the training rows holds \['w2'\], but a template takes text"
    ):
        prepare_answers(world, write_rows(tmp_path / "rows.jsonl", rows), template="{prompt} {list}")


def test_marks_of_ours_do_not_reach_a_template(world: Path, tmp_path: Path) -> None:
    save_chat_model(tmp_path / "keys", "{% for m in messages %}{{ m.keys() | list }}{% endfor %}")
    tokenizer = prepare_answers(world, model=str(tmp_path / "keys")).tokenizer
    read = read_messages([{"role": "assistant", "content": "a", "weight": 0}], "it")
    assert read[0][LEARNT] is False
    assert render(tokenizer, Conversation(read), "it", answer_next=False) == "['role', 'content']"

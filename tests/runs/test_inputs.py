"""Inputs for predictions: what an argument of the command line stands for."""

from __future__ import annotations

import functools
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedlora.core.errors import DataError
from fedlora.runs.inputs import read_inputs
from fedlora.tasks import (
    CausalLM,
    ImageClassification,
    Instruction,
    QuestionAnswering,
    TextClassification,
    TokenClassification,
)
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.images.images import PreparedImages
from fedlora.tasks.lm.instruction import PreparedInstruction
from fedlora.tasks.lm.language import PreparedLanguage
from fedlora.tasks.qa.questions import PreparedQuestions
from fedlora.tasks.tags.tokens import PreparedTokens
from fedlora.tasks.text import PreparedText

gz = functools.partial(gzip.compress, mtime=0)
"""The same bytes in every process, of which names of tests are made."""

OF = {
    TextClassification(): PreparedText,
    CausalLM(): PreparedLanguage,
    Instruction(): PreparedInstruction,
    Instruction(template="chat"): PreparedInstruction,
    QuestionAnswering(): PreparedQuestions,
    TokenClassification(): PreparedTokens,
    ImageClassification(): PreparedImages,
}


def task_of(settings: Any = None) -> Any:
    """A task without a model, which inputs need no more than its settings of."""
    settings = settings or TextClassification()
    task: Any = object.__new__(OF[settings])
    task.settings = settings
    return task


def inputs(given: object, task: Any = None, columns: dict[str, str] | None = None, **reading: Any) -> list[str]:
    return read_inputs(str(given), task or task_of(), columns or {}, Reading(**reading))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbfone\r\n\ntwo"),
        ("a.TXT.gz", gz(b"one\ntwo\n")),
        ("no_ending", "one\ntwo\n".encode("utf-16")),
        ("a.csv", b"id,text\n1,one\n2,two\n"),
        ("a.tsv", b"text\tlabel\none\t\ntwo\t\n"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two", "label": "x"}\n'),
        ("a.json", b'{"data": [{"text": "one"}, {"text": "two"}]}'),
        ("a.jsonl.gz", gz(b'{"text": "one"}\n{"text": "two"}\n')),
    ],
)
def test_every_file_gives_its_texts(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert inputs(tmp_path / name) == ["one", "two"]


def test_tables_and_saved_folders_give_their_texts(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict(train=rows.select([0]), test=rows).save_to_disk(str(tmp_path / "saved"))
    assert inputs(tmp_path / "a.parquet") == inputs(tmp_path / "saved") == ["one", "two"]


@pytest.mark.parametrize(
    ("settings", "row", "expected"),
    [
        (TextClassification(), {"text": "a", "text_pair": "b"}, '["a", "b"]'),
        (CausalLM(), {"text": "a"}, "a"),
        (Instruction(), {"prompt": "a", "answer": "b"}, "a"),
        (Instruction(template="chat"), {"prompt": "a"}, "a"),
        (Instruction(template="chat"), {"messages": [{"role": "user", "content": "a"}]}, None),
        (QuestionAnswering(), {"context": "\u00e4", "question": "b"}, '{"context": "\u00e4", "question": "b"}'),
        (TokenClassification(), {"tokens": ["a", "b"]}, '["a", "b"]'),
        (TokenClassification(), {"text": "a b."}, "a b."),
        (ImageClassification(), {"image": "a.png"}, "a.png"),
    ],
)
def test_rows_give_the_inputs_of_their_task(
    tmp_path: Path, settings: Any, row: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps(row)
    (tmp_path / "a.jsonl").write_text(line + "\n")
    assert inputs(tmp_path / "a.jsonl", task_of(settings)) == [expected or line]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
    assert inputs("-", task_of(settings)) == [expected or line]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbfone", ["one"]),
        (b'{"text": "one"}\n\n{"text": "two"}', ["one", "two"]),
        (b'{"text": "one"}\ntwo', ['{"text": "one"}', "two"]),
        (b'["one", "two"]', ['["one", "two"]']),
        (b"[" * 50_000, ["[" * 50_000]),
    ],
)
def test_standard_input(content: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert inputs("-") == expected


def test_a_closed_standard_input_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        inputs("-")


def test_an_input_itself(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    for given in ("see notes.txt", "a", "x" * 10_000, "a\nb.", "\0.csv x", str(tmp_path / "a.png"), str(tmp_path)):
        assert inputs(given) == [given]
    assert inputs("\udcc3\udcb8") == ["\u00f8"]  # as the locale C gives it
    with pytest.raises(DataError, match="is no UTF-8 text"):
        inputs("\udcff")


def test_columns_and_reading_are_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("id;body\n1;n\u00f8\n".encode("latin-1"))
    assert inputs(tmp_path / "a.csv", columns={"text": "body"}, delimiter=";", encoding="latin-1") == ["n\u00f8"]
    with pytest.raises(DataError, match=r"no column 'text', only id, body: .*-c text="):
        inputs(tmp_path / "a.csv", delimiter=";", encoding="latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", None, "there is no file .*notes.txt"),
        ("a.parquet.gz", None, "there is no file .*a.parquet.gz"),
        ("a.txt", b" \n", "there is no text to predict"),
        ("a.txt", b"caf\xe9", "is no UTF-8 text"),
        ("a.csv", b"text,text\na,b\n", "has the name 'text' twice"),
        ("a.jsonl", b'{"text": null}\n', "has no value in 1 of 1"),
        ("a", b"\x1f\x8b", "is packed by gzip"),
    ],
)
def test_inputs_that_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        inputs(tmp_path / name)


def test_the_runs_format_is_that_of_files_whose_ending_names_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text,label\na,x\n")
    assert inputs(tmp_path / "a.txt", format="csv") == ["a"]
    assert inputs(tmp_path / "a.txt", format="txt") == inputs(tmp_path / "a.txt") == ["text,label", "a,x"]

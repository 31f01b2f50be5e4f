"""Files in the forms that they come in: what is read from each, and the sentence for what is refused."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any, get_args

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import QuestionAnswering, TextClassification, TokenClassification
from fedlora.tasks.data import delimited, opening, tables
from fedlora.tasks.data.columns import check_rows, check_texts, rename, typed
from fedlora.tasks.data.files import FORMATS, read_rows
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.data.sources import Files, Hub, Sites

gz = functools.partial(gzip.compress, mtime=0)
"""The same bytes in every process, of which names of tests are made."""

ROW = b'{"text": "a", "label": "x"}\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows_of(tmp_path: Path, name: str, content: bytes | str, **reading: Any) -> list[dict[str, Any]]:
    """What is read from a file with this content."""
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    rows: list[dict[str, Any]] = read_rows(str(tmp_path / name), Reading(**reading)).to_list()
    return rows


def squad(answers: list[Any]) -> dict[str, Any]:
    asked = [{"id": str(row), "question": "who?", "answers": one} for row, one in enumerate(answers)]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "Ida in Bern", "qas": asked}]}]}


# ---- formats that no ending names


@pytest.mark.parametrize("name", ["a.txt", "a.data", "a", "a.txt.gz"])
def test_a_format_is_of_files_whose_ending_names_none(tmp_path: Path, name: str) -> None:
    content = b"text,label\na,x\n"
    content = gz(content) if name.endswith(".gz") else content
    assert rows_of(tmp_path, name, content, format="csv") == [{"text": "a", "label": "x"}]
    assert rows_of(tmp_path, "a.jsonl", ROW, format="csv") == [{"text": "a", "label": "x"}]


def test_an_unknown_ending_names_the_formats_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in '.data', but .*.csv, .tsv, .*or name the format, as in data.format"):
        rows_of(tmp_path, "a.data", "text,label\na,x\n")
    assert {f".{one}" for one in get_args(opening.Format)} == FORMATS.keys()


# ---- csv and tsv


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,label\n1.50,01\n,NA\n", [("1.50", "01"), (None, "NA")]),
        ("A.CSV", "text,label\r\nx,y\r\n", [("x", "y")]),
        ("mac.csv", "text,label\rx,y\rz,w\r", [("x", "y"), ("z", "w")]),
        ("a.tsv", "text\tlabel\na,b\tc\n", [("a,b", "c")]),
        ("no_end.csv", "text,label\nx,y", [("x", "y")]),
        ("quoted.csv", 'text,label\n"two\nlines, ""x""",y\n5" disk,z\n', [('two\nlines, "x"', "y"), ('5" disk', "z")]),
        ("blank.csv", "\ntext,label\n\nx,y\n\n", [("x", "y")]),
        ("spaces.csv", ' text , label\nx , "y, z"\n', [("x ", "y, z")]),
        ("kept.csv", "text,label\n x, y\n", [(" x", " y")]),
        ("comma.csv", 'text,"a, b",label\n x,1, y\n', [(" x", " y")]),
        ("trailing.csv", "text,label\nx,y,\nz,w,,\n", [("x", "y"), ("z", "w")]),
        ("header.csv", "text,label,\nx,y,\nz,w\n", [("x", "y"), ("z", "w")]),
        ("bom.csv", "\ufefftext,label\nx,y\n", [("x", "y")]),
        ("excel.csv", "sep=;\ntext;label\nx,1;y\n", [("x,1", "y")]),
    ],
)  # fmt: skip
def test_fields_are_text_as_it_stands(tmp_path: Path, name: str, content: str, expected: list[Any]) -> None:
    assert [(row["text"], row["label"]) for row in rows_of(tmp_path, name, content)] == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    text = {"a.csv": "text\nsmörgås\n", "a.txt": "smörgås\n"}.get(name, '{"text": "smörgås"}\n')
    assert rows_of(tmp_path, name, text.encode(encoding), encoding="latin-1") == [{"text": "smörgås"}]


def test_a_column_without_a_name_is_called_by_its_number(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "a.csv", ",text\n0,x\n") == [{"Unnamed: 0": "0", "text": "x"}]


def test_delimiter_and_encoding_are_chosen(tmp_path: Path) -> None:
    found = rows_of(tmp_path, "a.csv", "text;label\nn\u00f8,1;y\n".encode("latin-1"), delimiter=";", encoding="latin-1")
    assert found == [{"text": "nø,1", "label": "y"}]
    path = str(tmp_path / "a.csv")
    for source in (
        Files(train=path, delimiter=";", encoding="cp1252"),
        Sites(test=path, delimiter=";", encoding="cp1252"),
    ):
        assert source.load().train["text"][:] == ["nø,1"]


@pytest.mark.parametrize(
    ("key", "value"), [("delimiter", ";;"), ("delimiter", '"'), ("encoding", "latin-99"), ("encoding", "hex")]
)
def test_what_is_no_delimiter_or_encoding(key: str, value: str) -> None:
    for make in (lambda **chosen: Files(train="a.csv", **chosen), Reading):
        with pytest.raises(ConfigError, match=f"data.{key} = '{value}'"):
            make(**{key: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nx,y\n\nx,y,z\n", r"line 4 of '.*a.csv' has 3 fields, but the header has 2: put a field"),
        ('text,label\n"a\nb",y\nx\n', "line 4 of .* has 1 field, but the header has 2"),
        ("text;label\nx;y\n", r"header of .* is one field, 'text;label', .*: set data.delimiter = \";\""),
        ("text\tlabel\nx\ty\n", r'set data.delimiter = "\\t"'),
        ("text, text\nx,y\n", "has the name 'text' twice"),
        ('text,label\nx,"y\nz,w\n', "line 2 of .* has a quote that is not closed"),
        ("text,label\nx,y\0\n", "line 2 of .* has a NUL character"),
        ("text,label\n", "has no rows"),
        ("\n\n", "is empty"),
        ("text\n" + "x" * 400 + "\n", "line 2 of .* has more than 300 characters"),
        ('text\n"' + "x\n" * 200 + '"\n', "line 2 of .* has a quote that is not closed"),
    ],
)
def test_csv_that_is_refused_by_its_line(
    tmp_path: Path, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "LONGEST_ROW", 300)
    monkeypatch.setattr(delimited, "LONGEST_ROW", 300)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, "a.csv", content)


def test_text_in_another_encoding_names_the_cure(tmp_path: Path) -> None:
    content = "text,label\n" + "x,y\n" * 5000 + "caf\u00e9,y\n"
    with pytest.raises(DataError, match=r'line 5002 of .* no UTF-8 text \(byte 0xe9\).* data.encoding = "latin-1"'):
        rows_of(tmp_path, "a.csv", content.encode("latin-1"))
    with pytest.raises(DataError, match=r'NUL character.* data.encoding = "utf-16-le"'):
        rows_of(tmp_path, "b.csv", "text,label\nx,y\n".encode("utf-16-le"))
    assert rows_of(tmp_path, "b.csv", "text,label\nx,y\n".encode("utf-16-le"), encoding="utf-16-le")


def test_labels_of_csv_are_whole_numbers_only_where_all_are(tmp_path: Path) -> None:
    def names(labels: list[str], test: str = "") -> list[str]:
        rows = "".join(f"t{row},{label}\n" for row, label in enumerate(labels))
        (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
        (tmp_path / "b.csv").write_text(f"text,label\n{test or rows}")
        return TextClassification().read(Files(train=str(tmp_path / "a.csv"), test=str(tmp_path / "b.csv")))[1]

    assert names([*map(str, range(12))]) == [*map(str, range(12))]
    assert names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert names(["10", "9", "x"], "t,9\n") == ["10", "9", "x"]
    assert names(["01", "1", "2"], "t,1\n") == ["01", "1", "2"]
    with pytest.raises(DataError, match=r"labels that no training row has .such as '3'"):
        names(["01", "1", "2"], "t,3\n")


def test_csv_and_json_have_the_same_classes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{row}", "label": row}) + "\n" for row in range(12))
    )
    (tmp_path / "b.csv").write_text("text,label\nu,11\nv,2\n")
    for train, test in (("a.jsonl", "b.csv"), ("b.csv", "b.csv")):
        splits, names = TextClassification().read(Files(train=str(tmp_path / train), test=str(tmp_path / test)))
        assert [names[label] for label in splits.test["label"]] == ["11", "2"]


def test_numbers_of_csv_are_learnt_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1.5\nb,2\nc,-3e-1\n")
    task = TextClassification(problem="regression")
    train = task.read(Files(train=str(tmp_path / "a.csv"), test=str(tmp_path / "a.csv")))[0].train
    assert train["label"][:] == [1.5, 2.0, -0.3]
    (tmp_path / "a.csv").write_text('text,label\na,1\nb,"2,5"\n')
    with pytest.raises(DataError, match="is not all finite numbers"):
        task.read(Files(train=str(tmp_path / "a.csv")))


def test_numbers_that_name_clients_are_typed_for_csv_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,user,code\na,10,007\nb,9,7\n")
    (tmp_path / "a.jsonl").write_text('{"user": "10"}\n{"user": "9"}\n')
    table, lines = (read_rows(str(tmp_path / name), Reading()) for name in ("a.csv", "a.jsonl"))
    assert typed(rename(table, {"who": "user"}, "training"), "who") == [10, 9]
    assert typed(table, "code") == ["007", "7"]
    assert typed(lines, "user") == ["10", "9"]


# ---- json


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'\n{"a": 1}\r\n\r\n{"b": "x"}', [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
        ("a.NDJSON", b'{"a": 1}\n{"a": 2.5}\n', [{"a": 1.0}, {"a": 2.5}]),
        ("list.jsonl", b'[{"a": 1},\n {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ("lines.json", b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("pretty.json", b'[\n {"a": 1\n }\n]', [{"a": 1}]),
        ("below.json", b'{"version": 1, "data": [{"a": 1}]}', [{"a": 1}]),
        ("rows.json", b'{"rows": [{"a": 1}], "tags": ["x"]}', [{"a": 1}]),
        ("one.json", b'{"tokens": ["x"], "tags": ["O"]}', [{"tokens": ["x"], "tags": ["O"]}]),
        ("chat.json", b'{"m": [{"role": "u", "content": "x"}]}', [{"m": [{"role": "u", "content": "x"}]}]),
        ("below.jsonl", b'{"data": [{"a": 1}]}\n', [{"data": [{"a": 1}]}]),
        ("nan.jsonl", b'{"a": NaN}\n{"a": "x"}\n', [{"a": None}, {"a": "x"}]),
        ("date.jsonl", b'{"a": "2024-01-01"}\n', [{"a": "2024-01-01"}]),
        ("numbers.jsonl", b'{"a": "007"}\n', [{"a": "007"}]),
        ("nested.jsonl", b'{"a": {"b": 1}}\n{"a": {"c": 2}}', [{"a": {"b": 1, "c": None}}, {"a": {"b": None, "c": 2}}]),
        ("mixed.jsonl", b'{"a": [{"b": 1}]}\n{"a": [{"b": "x"}]}\n', [{"a": '[{"b": 1}]'}, {"a": '[{"b": "x"}]'}]),
    ],
)  # fmt: skip
def test_json_in_every_form(
    tmp_path: Path, name: str, content: bytes, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows_of(tmp_path, name, content) == expected
    monkeypatch.setattr(tables, "_ROWS", 1)  # in blocks of a row, whose types are then made one
    assert rows_of(tmp_path, name, content) == expected
    assert rows_of(tmp_path, f"{name}.gz", gz(content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', "column 'a' of .* holds a number in row 0 and text in row 1"),
        ("a.jsonl", b'{"a": true}\n\n{"a": 1}\n', "holds true or false in row 0 and a number in row 1"),
        ("a.jsonl", b'{"a": "x"}\n{"a": ["x"]}\n', "holds text in row 0 and a list in row 1"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: Expecting value at character"),
        ("a.jsonl", b'{"a": 1}\n["x"]\n', "line 2 of .* is a list, but a row is an object"),
        ("a.jsonl", b'{"a": 1}\nnull\n', "line 2 of .* is empty, but a row is an object"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', "key 'a' stands twice"),
        ("a.jsonl", b'{"a": 99999999999999999999}\n', "number beyond 64 bits"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: Exceeds the limit"),
        ("a.jsonl", b'{"a": "\\ud800"}\n', "half of a surrogate pair"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', r"rows under several keys \(train, test\)"),
        ("a.json", b'"text"', "holds 'text', but rows were expected"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'[{"a": 1},\n]', "line 2: Expecting value"),
        ("a.json", b'[{"a": 1}, "x"]', "row 1 of .* is text, but a row is an object"),
        ("a.json", b'{"data": [{"paragraphs": [{"qas": [{"question": "q"}]}]}]}', "not in SQuAD's form"),
        ("a.jsonl", b'{"a": ' + b"[" * 50_000, "line 1 of .* more than 64 lists or objects inside each other"),
        ("a.json", b"[" * 50_000 + b"]" * 50_000, "the content of .* more than 64 lists or objects inside"),
        ("a.json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "more than 64 lists or objects inside"),
        ("a.jsonl", b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}\n", "line 1 of .* more than 64 lists or objects"),
    ],
)  # fmt: skip
def test_json_that_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, name, content)


def test_official_squad_is_read_as_questions(tmp_path: Path) -> None:
    answer = [{"text": "Ida", "answer_start": 0}]
    content = json.dumps(squad([answer, []])).encode()
    found = rows_of(tmp_path, "squad.json", content)
    assert found[0] == {
        "id": "0", "title": "t", "context": "Ida in Bern", "question": "who?",
        "answers": {"text": ["Ida"], "answer_start": [0]},
    }  # fmt: skip
    assert found[1]["answers"] == {"text": [], "answer_start": []}
    path = str(tmp_path / "squad.json")
    assert len(QuestionAnswering(no_answer=True).read(Files(train=path, test=path))[0].train) == 2
    with pytest.raises(DataError, match="1 of 2 training rows have no answer"):
        QuestionAnswering().read(Files(train=path, test=path))


# ---- text and conll


def test_a_text_file_has_a_text_on_each_line(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "a.txt", "one\r\n\n  two\u2028 \x0b\n \n{}") == [
        {"text": "one"}, {"text": "  two\u2028 \x0b"}, {"text": "{}"},
    ]  # fmt: skip


def test_conll_is_read_as_sentences(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- -X- O\n\n# id 7\nIda NNP\tI-NP B-PER\nsleeps VB I-VP O\n\n\n# NN I-NP O\n"
    assert rows_of(tmp_path, "a.conll", text) == [
        {"tokens": ["Ida", "sleeps"], "column_2": ["NNP", "VB"], "column_3": ["I-NP", "I-VP"], "tags": ["B-PER", "O"]},
        {"tokens": ["#"], "column_2": ["NN"], "column_3": ["I-NP"], "tags": ["O"]},
    ]
    path = str(tmp_path / "a.conll")
    assert TokenClassification().read(Files(train=path, test=path))[1] == ["O", "B-PER"]
    with pytest.raises(DataError, match=r"line 3 of .* has 3 columns, but .* all lines have 2 columns"):
        rows_of(tmp_path, "b.conll", "a O\n\nb c O\n")
    with pytest.raises(DataError, match=r"line 1 of .* has 1 columns"):
        rows_of(tmp_path, "c.conll", "a\nb\n")


def test_a_new_document_of_conll_ends_a_sentence(tmp_path: Path) -> None:
    found = rows_of(tmp_path, "a.conll", "Ida B-PER\n-DOCSTART- O\nBo B-PER\n")
    assert [row["tokens"] for row in found] == [["Ida"], ["Bo"]]


# ---- several files and folders


def test_several_files_and_patterns_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"part-{number:02}.jsonl").write_text(json.dumps({"text": str(number), "label": number}) + "\n")
    (tmp_path / "more.json").write_text('[{"label": 0.5, "text": "more"}]')
    assert Files(train=str(tmp_path / "part-*.jsonl")).load().train["text"][:] == ["1", "2", "10"]
    both = Files(train=(str(tmp_path / "more.json"), str(tmp_path / "part-0?.jsonl"))).load().train
    assert both.to_dict() == {"label": [0.5, 1.0, 2.0], "text": ["more", "1", "2"]}
    with pytest.raises(DataError, match=r"'.*part-02.jsonl' is named twice, .*: name it once"):
        Files(
            train=(str(tmp_path / "part-*.jsonl"), str(tmp_path / "more.json"), str(tmp_path / "part-02.jsonl"))
        ).load()
    with pytest.raises(DataError, match=r"no file is called '.*none-\*.csv'"):
        Files(train=str(tmp_path / "none-*.csv")).load()
    (tmp_path / "other.json").write_text('[{"text": "x"}]')
    with pytest.raises(DataError, match="has the column 'label' and the other not"):
        Files(train=(str(tmp_path / "more.json"), str(tmp_path / "other.json"))).load()
    (tmp_path / "words.csv").write_text("text,label\nx,y\n")
    with pytest.raises(DataError, match="do not make one table"):
        Files(train=(str(tmp_path / "more.json"), str(tmp_path / "words.csv"))).load()
    with pytest.raises(DataError, match=r"is a folder, but not one that save_to_disk wrote: name its files"):
        Files(train=str(tmp_path)).load()
    (tmp_path / "odd[1].jsonl").write_bytes(ROW)
    assert len(Files(train=str(tmp_path / "odd[1].jsonl")).load().train) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Files(train="~/part-*.jsonl").load().train) == 3


def test_a_path_that_backslashes_broke_is_explained() -> None:
    with pytest.raises(DataError, match=r"there is no file 'C:\\new\\table.csv', whose name .* in single quotes"):
        Files(train="C:\new\table.csv").load()


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    names = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["z", "y"]))
    train, test = (datasets.Dataset.from_dict({"text": [text], "label": [1]}, features=names) for text in ("a", "b"))
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "both"))
    assert Files(train=str(tmp_path / "one")).load().test is None
    raw = Files(train=str(tmp_path / "both")).load()
    assert raw.test is not None
    assert (raw.train["text"][:], raw.test["text"][:]) == (["a"], ["b"])
    assert raw.train.features["label"].names == ["z", "y"]
    assert read_rows([str(tmp_path / "one"), str(tmp_path / "both")], Reading())["text"][:] == ["a", "a"]
    with pytest.raises(DataError, match="has the splits test, train, but none called 'dev': name the folder of one"):
        read_rows(str(tmp_path / "both"), Reading(), "dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a folder of save_to_disk"):
        Files(train=str(tmp_path / "one")).load()


def test_arrow_files_in_both_forms(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    both = read_rows([str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow")], Reading())
    assert both["text"][:] == ["a", "b", "a", "b"]
    with pytest.raises(DataError, match="cannot be read as arrow"):
        rows_of(tmp_path, "c.arrow", b"ARROW1 no")


# ---- packed, damaged, too large


def test_every_format_is_read_packed_and_in_capitals(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": "a"}])
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    content = {".csv": b"text\na\n", ".tsv": b"text\na\n", ".txt": b"a\n", ".json": b'[{"text": "a"}]'}
    content |= {".parquet": (tmp_path / "a.parquet").read_bytes(), ".conll": b"a O\n"}
    content |= {".arrow": next((tmp_path / "saved").glob("*.arrow")).read_bytes()}
    for ending in FORMATS:
        raw = content.get(ending, b'{"text": "a"}\n')
        expected = rows_of(tmp_path, f"plain{ending}", raw)
        assert expected[0].get("text", "a") == "a"
        assert rows_of(tmp_path, f"packed{ending.upper()}.GZ", gz(raw)) == expected


def zipped(name: str, content: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(name, content)
    return target.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", gz(b"text\na\n"), "is packed by gzip: end its name in .gz"),
        ("a.csv", zipped("a.csv", b"text\na\n"), "is a zip archive or an Excel file"),
        ("a.csv.zip", zipped("a.csv", b"text\na\n"), "ends in '.zip', but files are read by their ending"),
        ("a.jsonl", bz2.compress(ROW), "is packed by bzip2"),
        ("a.csv", b"PAR1....", "is a parquet file"),
        ("a.jsonl.gz", gz(ROW * 50)[:-12], "cannot be unpacked .Compressed file ended"),
        ("a.jsonl.gz", gz(ROW * 50)[:-8] + b"\0" * 8, "cannot be unpacked .CRC check failed"),
        ("a.csv.gz", gz(gz(ROW)), "is packed by gzip"),
        ("a.parquet.gz", gz(ROW)[:-9], "cannot be unpacked"),
        ("a.jsonl.gz", gz(b""), "is empty"),
    ],
)
def test_packed_files_that_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, name, content)


def test_every_flipped_bit_of_a_packed_file_is_a_sentence(tmp_path: Path) -> None:
    packed = gz(b"".join(b'{"text": "t%d"}\n' % row for row in range(30)))
    for place in range(len(packed)):
        flipped = bytearray(packed)
        flipped[place] ^= 1 << place % 8
        try:  # a flip in the header's date or system changes nothing
            assert len(rows_of(tmp_path, "a.jsonl.gz", bytes(flipped))) == 30
        except DataError:
            continue


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl.gz", "a.csv.gz", "a.txt.gz", "a.parquet.gz"):
        with pytest.raises(DataError, match=r"unpacks to more than 0.0001 GB.*set data.max_unpacked_gb"):
            rows_of(tmp_path, name, gz(b"\n" * 200_000), max_unpacked_gb=0.0001)
    assert not list((tmp_path / "cache").rglob("*.parquet*"))
    assert len(rows_of(tmp_path, "b.jsonl.gz", gz(ROW * 3_000), max_unpacked_gb=0.0001)) == 3_000
    for module in (opening, tables):
        monkeypatch.setattr(module, "LONGEST_ROW", 1000)
    one = json.dumps({"text": "x" * 2000}).encode()
    with pytest.raises(DataError, match=r"line 1 of .* has more than 1,000 characters"):
        rows_of(tmp_path, "c.jsonl.gz", gz(one))
    with pytest.raises(DataError, match=r"row 0 of .* has more than 1,000 characters"):
        rows_of(tmp_path, "c.json.gz", gz(b"[" + one + b"]"))


@pytest.mark.parametrize("kind", ["compressed", "dictionary", "ipc file", "ipc stream"])
def test_a_small_file_of_arrow_that_unpacks_to_too_much_is_refused(tmp_path: Path, kind: str) -> None:
    count, values = (300_000, ["x" * 20, "y"]) if kind == "dictionary" else (3, ["x" * 3_000_000])
    table = pyarrow.table({"text": [values[row % len(values)] for row in range(count)]})
    file = tmp_path / ("a.arrow" if "ipc" in kind else "a.parquet")
    if "ipc" in kind:
        new = pyarrow.ipc.new_file if kind == "ipc file" else pyarrow.ipc.new_stream
        with new(str(file), table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, file, use_dictionary=kind == "dictionary", compression="zstd")
    assert table.nbytes > 3_000_000 > 20 * file.stat().st_size
    with pytest.raises(DataError, match=r"unpacks to more than 0.001 GB.*set data.max_unpacked_gb"):
        read_rows(str(file), Reading(max_unpacked_gb=0.001))
    assert len(read_rows(str(file), Reading(max_unpacked_gb=0.02))) == count


@pytest.mark.parametrize("packed", ["zstd", "lz4"])
@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("words", [False, True], ids=["text", "dictionary"])
def test_a_batch_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, packed: str, form: str, words: bool) -> None:
    values = pyarrow.array(["x" * 64_000_000, "y"])
    table = pyarrow.table({"n": [1, 2], "text": values.dictionary_encode() if words else values})
    file = tmp_path / "a.arrow"
    new = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
    with new(str(file), table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=packed)) as writer:
        writer.write_table(table)
    assert file.stat().st_size < 1_000_000
    pool, before = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(before)
    try:
        with pytest.raises(DataError, match=r"unpacks to more than 0.01 GB.*set data.max_unpacked_gb"):
            read_rows(str(file), Reading(max_unpacked_gb=0.01))
    finally:
        pyarrow.set_memory_pool(pool)
    assert before.max_memory() < 32_000_000


@pytest.mark.parametrize(
    "content",
    [
        {"text": ["a", "b"], "label": ["x", "y"]},
        {"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}},
        {str(row): {"text": "a", "label": "x"} for row in range(300)},
        {"columns": ["text", "label"], "index": [0, 1], "data": [["a", "x"], ["b", "y"]]},
    ],
)
def test_json_by_columns_names_the_cure(tmp_path: Path, content: dict[str, Any]) -> None:
    rows = datasets.Dataset.from_list(rows_of(tmp_path, "a.json", json.dumps(content)))
    check = check_texts if "text" in rows.column_names else check_rows
    with pytest.raises(DataError, match=r"write a list of rows, as pandas does with orient='records'") as found:
        check(rows, ["text"], "training")
    assert len(str(found.value)) < 400


def test_columns_nested_too_deeply_are_a_sentence(tmp_path: Path) -> None:
    kind, value = pyarrow.string(), "a"
    for _ in range(100):
        kind, value = pyarrow.list_(kind), [value]
    table = pyarrow.table({"text": pyarrow.array([value], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"cannot be read as parquet .*too deeply nested"):
        read_rows(str(tmp_path / "a.parquet"), Reading())


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_text_with_damaged_bytes_is_a_sentence(tmp_path: Path, name: str) -> None:
    table = pyarrow.table({"text": ["a text of some length"] * 3})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name, use_dictionary=False, compression="none")
    else:
        with pyarrow.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write(table)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw.replace(b"some", b"s\xffme"))
    with pytest.raises(DataError, match=r"cannot be read as (parquet|arrow) .*UTF8"):
        read_rows(str(tmp_path / name), Reading())


def test_the_library_prints_no_line_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = datasets.logging.get_verbosity()
    with pytest.raises(DataError):
        rows_of(tmp_path, "a.parquet", b"PAR1 and no more PAR1")
    assert capfd.readouterr() == ("", "")
    assert datasets.logging.get_verbosity() == level


def test_the_home_folder_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(ROW)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Hub(path="~/set", test_split="").load().train) == 1

"""Sources on small files of every format, the standard library's docstrings, and what they refuse."""

from __future__ import annotations

import gzip
import json
import os
import socket
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import TypeAdapter

from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import TextClassification
from fedlora.tasks.data.columns import Raw, Splits, fingerprint, split, typed
from fedlora.tasks.data.sources import SOURCES, AnySource, Docstrings, Files, Hub, Source

TEXTS = ["none of it", "two, three", 'say "hi"', "a\tb", "five", "sechs äöü"]
ROWS = [{"text": text, "label": label, "user": index // 2} for index, (text, label) in enumerate(zip(TEXTS, "baabba"))]  # noqa: B905


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format that the file's ending names."""
    name = path.name.removesuffix(".gz")
    plain = path.with_name(name)
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(plain))
    elif name.endswith(".json"):
        plain.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith(".jsonl"):
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_csv(str(plain), sep="\t" if name.endswith(".tsv") else ",")
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return str(path)


def read(source: Source) -> Splits:
    """The rows as text classification wants them: checked, labels as classes, held out."""
    return TextClassification().read(source)[0]


def load(
    tmp_path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None, **columns: str
) -> Splits:
    test_path = write(tmp_path / "test.jsonl", train if test is None else test)
    return read(Files(train=write(tmp_path / "train.jsonl", train), test=test_path, columns=columns))


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_reads_the_same(tmp_path: Path, ending: str, zipped: str) -> None:
    path = write(tmp_path / f"rows.{ending}{zipped}", ROWS)
    raw = Files(train=path, test=path).load()
    assert raw.test is not None
    assert raw.train.column_names == raw.test.column_names == ["text", "label", "user"]
    assert raw.train["label"][:] == list("baabba")
    train, test = read(Files(train=path, test=path))
    assert set(train.column_names) == {"text", "label", "user"}
    assert train["text"][:] == TEXTS
    assert train["label"][:] == [1, 0, 0, 1, 1, 0]
    assert typed(train, "user") == [0, 0, 1, 1, 2, 2]
    assert train.features["label"] == test.features["label"] == datasets.ClassLabel(names=["a", "b"])
    is_text = ending in ("csv", "tsv")
    assert train["user"][:] == ([*"001122"] if is_text else [0, 0, 1, 1, 2, 2])
    rows = [{**row, "user": str(row["user"])} for row in ROWS] if is_text else ROWS
    expected = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    assert fingerprint(train) == fingerprint(test) == fingerprint(expected)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "jsonl.gz"])
def test_a_changed_file_is_read_again(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows.{ending}", ROWS)
    before = Files(train=path, test=path).load().train
    os.utime(path, (1, 1))
    write(tmp_path / f"rows.{ending}", [{**row, "text": "new"} for row in ROWS])
    after = Files(train=path, test=path).load().train
    assert before["text"][0] == "none of it"
    assert after["text"][:] == ["new"] * 6


def test_local_files_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("reading a local file called the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for ending in ("csv", "jsonl", "parquet"):
        Files(train=write(tmp_path / f"rows.{ending}", ROWS), test_fraction=0.5).load()


def test_progress_bars_are_left_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = not datasets.are_progress_bars_disabled()
    load(tmp_path, ROWS)
    assert datasets.are_progress_bars_disabled() is not shown
    assert capsys.readouterr() == ("", "")


def test_words_that_look_missing_are_texts_in_csv(tmp_path: Path) -> None:
    rows = [{"text": "None", "label": "NA"}, {"text": "null", "label": "nan"}]
    path = write(tmp_path / "rows.csv", rows)
    train = read(Files(train=path, test=path)).train
    assert train["text"][:] == ["None", "null"]
    assert train.features["label"].names == ["NA", "nan"]


def test_columns_are_renamed_and_pairs_kept(tmp_path: Path) -> None:
    rows = [{"id": 1, "y": "no", "a": "x", "b": "y"}, {"id": 2, "y": "yes", "a": "z", "b": "w"}]
    train = load(tmp_path, rows, text="a", text_pair="b", label="y").train
    assert sorted(train.column_names) == ["id", "label", "text", "text_pair"]
    assert train[1] == {"text": "z", "text_pair": "w", "label": 1, "id": 2}


def test_integer_labels_and_their_names(tmp_path: Path) -> None:
    rows = [{"text": f"t{y}{i}", "label": y, "name": name} for i in (0, 1) for y, name in ((7, "seven"), (-1, "minus"))]
    plain = load(tmp_path, rows).train
    assert plain.features["label"].names == ["-1", "7"]
    assert plain["label"][:] == [1, 0, 1, 0]
    named = load(tmp_path, rows, label_name="name").train
    assert named.features["label"].names == ["minus", "seven"]
    assert named["label_name"][:] == ["seven", "minus", "seven", "minus"]
    with pytest.raises(DataError, match=r"\(2 classes, 2 names, 3 pairs\)"):
        load(tmp_path, [*rows, {"text": "x", "label": 7, "name": "minus"}], label_name="name")


def test_integers_past_nine_sort_as_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"t{y}", "label": y} for y in range(12)]
    assert load(tmp_path, rows).train.features["label"].names == [str(y) for y in range(12)]


def test_declared_classes_are_kept(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["z", "y", "x"]))
    paths = []
    for labels in ([0, 2], [0, 1], [0, -1]):
        rows = datasets.Dataset.from_dict({"text": ["p", "q"], "label": labels}, features=features)
        paths.append(str(tmp_path / f"{len(paths)}.parquet"))
        rows.to_parquet(paths[-1])
    train, test = read(Files(train=paths[0], test=paths[1]))
    assert train.features["label"].names == ["z", "y", "x"]
    assert test["label"][:] == [0, 1]
    with pytest.raises(DataError, match="1 of 2 test rows carry the label -1"):
        read(Files(train=paths[0], test=paths[2]))


def test_without_a_test_file_equal_texts_fall_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 100}", "label": i % 2} for i in range(400)]
    path = write(tmp_path / "rows.csv", rows)
    train, test = read(Files(train=path, test_fraction=0.25))
    assert len(train) + len(test) == 400
    assert not set(train["text"][:]) & set(test["text"][:])
    assert 40 <= len(test) <= 160
    backwards = read(Files(train=write(tmp_path / "back.csv", rows[::-1]), test_fraction=0.25)).test
    assert set(backwards["text"][:]) == set(test["text"][:])
    assert set(read(Files(train=path, test_fraction=0.25, seed=1)).test["text"][:]) != set(test["text"][:])
    with pytest.raises(DataError, match=r"holding out 0\.0001 of 2 rows"):
        read(Files(train=write(tmp_path / "two.csv", rows[:2]), test_fraction=0.0001))


@pytest.mark.parametrize(
    ("train", "test", "more", "text"),
    [
        (ROWS, None, {"text": "txt"}, "no column 'txt', only text, label, user: did you mean 'text'"),
        (ROWS, [{"text": "x", "label": "c", "user": 0}], {}, "1 labels that no training row has .such as 'c'"),
        (ROWS, [{"text": "x"}], {}, "the test rows have no column 'label'"),
        ([*ROWS, {"text": None, "label": "a", "user": 0}], ROWS, {}, r"'text' has no value in 1 of 7 .*row 6"),
        ([*ROWS, {"text": "x", "label": None, "user": 0}], ROWS, {}, "'label' has no value in 1 of 7"),
        (ROWS, None, {"text": "user"}, "'user' is to become 'text', but the training rows have another"),
        (ROWS, None, {"label": "text"}, "'text' is to become 'label', but the training rows have another"),
        ([{"user": 1, "label": "a"}], None, {"text": "user"}, "column 'text' of the training rows holds int64"),
        ([{"a": "x", "label": "a"}], None, {}, "no column 'text', only a, label: data.columns = { text = "),
        ([{"text": "x"}], None, {"label": "text"}, "no column 'text', only label"),
        (ROWS, None, {"label": "user", "text": "label"}, "'label' is to become 'text', but the training rows have"),
        (ROWS, None, {"text_pair": "user"}, "column 'text_pair' of the training rows holds int64"),
        (ROWS, [{"text": "x", "label": "a", "text_pair": "y"}], {}, "the training rows have no column 'text_pair'"),
        ([{"text": "x", "label": "a", "text_pair": "y"}], ROWS, {}, "the test rows have no column 'text_pair'"),
        ([{"text": "x", "label": 0.5}], None, {}, "holds float, but labels are"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, train: Any, test: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        load(tmp_path, train, test, **more)


def test_one_column_for_two_uses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names one column twice"):
        load(tmp_path, ROWS, label="user", text_pair="user")


def test_names_may_be_swapped(tmp_path: Path) -> None:
    rows = [{"text": row["label"], "label": row["text"]} for row in ROWS]
    train = load(tmp_path, rows, text="label", label="text").train
    assert train["text"][:] == TEXTS
    assert train["label"][:] == [1, 0, 0, 1, 1, 0]


def test_rows_are_held_out_by_any_content(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"words": [[f"w{i % 50}", "x"] for i in range(200)], "row": list(range(200))})
    train, test = split(Raw(rows, None, 0.3, 0), "words")
    sides = [{words[0] for words in part["words"]} for part in (train, test)]
    assert not sides[0] & sides[1]
    assert len(train) + len(test) == 200
    assert 5 <= len(sides[1]) <= 25
    assert train["row"][:] == sorted(train["row"][:])
    assert split(Raw(train, test, 0.3, 0), "words") == (train, test)


def test_nan_labels_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,1\nb,\nc,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'label' has no value in 1 of 3 training rows \(first: row 1\)"):
        read(Files(train=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("rows.csv", b"", "is empty"),
        ("rows.csv.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.jsonl", b'{"text": \n', "cannot be read as json"),
        ("rows.jsonl.gz", b"not gzip", "cannot be unpacked .Not a gzipped file"),
        ("rows.parquet", b"PAR?", "cannot be read as parquet"),
        ("rows.xlsx", b"x", "ends in '.xlsx'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=text):
        Files(train=str(tmp_path / name)).load()


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match=r"there is no file .*trian.csv.*did you mean 'train.csv'"):
        Files(train=str(tmp_path / "trian.csv")).load()


def test_hub_reads_a_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.csv", ROWS)
    write(folder / "test.csv", ROWS[:3])
    train, test = read(Hub(path=str(folder)))
    assert (len(train), len(test)) == (6, 3)
    assert train.features["label"].names == ["a", "b"]
    one = read(Hub(path=str(folder), test_split="", test_fraction=0.5))
    assert len(one.train) + len(one.test) == 6
    assert not set(one.train["text"][:]) & set(one.test["text"][:])
    renamed = Hub(path=str(folder), columns={"body": "text"}).load()
    assert renamed.test is not None
    assert renamed.train["body"][:] == TEXTS
    assert renamed.test.column_names == ["body", "label", "user"]
    with pytest.raises(DataError, match=r"split 'validation' of .* cannot be loaded"):
        Hub(path=str(folder), test_split="validation").load()


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="'owner/name' is neither a folder nor in the local cache"):
        Hub(path="owner/name").load()


@pytest.fixture(scope="module")
def docstrings() -> Splits:
    return read(Docstrings())


@pytest.mark.slow
def test_docstrings_are_many_distinct_and_split(docstrings: Splits) -> None:
    train, test = docstrings
    texts = [*train["text"][:], *test["text"][:]]
    assert 2500 < len(texts) < 12_000
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= 20
    assert 0.15 < len(test) / len(texts) < 0.25
    names = train.features["label"].names
    assert names == sorted(names) == test.features["label"].names
    assert len(names) == 20
    assert set(train["label"][:]) == set(test["label"][:]) == set(range(20))
    for row in test.select(range(20)):
        assert row["file"].split("/")[0].removesuffix(".py") == names[row["label"]]
    assert not any("/test/" in file or file.startswith(("test/", "site-packages")) for file in train["file"][:])


@pytest.mark.slow
def test_docstrings_repeat(docstrings: Splits) -> None:
    again = read(Docstrings())
    assert fingerprint(again.train) == fingerprint(docstrings.train)
    assert fingerprint(again.test) == fingerprint(docstrings.test)


def test_docstrings_of_a_small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "one.py": '"""The first module, long enough."""\ndef f():\n    """\n    Indented text,\n      kept.\n    """\n',
        "two/__init__.py": '"""The first module, long enough."""\nclass C:\n    """A class within a package."""\n',
        "two/more.py": 'async def g():\n    """Some coroutine, described."""\n    """No docstring, only a string."""\n',
        "two/test/x.py": '"""A test, which is left out."""',
        "site-packages/x.py": '"""Not of the library, left out."""',
        "three.py": '"""Too short."""\n',
        "bad.py": '"""Not Python at all, left out."""\ndef (:\n',
        "escape.py": 'x = "\\d"\n"""Warns when compiled, no docstring."""\n',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    source = Docstrings(num_classes=2, test_fraction=0.5, seed=1)
    assert source.load()[1:] == (None, 0.5, 1, None, None, None)
    train, test = read(source)
    assert fingerprint(read(source).train) == fingerprint(train)
    assert sorted((row["text"], row["label"], row["file"]) for part in (train, test) for row in part) == [
        ("A class within a package.", 1, "two/__init__.py"),
        ("Indented text,\n  kept.", 0, "one.py"),
        ("Some coroutine, described.", 1, "two/more.py"),
        ("The first module, long enough.", 0, "one.py"),
    ]
    assert train.features["label"].names == ["one", "two"]
    with pytest.raises(DataError, match="docstrings in 2 packages, but num_classes = 3"):
        Docstrings(num_classes=3).load()


def test_fingerprint_sees_content_order_and_names_alone() -> None:
    base = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    same = datasets.concatenate_datasets([base.select([0]), base.select([1])]).select_columns(["label", "text"])
    assert fingerprint(base) == fingerprint(same)
    assert fingerprint(base, ["text"]) == fingerprint(base.remove_columns("label"))
    others = [
        base.select([1, 0]),
        base.select([0]),
        base.rename_column("text", "words"),
        base.cast_column("label", datasets.ClassLabel(names=["x", "y"])),
        base.cast_column("label", datasets.ClassLabel(names=["x", "z"])),
        datasets.Dataset.from_dict({"text": ["a;b", ""], "label": [0, 1]}),
    ]
    assert len({fingerprint(dataset) for dataset in [base, *others]}) == 7
    # a literal, so that a change of the hash between machines or versions is seen
    assert fingerprint(base) == "83eb05cd87114f15db5087d92a3ae186"


def test_the_table_and_the_union_agree() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnySource)
    needed = {
        "docstrings": {},
        "docstring_questions": {},
        "files": {"train": "a.csv"},
        "hub": {"path": "owner/name"},
        "image_folder": {"path": "pictures"},
        "rows": {"train": "rows:0f"},
        "sites": {"test": "test.jsonl"},
        "validation": {"source": {"kind": "docstrings"}},
    }
    for kind, cls in SOURCES.items():
        assert type(adapter.validate_python({"kind": kind, **needed[kind]})) is cls

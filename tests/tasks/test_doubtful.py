"""Data that can be read and most likely are not what their owner thinks: each is refused or said."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fixtures.tiny import experiment, make_rows, tiny_world, write_rows
from fixtures.tiny_language import save_chat_model

from fedlora.config.federated_data import prepare
from fedlora.core.errors import DataError
from fedlora.tasks import Files, ImageFolder, Instruction, Model, TextClassification, Validation
from fedlora.tasks.data.columns import split_by_content
from fedlora.tasks.data.files import read_rows
from fedlora.tasks.data.notes import doubtful, near_equal, rare
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.data.tables import of_objects
from fedlora.tasks.images.pixels import read_picture

world = pytest.fixture(scope="module")(tiny_world)


def notes_of(world: Path, folder: Path, rows: list[dict[str, Any]], **task: Any) -> str:
    file = str(write_rows(folder / "rows.jsonl", rows))
    prepared = TextClassification(**task).prepare(Model(path=str(world / "bert")), Files(train=file, test=file))
    return " | ".join(prepared.notes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["blue", "blue\u200b"], "differ only in spelling"),
        (["blue", "\ufeffblue"], "differ only in spelling"),
        (["blue", "nan"], "class 'nan' looks like a missing value"),
        (["NA", "None", "x"], "classes 'NA' and 'None' look like a missing value"),
        (["1.5", "2.0"], "numbers with fractions"),
        (["1", "2"], None),
        (["v1.5", "v2.0"], None),
        (["none", "na\u00efve"], None),
    ],
)
def test_names_of_classes_that_are_doubtful(names: list[str], said: str | None) -> None:
    found = " | ".join([*near_equal(names), *doubtful(names)])
    assert (said in found) if said else not found


def test_classes_that_training_rows_have_seldom_or_never(world: Path, tmp_path: Path) -> None:
    assert rare([0, 0, 1, 1], ["a", "b"]) == []
    assert "has the classes 'b', 'c', which cannot" in rare([0, 0], ["a", "b", "c"])[0]
    unique = [{"text": f"w{row}", "label": f"c{row}"} for row in range(6)]
    assert "6 of 6 classes have one training row at most" in notes_of(world, tmp_path, unique)
    several = [{"text": f"w{row}", "label": ["a", f"c{row}"]} for row in range(6)]
    assert "6 of 7 classes have one training row at most" in notes_of(world, tmp_path, several, problem="multi")
    same = [{"text": f"w{row}", "label": 3.0} for row in range(6)]
    assert "all training rows have the label 3.0" in notes_of(world, tmp_path, same, problem="regression")


@pytest.mark.parametrize(
    ("label", "said"), [("1e30", r"1e\+30"), ("0,5", "'0,5'"), ("1,000", "'1,000'"), ("inf", "inf"), ("nan", "nan")]
)
def test_a_number_that_cannot_be_learnt_is_shown(tmp_path: Path, label: str, said: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"text;label\na;1.0\nb;{label}\n")
    with pytest.raises(DataError, match=rf"needs \(up to 1e\+18\), but has {said}: correct"):
        TextClassification(problem="regression").read(Files(train=str(file), test=str(file), delimiter=";"))


def test_rows_of_one_content_cannot_be_divided_and_the_reason_is_said() -> None:
    rows = of_objects(((f"row {row}", {"text": "the same"}) for row in range(20)), "rows")
    with pytest.raises(DataError, match=r"0.2 of 20 rows of 1 different contents, which each stay on one side"):
        split_by_content(rows, "text", 0.2, 0)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"<!DOCTYPE html><p>not, found", "is a web page"),
        ("a.csv.gz", gzip.compress(gzip.compress(b"text\na\n", mtime=0), mtime=0), "packed by gzip twice"),
        ("a.csv", LFS, "is a git-LFS pointer"),
        ("a.jsonl", LFS, "is a git-LFS pointer"),
        ("a.parquet", LFS, "is a git-LFS pointer"),
        ("a.arrow", LFS, "is a git-LFS pointer"),
        ("a.csv", b'text,label\n"a \\"b\\" c",x\n', r"line 2 of .* has text after the quote that closes a field"),
        ("a.csv", b'text,label\n"a" b,x\n', r"line 2 of .* has text after the quote that closes a field"),
    ],
    ids=["web page", "twice", "lfs csv", "lfs jsonl", "lfs parquet", "lfs arrow", "backslash", "after quote"],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(str(tmp_path / name), Reading())


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no rows, but one row at least is needed"):
        read_rows(str(tmp_path / "a.parquet"), Reading())


def test_links_to_nothing_and_pipes_are_named(tmp_path: Path) -> None:
    (tmp_path / "dead.csv").symlink_to("nowhere.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    for name, said in (("dead.csv", "is a link to a file that is not there"), ("pipe.csv", "is no plain file")):
        with pytest.raises(DataError, match=said):
            read_rows(str(tmp_path / name), Reading())


def test_equal_rows_of_different_classes_are_said(world: Path, tmp_path: Path) -> None:
    rows = [{"text": "w1 red", "label": "red"}, *make_rows(30, 0), {"text": "w1 red", "label": "blue"}]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    chosen = experiment(world, "lora", f"data.train='{file}'")
    assert "2 of 32 training rows have the content of another row but not" in " ".join(prepare(chosen).notes)


def test_text_of_polars_is_text(world: Path, tmp_path: Path) -> None:
    text, label = (pyarrow.array(values, pyarrow.string_view()) for values in (["a", "b"], ["x", "y"]))
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "label": label}), tmp_path / "a.parquet")
    file = str(tmp_path / "a.parquet")
    _, names = TextClassification().read(Files(train=file, test=file))
    assert names == ["x", "y"]


def test_what_a_chat_template_leaves_out_of_turns_is_said(tmp_path: Path) -> None:
    model = Model(path=str(save_chat_model(tmp_path / "chat")))
    answer = {"role": "assistant", "content": "a b", "reasoning_content": "because", "name": "ida"}
    turns = [[{"role": "user", "content": f"a <unk> {row}"}, answer] for row in range(3)]
    file = str(write_rows(tmp_path / "talks.jsonl", [{"messages": one} for one in turns]))
    prepared = Instruction(template="chat", max_length=32).prepare(model, Files(train=file, test=file))
    notes = " | ".join(prepared.notes)
    assert "turns have 'name', 'reasoning_content', which the chat template leaves out" in notes
    assert "6 of 6 rows have special tokens of the tokenizer in the text of a turn" in notes


def test_what_a_folder_of_images_holds_beside_them_is_said(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "train/b/x.heic", "train/b/.DS_Store", "train/2.png", "val/a/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "train" / "c").mkdir()
    train = tmp_path / "train"
    expected = (
        "images in 'val' beside 'train' are not read",
        f"1 images beside the folders of classes in '{train}' are not read",
        f"no images are in 'c' of '{train}', which are no classes",
        f"1 files in '{train}' are no images of a known kind: .heic",
    )
    folder = ImageFolder(path=str(tmp_path))
    assert folder.notes == Validation(source=folder).notes == expected
    assert ImageFolder(path=str(tmp_path / "val")).notes == Files(train="a.csv").notes == ()


def test_a_pipe_among_images_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="row 3 is no plain file"):
        read_picture(str(tmp_path / "pipe.png"), "row 3")

"""Files and folders that replace others whole, whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedlora.core.digests import damaged, sealed, unsealed
from fedlora.core.files import append, clean, new_file, new_folder, write_atomically

ORPHAN = "0123456789abcdef"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``os.fsync`` was called for, by the name it had then."""
    found: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    return found


def full(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_reader_finds_the_old_content_or_the_new_one(tmp_path: Path) -> None:
    file, whole = tmp_path / "file", [bytes([value]) * 200_000 for value in b"ab"]
    write_atomically(file, whole[0])
    ended = threading.Event()

    def write() -> None:
        for turn in range(40):
            write_atomically(file, whole[turn % 2])
        ended.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not ended.is_set():
        assert file.read_bytes() in whole
    for writer in writers:
        writer.join()
    assert names(tmp_path) == ["file"]


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path: Path, flushed: list[str]) -> None:
    write_atomically(tmp_path / "new" / "file", b"text")
    assert (tmp_path / "new" / "file").read_bytes() == b"text"
    first, second = flushed
    assert first.startswith("file.")
    assert first.endswith(".tmp")
    assert second == "new"


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path: Path, flushed: list[str]) -> None:
    with new_folder(tmp_path / "folder") as place:
        (place / "inner").mkdir()
        (place / "inner" / "file").write_text("text")
        assert not (tmp_path / "folder").exists()
    assert sorted(flushed[:-2]) == ["digests.json", "file", "inner"]
    assert re.fullmatch(r"folder\.[0-9a-f]{16}\.tmp", flushed[-2])
    assert flushed[-1] == tmp_path.name
    assert names(tmp_path) == ["folder", "folder/digests.json", "folder/inner", "folder/inner/file"]


def test_a_line_is_on_the_disk_when_it_was_added(tmp_path: Path, flushed: list[str]) -> None:
    append(tmp_path / "lines", b"one\n")
    append(tmp_path / "lines", b"two\n")
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"
    assert flushed == ["lines", tmp_path.name, "lines"]


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("way", [new_file, new_folder])
def test_what_fails_half_way_leaves_what_was_there(tmp_path: Path, way: Any, error: BaseException) -> None:
    path = tmp_path / "it"
    inner = "file" if way is new_folder else ""

    def write(text: str, error: BaseException | None = None) -> None:
        with way(path) as place:
            (place / inner).write_text(text)
            if error:
                raise error

    write("old")
    before = names(tmp_path)
    with pytest.raises(type(error)):
        write("half", error)
    assert names(tmp_path) == before
    assert (path / inner).read_text() == "old"


def test_a_new_folder_holds_nothing_of_the_old_one_or_of_a_crash(tmp_path: Path) -> None:
    for name in ("folder", f"folder.{ORPHAN}.tmp", f"folder.{ORPHAN}.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "folder.tmp").write_text("a user's")
    with new_folder(tmp_path / "folder") as place:
        (place / "new").write_text("new")
    assert names(tmp_path) == ["folder", "folder.tmp", "folder/digests.json", "folder/new"]


def test_what_a_killed_process_left_is_removed_and_what_it_had_moved_away_is_put_back(tmp_path: Path) -> None:
    for name in ("a", f"a.{ORPHAN}.tmp", f"b.{ORPHAN}.tmp"):
        (tmp_path / name).write_text("text")
    (tmp_path / f"c.{ORPHAN}.old.tmp").mkdir()
    clean(tmp_path, age=60.0)
    assert len(names(tmp_path)) == 4
    clean(tmp_path)
    assert names(tmp_path) == ["a", "c"]


def test_temporary_names_differ_in_containers_whose_process_numbers_are_the_same(tmp_path: Path) -> None:
    with new_file(tmp_path / "it") as first, new_file(tmp_path / "it") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    with new_folder(tmp_path / "them") as one, new_folder(tmp_path / "others") as other:
        assert one.name.removeprefix("them") != other.name.removeprefix("others")


def test_a_file_has_the_mode_of_the_folder_whatever_the_library_does(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for way, inner in ((new_file, ""), (new_folder, "tensors")):
            with way(tmp_path / way.__name__) as place:
                (place / inner).unlink(missing_ok=True)
                save_file({"a": np.zeros(2)}, place / inner)
                (place / inner).chmod(0o600)
            assert (tmp_path / way.__name__ / inner).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)", "Os { code: 28, kind: Full }"])
@pytest.mark.parametrize("way", [new_file, new_folder])
def test_an_error_of_any_library_about_the_disk_is_one_of_the_system(tmp_path: Path, way: Any, text: str) -> None:
    with pytest.raises(OSError, match="No space left") as error, way(tmp_path / "it"):
        raise Exception(text)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="another"), way(tmp_path / "it"):
        raise ValueError("another")
    assert names(tmp_path) == []


def test_a_changed_or_missing_file_of_a_folder_is_named(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as place:
        (place / "inner").mkdir()
        (place / "inner" / "file").write_text("text")
        (place / "README.md").write_text("a card")
    (tmp_path / "folder" / "README.md").write_text("a better card")
    assert damaged(tmp_path / "folder") is None
    (tmp_path / "folder" / "inner" / "file").write_text("test")
    assert damaged(tmp_path / "folder") == "inner/file"
    (tmp_path / "folder" / "inner" / "file").unlink()
    assert damaged(tmp_path / "folder") == "inner/file"
    file = tmp_path / "folder" / "digests.json"
    for wrong in ("{", "[]", "{}", file.read_text().replace("inner", "outer")):
        file.write_text(wrong)
        assert damaged(tmp_path / "folder") == "digests.json"
    (tmp_path / "folder" / "digests.json").unlink()
    assert damaged(tmp_path / "folder") is None


def test_an_object_carries_its_digest_through_json() -> None:
    value = {"b": 0.1, "a": {"1": [1, None]}}
    read = json.loads(json.dumps(sealed(value)))
    assert unsealed(read) == value == unsealed(value)
    with pytest.raises(ValueError, match="differs"):
        unsealed(read | {"b": 0.2})

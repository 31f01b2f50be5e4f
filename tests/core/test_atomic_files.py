"""Files and folders that replace others whole, whatever the disk does."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fedlora.core.files import append, new_file, new_folder, write_atomically


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
    assert sorted(flushed[:-2]) == ["file", "inner"]
    assert flushed[-2:] == ["folder.tmp", tmp_path.name]
    assert names(tmp_path) == ["folder", "folder/inner", "folder/inner/file"]


def test_a_line_is_on_the_disk_when_it_was_added(tmp_path: Path, flushed: list[str]) -> None:
    append(tmp_path / "lines", b"one\n")
    append(tmp_path / "lines", b"two\n")
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"
    assert flushed == ["lines", "lines"]


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
    for name in ("folder", "folder.tmp", "folder.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
    with new_folder(tmp_path / "folder") as place:
        (place / "new").write_text("new")
    assert names(tmp_path) == ["folder", "folder/new"]

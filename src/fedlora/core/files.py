"""Atomic and durable writes of files and folders."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file atomically; a reader sees either the old or the new content.

    Args:
        path: the file; parent folders are created.
        content: the complete content.

    Raises:
        OSError: writing failed; the old file is intact.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def append(path: Path, content: bytes) -> None:
    """Appends to a file; the data are on disk on return.

    Raises:
        OSError: writing failed; the end of the file may be incomplete.
    """
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which replaces ``path`` at the end of the block; safe for concurrent processes.

    Raises:
        OSError: writing failed; the old file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which replaces ``path`` at the end of the block; not safe for concurrent processes.

    Raises:
        OSError: writing failed; the old folder is intact.
    """
    temporary, replaced = (path.with_name(path.name + end) for end in (".tmp", ".old.tmp"))
    for left in (temporary, replaced):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for each in (*temporary.rglob("*"), temporary):
            _flush(each)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # a crash here leaves two whole folders rather than half of one
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

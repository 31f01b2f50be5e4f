"""Files and folders that appear whole or not at all, and are on the disk by then."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file; a reader finds the old content or the new one.

    Args:
        path: the file; folders above it are made.
        content: the whole of it.

    Raises:
        OSError: the disk refused; the old file is intact.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def append(path: Path, content: bytes) -> None:
    """Adds to a file, on the disk by the return.

    Raises:
        OSError: the disk refused; the end of the file may be torn.
    """
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write a file, which replaces ``path`` at the end of the block; several processes may do so at a time.

    Raises:
        OSError: the disk refused; the old file is intact.
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
    """A new folder to write into, which replaces ``path`` at the end of the block; one process at a time may do so.

    Raises:
        OSError: the disk refused; the old folder is intact.
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

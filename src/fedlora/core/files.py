"""Atomic and durable writes of files and folders."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fedlora.core.digests import seal_folder

_TEMPORARY = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}(?P<old>\.old)?\.tmp")
_ORPHAN_AGE = 86_400.0
"""Seconds after which a temporary file is taken for that of a process that was killed."""
_CODE = re.compile(r"os error (\d+)|\bcode: (\d+)")
"""How libraries written in Rust, which raise errors of their own, give the system's error number."""


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
    new = not path.exists()
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if new:
        _flush(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which replaces ``path`` at the end of the block; safe for concurrent processes.

    The file has the mode of any file that this process creates, whatever the library that writes it does.

    Raises:
        OSError: writing failed, whatever the library that writes raised; the old file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent, _ORPHAN_AGE)
    temporary = _temporary(path)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777
        with _system_errors(temporary):
            yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which replaces ``path`` at the end of the block, with ``digests.json`` in it.

    Of concurrent processes that write the same folder, one may fail, but none leaves a mixture. The files have the
    folder's mode, without the right to execute.

    Raises:
        OSError: writing failed, whatever the library that writes raised; the old folder is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent, _ORPHAN_AGE)
    temporary = _temporary(path)
    replaced = temporary.with_suffix(".old.tmp")
    temporary.mkdir()
    try:
        with _system_errors(temporary):
            yield temporary
        seal_folder(temporary)
        mode = temporary.stat().st_mode & 0o666
        for each in (*temporary.rglob("*"), temporary):
            if each.is_file() and not each.is_symlink():
                each.chmod(mode)
            _flush(each)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # a crash here leaves two whole folders rather than half of one; see `clean`
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean(folder: Path, age: float = 0.0) -> None:
    """Removes what killed processes left behind in a folder, and puts back a folder that one of them had moved away.

    Args:
        folder: where to look; not in its subfolders.
        age: least age in seconds; 0 only where no other process writes.
    """
    before = time.time() - age
    with suppress(OSError):
        for entry in sorted(folder.iterdir()):
            found = _TEMPORARY.fullmatch(entry.name)
            if not found or entry.lstat().st_mtime > before:
                continue
            target = entry.with_name(found["name"])
            if found["old"] and not target.exists():
                entry.rename(target)
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # process numbers are not unique: containers that share a file system have the same ones
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raises a library's own error for a failed write as the ``OSError`` that it stands for."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if code := _CODE.search(str(error)):
            number = int(code[1] or code[2])
            raise OSError(number, os.strerror(number), str(path)) from error
        if isinstance(error, SafetensorError):
            raise OSError(f"could not write {path}: {error}") from error
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

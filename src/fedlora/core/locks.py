"""Locks that keep a folder to one process at a time."""

from __future__ import annotations

import errno
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlora.core.errors import ConfigError

try:
    import fcntl
except ImportError:  # not available on every system
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
"""The file that is locked; it is not part of what a folder holds."""
TRIES, PAUSE = 5, 0.1
"""Number of attempts to take a lock, and seconds between them: another process may be probing or removing it."""
_RECORD = re.compile(r"process \d{1,20} on [\w.-]{1,100} since [\d-]{10} [\d:]{8} [+-]\d{4}", re.ASCII)


@contextmanager
def locked(folder: Path, remedy: str, tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Creates the folder if necessary, and holds an exclusive lock in it, which ends with the process.

    Args:
        folder: the folder.
        remedy: what to do if another process holds the lock, as the end of a sentence.
        tell: receives a sentence if the file system does not support locks.

    Raises:
        ConfigError: another process holds it.
        OSError: the lock file cannot be opened or created.
    """
    handle, reason = _acquire(folder, remedy)
    try:
        if reason:
            tell(
                f"{folder} cannot be locked ({reason}): nothing keeps a second process from writing to it, so start "
                "one at a time"
            )
        yield
    finally:
        # removed before it is unlocked: a process that has opened it by then detects this in _acquire
        if _is_in(handle, folder):
            with suppress(OSError):
                (folder / LOCK).unlink()
        os.close(handle)


def check_free(folder: Path, remedy: str) -> None:
    """Checks in advance that ``locked`` would succeed; writes nothing.

    Raises:
        ConfigError: another process holds the lock.
    """
    try:
        handle = _open(folder, 0)
    except OSError:  # usually there is none
        return
    try:
        if _lock(handle, shared=True) is False:
            raise _refusal(folder, _record(handle), remedy)
    finally:
        os.close(handle)


def _acquire(folder: Path, remedy: str) -> tuple[int, str]:
    """The open lock file, with the holder recorded in it, and the reason if this system cannot lock it.

    Raises:
        ConfigError: another process holds it.
        OSError: the file cannot be opened or created.
    """
    record = ""
    for _ in range(TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open(folder, os.O_CREAT)
        try:
            taken = _lock(handle)
            if taken is not False and _is_in(handle, folder):
                _sign(handle)
                return handle, taken if isinstance(taken, str) else ""
            record = _record(handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(PAUSE)
    raise _refusal(folder, record, remedy)


def _open(folder: Path, flags: int) -> int:
    # opened for writing too, as network file systems otherwise reject locks
    return os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | flags, 0o666)


def _lock(handle: int, shared: bool = False) -> bool | str:
    """Whether the lock was acquired, or the reason why locks are not supported."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else error.strerror or str(error)
    return True


def _is_in(handle: int, folder: Path) -> bool:
    """Whether an open lock file is still the one in the folder, not one that was removed or replaced."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK))
    except OSError:
        return False


def _sign(handle: int) -> None:
    """Writes the holder of the lock and the time it was taken, for information only."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node())[:100] or "localhost"
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with suppress(OSError):  # the lock is held regardless
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {host} since {since}\n".encode())


def _record(handle: int) -> str:
    """The holder of the lock, if the file records it in the format written here."""
    try:
        found = _RECORD.match(os.read(handle, 300).decode("ascii", "replace"))
    except OSError:
        return ""
    return found.group() if found else ""


def _refusal(folder: Path, record: str, remedy: str) -> ConfigError:
    return ConfigError(f"{folder} is in use by {record or 'another process'}; {remedy}")

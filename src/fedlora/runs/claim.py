"""Who may write to a run's folder: one process at a time. A run that never began leaves nothing behind."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlora.config import Experiment
from fedlora.core.errors import ConfigError
from fedlora.runs.folder import LOCK, RunFolder, cannot_write

try:
    import fcntl
except ImportError:  # not every system has it
    fcntl = None  # type: ignore[assignment]

TRIES, PAUSE = 5, 0.1
"""How often a lock is tried, and seconds between: another process may look at it, or remove it, just then."""
_RECORD = re.compile(r"process \d{1,20} on [\w.-]{1,100} since [\d-]{10} [\d:]{8} [+-]\d{4}", re.ASCII)


def look(files: RunFolder, experiment: Experiment) -> None:
    """Refuses at once what ``claimed`` would refuse once all is prepared; nothing is written.

    Args:
        files: the folder, which may not be there yet.
        experiment: what is to run in it.

    Raises:
        CheckpointError: it holds another experiment's run.
        ConfigError: it holds something else, or another process trains in it.
    """
    files.check(experiment)
    try:
        handle = _open(files.path, 0)
    except OSError:  # mostly there is none
        return
    try:
        if _lock(handle, shared=True) is False:
            raise _refusal(files.path, _record(handle))
    finally:
        os.close(handle)


@contextmanager
def claimed(
    files: RunFolder, experiment: Experiment, tell: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """The folder is the experiment's, and no other process's, until the end of the block.

    If the block fails before a row is in the ledger, what was made in the folder goes, and the folder with it, and
    folders above it, if they were not there before. The lock is the system's and ends with the process.

    Args:
        files: the folder, which may not be there yet.
        experiment: what is to run in it.
        tell: gets a sentence where the file system has no locks.

    Raises:
        CheckpointError: it holds another experiment's run.
        ConfigError: it holds something else, or another process trains in it.
        DataError: the disk refused.
    """
    made = [one for one in (files.path, *files.path.parents) if not os.path.lexists(one)]
    try:
        with _locked(files.path, tell):
            kept = set(files.path.iterdir())
            try:
                files.claim(experiment)
                yield
            except BaseException:
                if not files.begun:
                    _clear(files.path, kept)
                raise
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty, as it should be
                folder.rmdir()


def _clear(folder: Path, kept: set[Path]) -> None:
    """Removes what a folder holds beside ``kept``."""
    for entry in {*folder.iterdir()} - kept - {folder / LOCK}:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """The folder, made if it is not there, with a lock in it that nobody else holds."""
    try:
        handle, reason = _acquire(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        if reason:
            tell(
                f"{folder} cannot be locked ({reason}): nothing keeps a second process from writing to it, so start "
                "one at a time"
            )
        yield
    finally:
        # before it is unlocked: who opened it by then finds out, as in _acquire
        if _is_in(handle, folder):
            with suppress(OSError):
                (folder / LOCK).unlink()
        os.close(handle)


def _acquire(folder: Path) -> tuple[int, str]:
    """The open lock file, which says who holds it, and why it is not locked, if this system cannot.

    Raises:
        ConfigError: another holds it.
        OSError: the disk refused.
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
    raise _refusal(folder, record)


def _open(folder: Path, flags: int) -> int:
    # for writing too, without which locks over a network are refused
    return os.open(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | flags, 0o666)


def _lock(handle: int, shared: bool = False) -> bool | str:
    """Whether the lock was free and now is ours, or why there are no locks here."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else error.strerror or str(error)
    return True


def _is_in(handle: int, folder: Path) -> bool:
    """Whether an open lock file is the one in the folder, and not one that was removed or replaced."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder / LOCK))
    except OSError:
        return False


def _sign(handle: int) -> None:
    """Writes who holds the lock, and since when, for people alone."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node())[:100] or "localhost"
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with suppress(OSError):  # the lock holds without
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {host} since {since}\n".encode())


def _record(handle: int) -> str:
    """Who holds the lock, if the file says so in the form that is written here."""
    try:
        found = _RECORD.match(os.read(handle, 300).decode("ascii", "replace"))
    except OSError:
        return ""
    return found.group() if found else ""


def _refusal(folder: Path, record: str) -> ConfigError:
    return ConfigError(
        f"{folder} is in use by {record or 'another process'}; wait until that run has ended, stop it, or choose "
        "another folder with --out"
    )

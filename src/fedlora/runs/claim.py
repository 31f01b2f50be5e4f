"""Locking of a run's folder to one process at a time. A run that never started leaves no files behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedlora.config import Experiment
from fedlora.core.locks import LOCK, check_free, locked
from fedlora.runs.folder import RunFolder, cannot_write

_REMEDY = "wait until that run has ended, stop it, or choose another folder with --out"


def look(files: RunFolder, experiment: Experiment, extend: bool = True) -> None:
    """Checks in advance for what ``claimed`` would reject after all preparations; writes nothing.

    Args:
        files: the folder, which may not exist yet.
        experiment: the experiment to run in it.
        extend: whether a run in it may be extended, see ``RunFolder.check``.

    Raises:
        CheckpointError: it contains another experiment's run.
        ConfigError: it contains something else, or another process is training in it.
    """
    files.check(experiment, extend)
    check_free(files.path, _REMEDY)


@contextmanager
def claimed(
    files: RunFolder, experiment: Experiment, tell: Callable[[str], None] = lambda text: None, extend: bool = True
) -> Iterator[None]:
    """Reserves the folder for the experiment and locks it against other processes until the end of the block.

    If the block fails before the first row is in the ledger, everything created in the folder is removed, as are the
    folder itself and its parents if they did not exist before. The lock is an operating-system lock and ends with the
    process.

    Args:
        files: the folder, which may not exist yet.
        experiment: the experiment to run in it.
        tell: receives a sentence if the file system does not support locks.
        extend: whether a run in it may be extended, see ``RunFolder.check``.

    Raises:
        CheckpointError: it contains another experiment's run.
        ConfigError: it contains something else, or another process is training in it.
        DataError: writing failed.
    """
    with held(files.path, _REMEDY, tell):
        files.tidy()
        kept = set(files.path.iterdir())
        try:
            files.claim(experiment, extend)
            yield
        except BaseException:
            if not files.begun:
                _clear(files.path, kept)
            raise


@contextmanager
def held(folder: Path, remedy: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a folder, see ``locked``; folders made for it are removed if they are empty at the end.

    Raises:
        ConfigError: another process holds it.
        DataError: writing failed.
    """
    made = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(folder, remedy, tell))
            except OSError as error:
                raise cannot_write(folder, error) from error
            yield
    finally:
        for one in made:
            with suppress(OSError):  # usually the folder is not empty
                one.rmdir()


def _clear(folder: Path, kept: set[Path]) -> None:
    """Removes the content of a folder except ``kept``."""
    for entry in {*folder.iterdir()} - kept - {folder / LOCK}:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)

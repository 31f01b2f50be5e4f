"""What commands print beside their results: one logger, for the terminal and for a file, and bars."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedlora.core.errors import ConfigError
from fedlora.core.progress import LOG, listening

ERR = Console(stderr=True)
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}


class Printing(logging.Handler):
    """Prints records on a console: warnings in yellow, errors in red, stages on a terminal alone.

    Args:
        console: the console.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        of_loading = getattr(record, "stage", False)
        if of_loading and not self.console.is_terminal:
            return
        text = f"{record.getMessage()} ..." if of_loading else record.getMessage()
        style = _STYLES.get(record.levelno) or ("dim" if of_loading or record.levelno < logging.INFO else None)
        try:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Does nothing: the stream keeps its own error, which decides the exit code."""


def set_up(verbose: bool, quiet: bool, file: Path | None) -> None:
    """Directs the logger ``fedlora`` to the standard error and, if named, to a file.

    Args:
        verbose: print details too, such as rounds without an evaluation.
        quiet: print warnings and errors alone, and no bars.
        file: is appended to; its lines begin with the time in UTC and the level.

    Raises:
        ConfigError: both ``verbose`` and ``quiet``, or the file cannot be written.
    """
    if verbose and quiet:
        raise ConfigError("--verbose prints more and --quiet less: give one of the two")
    level = logging.DEBUG if verbose else logging.INFO
    terminal = Printing(ERR)
    terminal.setLevel(logging.WARNING if quiet else level)
    for one in LOG.handlers:
        one.close()
    LOG.handlers[:] = [terminal]
    LOG.propagate = False  # a library may give the root logger a handler, which would print everything again
    LOG.setLevel(level)
    if file is not None:
        try:
            written = logging.FileHandler(file.expanduser(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--log-file {file} cannot be written ({error.strerror}); name a file in an existing folder"
            ) from error
        line = "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s"
        formatter = logging.Formatter(line, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        written.setFormatter(formatter)
        LOG.addHandler(written)


def shows_progress() -> bool:
    """Whether bars are shown: on a terminal, without ``--quiet``."""
    return ERR.is_terminal and LOG.handlers[:1] != [] and LOG.handlers[0].level < logging.WARNING


@contextmanager
def bar(what: str) -> Iterator[None]:
    """Shows how much of a step is done, on a terminal."""
    if not shows_progress():
        yield
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn()
    with Progress(*columns, console=ERR, transient=True) as progress:
        task = progress.add_task(what, total=None)
        with listening(lambda done, total: progress.update(task, completed=done, total=total)):
            yield

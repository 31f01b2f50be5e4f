"""The standard streams: what happens if they are closed, full, or in another encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CLOSED_PIPE = 141
"""The exit code of a command whose reader has gone, as of one that SIGPIPE ends: 128 + 13."""


class Output(io.FileIO):
    """A standard stream that keeps the first error of writing to it, as libraries handle such errors in their own way.

    Args:
        number: its file descriptor.
    """

    failure: OSError | None = None

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)

    def write(self, content: ReadableBuffer, /) -> int:
        """Writes; after an error, everything is discarded, the interpreter's last flush included."""
        if self.failure is None:
            try:
                return super().write(content)
            except OSError as error:
                self.failure = error
                raise
        return memoryview(content).nbytes


def open_streams() -> list[Output]:
    """Makes the standard streams usable, whatever they are, with what an encoding lacks escaped.

    Returns:
        Those that are files, to be asked for their errors at the end.
    """
    found: list[Output] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif type(stream) is io.TextIOWrapper:
            with suppress(OSError):
                stream.flush()
            found.append(Output(stream.fileno()))
            buffer = io.BufferedWriter(found[-1])
            setattr(
                sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=stream.isatty())
            )
    return found


def failure_of(streams: list[Output]) -> tuple[int, str] | None:
    """The exit code and a message, once everything was written, if a stream could not be written; else None."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    failure = next((one.failure for one in streams if one.failure), None)
    if failure is None:
        return None
    if failure.errno == errno.EPIPE:
        return CLOSED_PIPE, ""
    return 2, f"error: the output cannot be written ({failure.strerror}): send it to a place with room"

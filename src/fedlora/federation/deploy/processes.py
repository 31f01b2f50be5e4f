"""Flower's processes on this machine: started, monitored, and always cleaned up."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fedlora.core.errors import ProcessError, plain

PATIENCE = 60.0
"""Seconds allowed for a process to start."""
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Settings of child processes: no telemetry, nothing installed at run time."""
_COMPLAINTS = ("WARNING", "ERROR", "Connection attempt failed", "Exit Code")
_PR_SET_PDEATHSIG = 1
# looked up here, as few operations are safe between fork and exec
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def quiet() -> None:
    """Applies the environment settings of child processes to this process as well."""
    os.environ.update(_QUIET)


class Child:
    """A child process with its own log; it ends with its parent.

    Args:
        command: the command to run.
        home: its own folder, for its log and Flower's files.
        env: additional environment variables.
        grace: seconds allowed to terminate after a request; longer than the grace period of its own children.
    """

    def __init__(
        self, command: Sequence[str], home: Path, env: Mapping[str, str] | None = None, grace: float = 10.0
    ) -> None:
        self.command, self.home, self.env, self.grace = list(command), home, dict(env or {}), grace
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self._asked = False
        self._read = 0

    def start(self) -> Self:
        """Starts it, or restarts it if it ran before."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        env = {**os.environ, **_QUIET, "FLWR_HOME": str(self.home), **self.env}
        with (self.home / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.started, self._asked = time.monotonic(), False
        return self

    @property
    def alive(self) -> bool:
        """Whether it is running."""
        return self.process is not None and self.process.poll() is None

    def ask(self) -> None:
        """Requests termination, only once: a second request would interrupt its cleanup."""
        if self.process is not None and not self._asked:
            self._asked = True
            self.process.terminate()

    def stop(self) -> None:
        """Requests termination, and kills it and its descendants if it does not comply."""
        self.ask()
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.grace)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        """The end of its log as one line, starting at the last recent error if there is one."""
        with contextlib.suppress(OSError):
            lines = (self.home / "log.txt").read_text(errors="replace").strip().splitlines()[-40:]
            wrong = [number for number, line in enumerate(lines) if "ERROR" in line or "Exit Code" in line]
            last = lines[wrong[-1] : wrong[-1] + 3] if wrong else lines[-3:]
            return " ".join(line.strip() for line in last)[-400:]
        return ""

    def complaints(self) -> list[str]:
        """Warnings and errors added to its log since the last call."""
        with contextlib.suppress(OSError), (self.home / "log.txt").open(errors="replace") as log:
            log.seek(self._read)
            lines = log.readlines()
            self._read = log.tell()
            return [plain(line.strip()) for line in lines if any(word in line for word in _COMPLAINTS)]
        return []

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def stop_all(children: Iterable[Child]) -> None:
    """Stops several processes concurrently."""
    children = list(children)
    for child in children:
        child.ask()
    for child in children:
        child.stop()


def write_secret(file: Path, content: bytes) -> None:
    """Creates a file that is readable only by its owner from the moment it exists.

    Raises:
        FileExistsError: the file already exists.
    """
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as opened:
        opened.write(content)


def free_port() -> int:
    """An unused port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_up(child: Child, address: str, ca: Path | None) -> None:
    """Waits until a SuperLink responds.

    Raises:
        ProcessError: it ended, or does not respond in time.
    """
    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    url = f"{'https' if ca else 'http'}://{address}/health"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if not child.alive:
            raise ProcessError(f"the process ended at once: {child.last_words()}")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(url, timeout=2, context=context),
        ):
            return
        time.sleep(0.1)
    raise ProcessError(f"nothing answers at {address}: {child.last_words()}")


def _die_with_parent() -> None:
    """Makes Linux send this child a signal when its parent dies, however it dies."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)

"""Commands whose output goes to a full disk, a closed pipe or nowhere: no traceback, and no fault of fedlora."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
LOADS = pytest.mark.slow  # a process of its own loads PyTorch
FEDLORA = f"{sys.executable} -m fedlora"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command; the exit code is that of the first program of a pipe."""
    line = f"{command}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, **environment})


def test_a_full_standard_output_is_one_sentence_and_exit_code_2() -> None:
    done = shell(f"{FEDLORA} --version >/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        b"error: the output cannot be written (No space left on device): send it to a place with room\n"
    )


@pytest.mark.parametrize("arguments", ["--help", pytest.param("list --format json", marks=LOADS)])
def test_a_reader_that_has_gone_ends_a_command_silently(arguments: str) -> None:
    # the reader ends before the command begins to print
    done = shell(f"(sleep 0.2; exec {FEDLORA} {arguments}) | true")
    assert (done.returncode, done.stdout, done.stderr) == (141, b"", b"")


def test_closed_and_full_streams_change_no_exit_code_of_an_error() -> None:
    wrong = f"{FEDLORA} --log-file /dev/null/log list"  # refused before PyTorch is loaded
    assert b"error: " in shell(wrong).stderr
    assert shell(f"{wrong} 2>&-").returncode == 2
    assert shell(f"{wrong} 2>/dev/full").returncode == 2
    assert shell(f"{FEDLORA} --version >&-").returncode == 0


@pytest.mark.parametrize(
    ("environment", "command", "said"),
    [
        ({"LC_ALL": "C"}, "--help", b"in as few"),
        pytest.param({"PYTHONIOENCODING": "ascii"}, "list", b"flasc", marks=LOADS),
    ],
)
def test_a_poor_locale_prints_everything(environment: dict[str, str], command: str, said: bytes) -> None:
    done = shell(f"{FEDLORA} {command}", **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert said in done.stdout

"""What answers at once: help in groups, the version, and completion; none of them loads PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.main import get_command

import fedlora
from fedlora.cli.main import app

CALL = """
import sys
sys.argv = ["fedlora", *sys.argv[1:]]
from fedlora.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "peft", "datasets", "numpy", "sklearn"} & sys.modules.keys()
    print(sorted(heavy), file=sys.stderr)
"""


def said(*arguments: str, **variables: str) -> str:
    """What a process prints that may import nothing heavy."""
    command = [sys.executable, "-c", CALL, *arguments]
    env = {**os.environ, "COLUMNS": "200", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]"), done.stderr
    return done.stdout


def test_help_has_every_command_in_a_group() -> None:
    text = said("--help")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    groups = {command.rich_help_panel for command in commands.values()}
    assert len(groups) == 6
    assert all(f"─ {group} ─" in text for group in groups)
    assert all(f"│ {name} " in text for name in commands)
    assert "─ Commands ─" not in text


def test_the_version_is_the_packages() -> None:
    assert said("--version") == f"fedlora {fedlora.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fedlora par", {"partition"}),
        ("fedlora s", {"show", "search", "study", "serve", "schema"}),
        ("fedlora federation d", {"demo"}),
        ("fedlora study run.toml --stage t", {"tune", "table"}),
    ],
)
def test_the_shell_completes_commands_and_values(words: str, expected: set[str]) -> None:
    place = str(len(words.split()) - 1)
    assert set(said(_FEDLORA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place).split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_a_shell(shell: str) -> None:
    # without this typer asks the processes above which shell they are
    assert "_FEDLORA_COMPLETE" in said("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")

"""Reading, checking and printing configurations loads no library that only models and data need."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.core.later import Later

HEAVY = ("transformers", "peft", "datasets", "sklearn", "scipy", "pandas", "pyarrow", "seqeval", "flwr")
READ = """
import json, sys, tomllib
from fedlora.cli import main
found = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["fedlora", *words.split()]
    code = 0
    try:
        main.main()
    except SystemExit as stop:
        code = stop.code or 0
    found[words] = [code, [name for name in NAMES if name in sys.modules]]
print(json.dumps(found))

from fedlora.config import digest, parse, to_toml
from fedlora.config.template import template
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.methods import METHODS
for name in METHODS:
    experiment = parse(tomllib.loads(template(name)))
    digest(experiment), to_toml(experiment)
model = {"object": "BertModel:1f", "tokenizer": "tokenizer:2e"}
handed = parse({"model": model, "data": {"kind": "rows", "train": "rows:3d"}})
digest(handed), to_toml(handed)
print(json.dumps([name for name in NAMES if name in sys.modules]))
"""
COMMANDS = {
    "show wrong.toml": 2,
    "run wrong.toml": 2,
    "list": 0,
    "list task": 0,
    "list refusals": 0,
    "new flasc": 0,
    "schema": 0,
    "--version": 0,
    # without Flower it is refused before anything is written
    "federation init federation --sites 2": 0 if importlib.util.find_spec("flwr") else 2,
}
"""Commands that only read settings, with their exit codes."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Both in one process, which loads PyTorch for seconds; its streams are no terminals."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "wrong.toml").write_text('[method]\nkind = "flasc"\nranks = 4\n')
    command = [sys.executable, "-c", READ.replace("NAMES", repr(HEAVY)), json.dumps([*COMMANDS])]
    env = {**os.environ, "FORCE_COLOR": "", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


def test_commands_that_read_settings_load_no_models_library(done: subprocess.CompletedProcess[str]) -> None:
    assert json.loads(done.stdout.splitlines()[-2]) == {words: [code, []] for words, code in COMMANDS.items()}


def test_every_kind_of_configuration_is_read_and_printed_without_them(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_terminal_is_told_what_is_loaded(done: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedlora", "show", str(tmp_path / "none.toml")]
    env = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": "1"}
    there = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "loading PyTorch ..." in there.stderr
    assert there.returncode == 2
    assert "loading PyTorch ..." not in done.stderr


def test_a_module_is_imported_when_something_of_it_is_used() -> None:
    later = Later("xml")
    assert later.sax.__name__ == "xml.sax"
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = later.nothing_of_that_name

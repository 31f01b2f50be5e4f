"""The example of a package with parts of one's own, installed into an environment that has never seen it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import fedlora

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_parts"


def installed(tmp_path: Path) -> Path:
    """The Python of a fresh environment with the package in it, and all that this one has."""
    place = tmp_path / "env"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(fedlora.__file__).parents[1])]
    (site / "here.pth").write_text("\n".join(here))
    source = tmp_path / "source"
    for file in EXAMPLE.rglob("*"):
        if file.is_file() and file.suffix in (".py", ".toml", ".md"):
            target = source / file.relative_to(EXAMPLE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file.read_text())
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", str(source)], check=True)
    return python


@pytest.mark.slow
def test_the_package_installs_lists_runs_and_passes_its_tests(tmp_path: Path) -> None:
    python = installed(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(*words: str) -> str:
        done = subprocess.run([str(python), "-m", *words], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for slot, kind in (("aggregator", "majority_sign"), ("lora_init", "identity"), ("task", "short_texts")):
        assert kind in command("fedlora", "list", slot)
    small = ["-s", "rounds=2", "-s", "clients.num=4", "-s", "clients.per_round=2", "-s", "local.max_steps=1"]
    found = json.loads(command("fedlora", "run", str(EXAMPLE / "run.toml"), *small, "--out", "run", "--format", "json"))
    assert found["rounds"] == 2
    assert 'kind = "own_parts.majority:MajoritySign"' in (tmp_path / "run" / "config.toml").read_text()
    command("pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))

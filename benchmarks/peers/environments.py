"""An environment for each peer, made with ``venv`` and ``pip`` the first time and kept under ``build/peers/envs``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PACKAGES = {"flower": "flwr[simulation]>=1.41,<1.43", "pfl": "pfl>=0.6,<0.7", "nvflare": "nvflare>=2.9,<2.10"}
SHARED = ("torch", "transformers", "peft", "safetensors", "numpy")
"""What all systems compute with, in the versions of this environment; so the build of PyTorch for CPUs stays one."""
LIMIT = 600.0
"""Seconds that an installation may take."""


@dataclass(frozen=True)
class Environment:
    """Where a system is installed.

    Args:
        python: its interpreter; None if it could not be installed.
        release: its version.
        reason: why it could not be installed.
    """

    python: Path | None
    release: str
    reason: str = ""


def own() -> Environment:
    """This environment, in which fedlora runs."""
    return Environment(Path(sys.executable), version("fedlora"))


def environment(name: str, folder: Path, limit: float = LIMIT) -> Environment:
    """The environment of a peer; installed if it is not, for at most ``limit`` seconds."""
    place, package = folder / name, PACKAGES[name]
    python, done = place / "bin" / "python", place / ".installed"
    if not done.exists():
        shared = [f"{each}=={version(each)}" for each in SHARED]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, capture_output=True, text=True)
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *shared, package]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return Environment(None, "", f"pip took more than {limit:.0f} s")
        except subprocess.CalledProcessError as error:
            last = (error.stderr or error.stdout).strip().splitlines() or [f"exit status {error.returncode}"]
            return Environment(None, "", last[-1])
        done.touch()
    distribution = package.partition("[")[0].partition(">")[0]
    asked = f"from importlib.metadata import version; print(version({distribution!r}))"
    answer = subprocess.run([str(python), "-c", asked], check=True, capture_output=True, text=True)
    return Environment(python, answer.stdout.strip())

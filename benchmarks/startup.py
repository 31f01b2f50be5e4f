"""Processor time of commands that only read settings, against that of importing PyTorch."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Figure, Settings, figure

COMMANDS = {
    "show, a mistyped key": ("show", "wrong.toml"),
    "list": ("list",),
    "list task": ("list", "task"),
    "new flasc": ("new", "flasc"),
}
GOAL = "<= 1.3"


def measure(settings: Settings) -> list[Figure]:
    """Processor time of commands that only read settings, over that of importing PyTorch in the same run."""
    repeats = 3 if settings.quick else 9
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "wrong.toml").write_text('[method]\nkind = "flasc"\nranks = 4\n')
        torch = [sys.executable, "-c", "import torch"]
        rest = {name: [sys.executable, "-m", "fedlora", *words] for name, words in COMMANDS.items()}
        for command in (torch, *rest.values()):  # so that bytecode is there
            seconds(command, folder)
        figures, ratios = [], {name: [] for name in rest}  # type: tuple[list[Figure], dict[str, list[float]]]
        for _ in range(repeats):
            one = statistics.mean(seconds(torch, folder) for _ in range(2))
            for name, command in rest.items():
                ratios[name].append(seconds(command, folder) / one)
    for name, values in ratios.items():
        figures.append(figure(f"fedlora {name} / import torch", values, "x", GOAL))
    return figures


def seconds(command: list[str], folder: Path) -> float:
    """User and system time of a process that may fail."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

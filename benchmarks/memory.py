"""Peak memory by the size of the population, each size in a process of its own."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import Figure, Settings, docstrings, figure, opened, spread_rows
from fedlora.core.state import named_seed
from fedlora.population.clients import draw_cohort
from fedlora.recipe import Recipe
from fedlora.recipe.local import Local
from fedlora.rounds.round import run_round
from fedlora.tuning import LoRA

POPULATIONS = (10, 1_000, 10_000)
PER_ROUND = 10
LENGTH = 128


def measure(settings: Settings) -> list[Figure]:
    """Peak resident memory of a run with 10 clients a round; it should not depend on how many there are."""
    docstrings(LENGTH)  # so that the first process does not encode the data for the others
    rounds = 2 if settings.quick else 4
    repeats = 1 if settings.quick else 2
    peaks: dict[int, list[float]] = {number: [] for number in POPULATIONS}
    for _ in range(repeats):
        for number in POPULATIONS:
            command = [sys.executable, "-m", "benchmarks.memory", str(number), str(rounds), str(settings.threads)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[number].append(float(answer.stdout.split()[-1]))
    figures = []
    for number, values in peaks.items():
        figures.append(figure(f"peak memory, {number:,} clients", values, "MB"))
    smallest = peaks[POPULATIONS[0]]
    for number in POPULATIONS[1:]:
        values = [a / b for a, b in zip(peaks[number], smallest, strict=True)]
        note = f"{rounds} rounds of {PER_ROUND} clients"
        figures.append(figure(f"{number:,} clients / {POPULATIONS[0]} clients", values, "x", "<= 1.05", note))
    return figures


def child(num_clients: int, rounds: int, threads: int) -> float:
    """Runs some rounds and returns this process's peak resident memory in megabytes."""
    torch.set_num_threads(threads)
    task = docstrings(LENGTH)  # so that all batches take the same room
    recipe = Recipe(tuning=LoRA(rank=16), local=Local(max_steps=1, compute="bf16"))
    population = spread_rows(task.num_examples("train"), num_clients, 8)
    _, state, engine = opened(task, recipe, population)
    for done in range(rounds):
        cohort = draw_cohort(population, PER_ROUND, named_seed(0, "cohort", done))
        state, _ = run_round(recipe, state, cohort, engine, seed=0, rounds=rounds)
    return _peak()


def _peak() -> float:
    """Megabytes; where the kernel tells it, of this program alone, as ``ru_maxrss`` counts the parent's at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """One measurement, for the process that ``measure`` starts."""
    parser = argparse.ArgumentParser(description=child.__doc__)
    for name in ("num_clients", "rounds", "threads"):
        parser.add_argument(name, type=int)
    print(child(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()

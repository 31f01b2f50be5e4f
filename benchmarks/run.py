"""Runs the benchmarks: ``python -m benchmarks.run --out benchmarks/out``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks import example_gradients, large_shapes, local_work, memory, naive, overhead, rate, startup, wire
from benchmarks.common import Figure, Settings

Measure = Callable[[Settings], list[Figure]]
PARTS: dict[str, Measure] = {
    "overhead": overhead.measure,
    "local_work": local_work.measure,
    "example_gradients": example_gradients.measure,
    "rate": rate.measure,
    "naive": naive.measure,
    "memory": memory.measure,
    "wire": wire.measure,
    "startup": startup.measure,
    "large_shapes": large_shapes.measure,
}


def main() -> None:
    """Reads the command line, measures, prints a table, and writes it with the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Speed, memory and bytes of fedlora.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, help="folder for results.md and results.json")
    parser.add_argument("--quick", action="store_true", help="smaller workloads, about two minutes in all")
    parser.add_argument("--threads", type=int, default=1, help="1 (processor time, the default) or more (wall clock)")
    given = parser.parse_args()
    if unknown := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    settings = Settings(given.quick, given.threads)
    torch.set_num_threads(settings.threads)
    results: dict[str, list[Figure]] = {}
    took: dict[str, float] = {}
    for name in given.parts or PARTS:
        start = time.perf_counter()
        results[name] = PARTS[name](settings)
        took[name] = time.perf_counter() - start
        print(table(name, results[name], took[name]), flush=True)
    if given.out:
        write(given.out, settings, results, took)


def table(name: str, figures: list[Figure], seconds: float) -> str:
    """A part's figures as a Markdown table."""
    lines = [f"## {name}", "", f"{(PARTS[name].__doc__ or '').strip().splitlines()[0]} Took {seconds:.0f} s.", ""]
    lines += ["| figure | median | quartiles | goal | met | note |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for each in figures:
        value = f"{_number(each.value)} {each.unit}".strip()
        spread = "" if each.low == each.high else f"{_number(each.low)} to {_number(each.high)}"
        met = "" if each.met is None else ("yes" if each.met else "**no**")
        lines.append(f"| {each.name} | {value} | {spread} | {each.goal} | {met} | {each.note} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, settings: Settings, results: dict[str, list[Figure]], took: dict[str, float]) -> None:
    """Writes ``results.md`` and ``results.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    document = {
        "settings": dataclasses.asdict(settings),
        "machine": machine,
        "parts": {
            name: {"seconds": took[name], "figures": [dataclasses.asdict(each) for each in figures]}
            for name, figures in results.items()
        },
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    clock = "processor time" if settings.threads == 1 else "wall clock"
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    head = f"# Benchmarks\n\n{facts}; {settings.threads} thread(s), {clock}{', quick' if settings.quick else ''}.\n"
    tables = [table(name, figures, took[name]) for name, figures in results.items()]
    (folder / "results.md").write_text("\n".join([head, *tables]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()

"""Trains the same job with fedlora and with other systems: ``python -m benchmarks.peers --out benchmarks/out``."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file

import fedlora
from benchmarks.peers.environments import Environment, environment, own
from benchmarks.peers.job import Job, Work
from benchmarks.peers.prepare import Size, prepare
from benchmarks.peers.report import SYSTEMS, Row, System, line_of, report
from benchmarks.peers.watch import Watched, watch

ROOT = Path(__file__).parents[2]
LIMIT = 900.0
"""Seconds that a run may take."""


class RunError(Exception):
    """A worker failed."""


def main() -> None:
    """Reads the command line, prepares the job and the environments, measures, and prints and writes the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="The same job in other systems.")
    parser.add_argument("systems", nargs="*", metavar="system", help=f"any of {', '.join(SYSTEMS)}; all by default")
    parser.add_argument("--out", type=Path, help="folder for peers.md and peers.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="folder of environments and runs")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each system, in turns; medians are reported")
    parser.add_argument("--quick", action="store_true", help="a tiny job, to see whether everything runs")
    given = parser.parse_args()
    if unknown := sorted(set(given.systems) - set(SYSTEMS)):
        parser.error(f"there is no system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    names = [name for name in SYSTEMS if not given.systems or name in given.systems]
    work = given.work.resolve()
    size = Size(clients=4, per_round=2, rounds=3, rows=16, test_rows=32, classes=4) if given.quick else Size()
    noop = dataclasses.replace(size, rounds=4 if given.quick else 20)
    jobs = {False: prepare(work / "job", size), True: prepare(work / "noop", noop)}
    places = {name: _place(SYSTEMS[name], work / "envs") for name in names}
    began = time.monotonic()
    found: dict[str, list[Row]] = {name: [] for name in names}
    for _ in range(given.repeats):
        for name in names:
            found[name].append(measured(name, places[name], jobs, work / "runs" / name))
            print(line_of(found[name][-1]), flush=True)
    rows = {name: _median(each) for name, each in found.items()}
    head = (
        f"{size.rounds} rounds, the first of which warms up, of {size.per_round} of {size.clients} clients with "
        f"{size.rows} rows each; {given.repeats} run(s) of each system; {os.cpu_count()} processors, load "
        f"{os.getloadavg()[2]:.1f}. Took {time.monotonic() - began:.0f} s."
    )
    text = report(rows, head)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "peers.md").write_text(text)
        document = {
            "size": dataclasses.asdict(size),
            "load": os.getloadavg(),
            "rows": {name: [dataclasses.asdict(row) for row in each] for name, each in found.items()},
        }
        (given.out / "peers.json").write_text(json.dumps(document, indent=1) + "\n")


def _place(system: System, folder: Path) -> Environment:
    return environment(system.peer, folder) if system.peer else own()


def measured(name: str, place: Environment, jobs: Mapping[bool, Job], folder: Path) -> Row:
    """Runs a system with and without training."""
    if place.python is None:
        return Row(name, "", missing=f"not installed: {place.reason}")
    try:
        watched, ends = _run(name, place.python, jobs[False], folder / "train", noop=False)
        _, idle = _run(name, place.python, jobs[True], folder / "noop", noop=True)
    except RunError as error:
        return Row(name, place.release, missing=str(error))
    rounds = [after - before for before, after in itertools.pairwise(ends[1:])]
    empty = [after - before for before, after in itertools.pairwise(idle[1:])]
    return Row(
        system=name,
        release=place.release,
        round_seconds=statistics.median(rounds),
        round_processor=(watched.used_at(ends[-1]) - watched.used_at(ends[1])) / len(rounds),
        run_seconds=watched.wall,
        run_processor=watched.processor,
        memory=watched.shared_memory,
        resident=watched.resident_memory,
        accuracy=jobs[False].accuracy(load_file(folder / "train" / "final.safetensors")),
        turn_seconds=statistics.median(empty) / len(jobs[True].plan.cohorts[0]),
    )


def _run(name: str, python: Path, job: Job, out: Path, noop: bool) -> tuple[Watched, list[float]]:
    """A run, and when its rounds ended.

    Raises:
        RunError: it failed, or took too long.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    system = SYSTEMS[name]
    work = Work(job.folder, out, noop, system.workers)
    watched = watch([str(python), *work.command(system.module)], _variables(system, out), out / "log.txt", LIMIT)
    if watched.status is None:
        raise RunError(f"stopped after {LIMIT:.0f} s: see {out / 'log.txt'}")
    ends = [float(line) for line in (out / "rounds.txt").read_text().split()] if watched.status == 0 else []
    if len(ends) != len(job.plan.cohorts) + 1 or not (out / "final.safetensors").exists():
        raise RunError(f"failed with status {watched.status}: see {out / 'log.txt'}")
    return watched, ends


def _variables(system: System, out: Path) -> dict[str, str]:
    """The environment variables of a run: one thread per process, no network, the code of this folder."""
    code = [str(ROOT)] if system.peer else [str(ROOT), str(Path(fedlora.__file__).parents[1])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "FLWR_HOME": str(out / "flwr")}
    return os.environ | threads | quiet | offline | {"PYTHONPATH": os.pathsep.join(code)}


def _median(rows: Sequence[Row]) -> Row:
    """The medians of repetitions; the first that is missing, if any."""
    if missing := [row for row in rows if row.missing]:
        return missing[0]
    names = [each.name for each in dataclasses.fields(Row) if each.type == "float"]
    return dataclasses.replace(
        rows[0], **{name: statistics.median(getattr(row, name) for row in rows) for name in names}
    )


if __name__ == "__main__":
    main()

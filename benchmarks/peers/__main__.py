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
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

import fedlora
from benchmarks.peers.environments import Environment, environment, own
from benchmarks.peers.job import Job, Work
from benchmarks.peers.prepare import Size, prepare
from benchmarks.peers.watch import Watched, watch

ROOT = Path(__file__).parents[2]
LIMIT = 900.0
"""Seconds that a run may take."""


@dataclass(frozen=True)
class System:
    """A row of the tables.

    Args:
        title: its name there.
        module: the worker's module.
        peer: the peer whose environment it runs in; empty for fedlora.
        workers: processes that train at the same time, where the system has such a setting.
        against: the row of fedlora to compare with.
    """

    title: str
    module: str
    peer: str = ""
    workers: int = 1
    against: str = ""


SYSTEMS: dict[str, System] = {
    "fedlora": System("fedlora", "on_fedlora"),
    "fedlora-2": System("fedlora, 2 processes", "on_fedlora", workers=2),
    "pfl": System("pfl-research", "on_pfl", "pfl", against="fedlora"),
    "flower": System("Flower, 2 Ray actors", "on_flower", "flower", workers=2, against="fedlora-2"),
    "nvflare": System("NVFlare, a process per site", "on_nvflare", "nvflare", against="fedlora-2"),
}


@dataclass(frozen=True)
class Row:
    """What was measured of a system.

    Args:
        system: its key in ``SYSTEMS``.
        release: its version.
        round_seconds: wall clock of a round, the first one left out.
        round_processor: processor seconds of a round, of all processes.
        run_seconds: wall clock of the whole run, from the start of the interpreter.
        run_processor: processor seconds of the whole run.
        memory: peak of the proportional set size of all processes, in bytes.
        resident: the same of the resident set size, which counts shared pages once for each process.
        accuracy: of the final weights on the test rows.
        turn_seconds: wall clock of a round without training, by its number of clients.
        missing: why there are no figures.
    """

    system: str
    release: str
    round_seconds: float = 0.0
    round_processor: float = 0.0
    run_seconds: float = 0.0
    run_processor: float = 0.0
    memory: float = 0.0
    resident: float = 0.0
    accuracy: float = 0.0
    turn_seconds: float = 0.0
    missing: str = ""


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
            print(f"{SYSTEMS[name].title}: {found[name][-1].missing or 'done'}", flush=True)
    rows = {name: _median(each) for name, each in found.items()}
    text = report(rows, size, given.repeats, time.monotonic() - began)
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


FIGURES = {
    "time of a round": ("round_seconds", "{:.2f} s", 1.0),
    "processor time of a round": ("round_processor", "{:.2f} s", 1.0),
    "time of the run": ("run_seconds", "{:.1f} s", 1.0),
    "processor time of the run": ("run_processor", "{:.1f} s", 1.0),
    "peak memory": ("memory", "{:,.0f} MB", 1e-6),
    "no-op client": ("turn_seconds", "{:.1f} ms", 1e3),
}
"""Of each figure where less is better: the field of ``Row``, its format, and its unit."""


def report(rows: Mapping[str, Row], size: Size, repeats: int, seconds: float) -> str:
    """The figures, what they are as multiples of fedlora's, and where fedlora is not ahead."""
    lines = [
        "# Peers",
        "",
        f"{size.rounds} rounds, the first of which warms up, of {size.per_round} of {size.clients} clients with "
        f"{size.rows} rows each; {repeats} run(s) of each system; {os.cpu_count()} processors, load "
        f"{os.getloadavg()[2]:.1f}. Took {seconds:.0f} s.",
        "",
        f"| system | version | {' | '.join(FIGURES)} | accuracy |",
        "| --- | --- |" + " ---: |" * (len(FIGURES) + 1),
    ]
    for name, row in rows.items():
        head = f"| {SYSTEMS[name].title} | {row.release} |"
        if row.missing:
            lines.append(f"{head} {row.missing} |" + " |" * len(FIGURES))
            continue
        values = [form.format(getattr(row, field) * unit) for field, form, unit in FIGURES.values()]
        lines.append(f"{head} {' | '.join(values)} | {row.accuracy:.3f} |")
    lines += ["", "As multiples of fedlora with as many processes:", ""]
    lines += [f"| system | against | {' | '.join(FIGURES)} | accuracy |", "| --- | --- |" + " ---: |" * 7]
    behind = []
    for name, row in rows.items():
        ours = rows.get(SYSTEMS[name].against)
        if ours is None or ours.missing or row.missing:
            continue
        ratios = {label: getattr(row, field) / getattr(ours, field) for label, (field, _, _) in FIGURES.items()}
        gap = row.accuracy - ours.accuracy
        values = [f"{ratio:.2f} x" for ratio in ratios.values()]
        titles = f"| {SYSTEMS[name].title} | {SYSTEMS[SYSTEMS[name].against].title} |"
        lines.append(f"{titles} {' | '.join(values)} | {gap:+.3f} |")
        lost = [f"{label} ({ratio:.2f} x)" for label, ratio in ratios.items() if ratio < 1]
        behind += (
            [f"{SYSTEMS[name].title}: {', '.join(lost + [f'accuracy ({gap:+.3f})'] * (gap > 0))}"]
            if (lost or gap > 0)
            else []
        )
    lines += ["", "fedlora is not ahead of: " + ("; ".join(behind) or "none, in nothing") + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

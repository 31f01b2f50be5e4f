"""What it costs to leave one process: ``python -m benchmarks.sites [warm] [scale]``, with the extra ``flower``.

``warm``: a round on a site that holds its model, over TLS on the loopback interface, against its training alone.
``scale``: 1,000 clients, 50 in a round, in Ray's two workers and in one process: seconds and memory.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora import config
from fedlora.config import Experiment
from fedlora.federation.deploy.demo import started_sites
from fedlora.federation.deploy.federate import federate
from fedlora.federation.deploy.folder import ServerConfig, public_keys
from fedlora.federation.deploy.serve import sites_of, superlink
from fedlora.federation.deploy.simulate import simulate
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.experiment import run

ROUNDS = 8


class Clock(Callback):
    """Notes when each round ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def row_recorded(self, row: RoundRecord) -> None:
        self.ends.append(time.perf_counter())

    @property
    def rounds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def chosen(clients: int, per_round: int, steps: int, rounds: int = ROUNDS) -> Experiment:
    local = {"batch_size": 16, "max_steps": steps, "epochs": 100, "optimizer": {"kind": "adamw", "lr": 1e-3}}
    return config.parse(
        {
            "label": f"{clients}-{per_round}-{steps}",
            "task": {"kind": "text_classification", "max_length": 64},
            "clients": {"num": clients, "per_round": per_round, "partition": {"kind": "iid"}},
            "evaluate": {"every": 1000, "num_examples": 64, "dense": False},
            "method": {"kind": "lora", "rounds": rounds, "local": local},
        }
    )


def warm() -> None:
    """A round's wall clock over TLS, less that of a round without training, by the training's own seconds."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "federation"
        with started_sites(place, 1):
            server = ServerConfig.load(place / "server")
            keys = public_keys(place / "server", server)
            with superlink(place / "server", server.port, (), False) as link:
                found = {}
                for name, steps in (("idle", 0), ("work", 20)):
                    clock = Clock()
                    with sites_of(link, keys) as transport:
                        result = federate(
                            chosen(1, 1, steps),
                            Path(folder) / name,
                            transport,
                            ServerPolicy(),
                            names=["site-0"],
                            callbacks=[clock],
                        )
                    found[name] = clock.rounds[1:], [row.slowest_seconds for row in result.rows[2:]]
    floor = statistics.median(found["idle"][0])
    rounds, compute = (statistics.median(values) for values in found["work"])
    print(f"a round without training: {floor:.2f} s ({_spread(found['idle'][0])})")
    print(f"a round of 20 steps: {rounds:.2f} s ({_spread(found['work'][0])}), its training {compute:.2f} s")
    print(f"(round - floor) / training: {(rounds - floor) / compute:.2f}   goal <= 1.2")


def scale() -> None:
    """Seconds per round and peak memory of 1,000 clients, 50 in a round."""
    experiment = chosen(1000, 50, 1, rounds=4)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one process", "two Ray workers"):
            clock = Clock()
            start = time.perf_counter()
            with watched() as peak:
                if name == "one process":
                    run(experiment, Path(folder) / "serial", callbacks=[clock])
                else:
                    simulate(experiment, Path(folder) / "ray", callbacks=[clock], workers=2)
            whole = time.perf_counter() - start
            first, *others = clock.rounds
            print(
                f"{name}: first round {first:.1f} s, later {statistics.median(others):.2f} s ({_spread(others)}), "
                f"whole run {whole:.0f} s, peak {peak[0] / 1e6:,.0f} MB"
            )


@contextmanager
def watched() -> Iterator[list[float]]:
    """The peak of the proportional memory of this process and those it started, in bytes."""
    peak, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], sum(map(_memory, _family(os.getpid()))))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _family(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {root}
    # Ray's own processes leave their parent; they are told by their session
    marked = {pid for pid in parents if _command(pid).find("ray") >= 0}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found | marked


def _command(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text()
    except OSError:
        return ""


def _memory(pid: int) -> float:
    try:
        text = (Path("/proc") / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def _spread(values: Any) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    for part in sys.argv[1:] or ("warm", "scale"):
        {"warm": warm, "scale": scale}[part]()

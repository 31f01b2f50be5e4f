"""Runs a command and measures it from outside, with all processes that it starts: processor time and memory.

Linux only: it reads ``/proc``, and adopts processes whose parent ended, as those of Ray and of NVFlare.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 0.2
_SUBREAPER = 36
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Watched:
    """A command that ended.

    Args:
        status: its exit status; None if it was ended because it took too long.
        wall: seconds from start to end.
        processor: processor seconds of all its processes.
        shared_memory: peak of the sum of their proportional set sizes, in bytes: a page that n processes share counts
            1/n for each.
        resident_memory: peak of the sum of their resident set sizes, in bytes, which counts such a page n times.
        samples: times, as of ``time.monotonic``, and processor seconds used until then.
    """

    status: int | None = None
    wall: float = 0.0
    processor: float = 0.0
    shared_memory: int = 0
    resident_memory: int = 0
    samples: list[tuple[float, float]] = field(default_factory=list)

    def used_at(self, moment: float) -> float:
        """Processor seconds used until a moment, interpolated."""
        before = max((sample for sample in self.samples if sample[0] <= moment), default=self.samples[0])
        after = min((sample for sample in self.samples if sample[0] > moment), default=self.samples[-1])
        span = after[0] - before[0]
        return before[1] + (after[1] - before[1]) * (moment - before[0]) / span if span > 0 else before[1]


def watch(command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float) -> Watched:
    """Runs a command to its end, then ends what it left running."""
    _adopt(True)
    found, ended, others = Watched(), threading.Event(), _family()
    before, start = _children_used(), time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)
        sampler = threading.Thread(target=_sample, args=(found, before, ended, others))
        sampler.start()
        try:
            found.status = process.wait(limit)
        except subprocess.TimeoutExpired:
            found.status = None
        finally:
            found.wall = time.monotonic() - start
            ended.set()
            sampler.join()
            _end(others)
            process.poll()
            _adopt(False)
    found.processor = _children_used() - before
    return found


def _sample(found: Watched, before: float, ended: threading.Event, others: set[int]) -> None:
    while True:
        family = _family() - others
        used = _children_used() - before + sum(map(_used, family))
        # a process that ended between two looks and was not waited for yet is missing in one of them
        used = max(used, found.samples[-1][1] if found.samples else 0.0)
        found.samples.append((time.monotonic(), used))
        sizes = [_sizes(pid) for pid in family]
        found.shared_memory = max(found.shared_memory, sum(size[0] for size in sizes))
        found.resident_memory = max(found.resident_memory, sum(size[1] for size in sizes))
        if ended.wait(INTERVAL):
            return


def _family() -> set[int]:
    """The descendants of this process; the sampler itself is a thread of it."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                parents[int(entry)] = int(_stat(int(entry))[1])
    found: set[int] = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _adopt(on: bool) -> None:
    """Whether processes whose parent ended become children of this one."""
    ctypes.CDLL(None).prctl(_SUBREAPER, int(on), 0, 0, 0)


def _end(others: set[int]) -> None:
    """Ends the descendants that are left, and waits for them, so that their processor time is counted."""
    deadline = time.monotonic() + 10.0
    while family := _family() - others:
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(family)} do not end")
        for pid in family:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _used(pid: int) -> float:
    """Processor seconds of a process, and of those among its children that it waited for."""
    try:
        return sum(map(int, _stat(pid)[11:15])) / _TICK
    except OSError:
        return 0.0


def _sizes(pid: int) -> tuple[int, int]:
    """The proportional and the resident set size of a process, in bytes."""
    kilobytes = {"Pss:": 0, "Rss:": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, *rest = line.split()
            if name in kilobytes:
                kilobytes[name] = int(rest[0])
    return kilobytes["Pss:"] * 1024, kilobytes["Rss:"] * 1024


def _children_used() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

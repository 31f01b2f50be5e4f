"""The rows of the tables, and the tables: figures, multiples of fedlora's, and where fedlora is not ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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


FIGURES = {
    "time of a round": ("round_seconds", "{:.2f} s", 1.0),
    "processor time of a round": ("round_processor", "{:.2f} s", 1.0),
    "time of the run": ("run_seconds", "{:.1f} s", 1.0),
    "processor time of the run": ("run_processor", "{:.1f} s", 1.0),
    "peak memory": ("memory", "{:,.0f} MB", 1e-6),
    "no-op client": ("turn_seconds", "{:.1f} ms", 1e3),
}
"""Of each figure where less is better: the field of ``Row``, its format, and its unit."""


def line_of(row: Row) -> str:
    """A row of the table of figures."""
    head = f"| {SYSTEMS[row.system].title} | {row.release} |"
    if row.missing:
        return f"{head} {row.missing} |" + " |" * len(FIGURES)
    values = [form.format(getattr(row, field) * unit) for field, form, unit in FIGURES.values()]
    return f"{head} {' | '.join(values)} | {row.accuracy:.3f} |"


def report(rows: Mapping[str, Row], head: str) -> str:
    """The tables as Markdown, below ``head``."""
    figures = f"{' | '.join(FIGURES)} | accuracy |"
    rule = "| --- | --- |" + " ---: |" * (len(FIGURES) + 1)
    lines = ["# Peers", "", head, "", f"| system | version | {figures}", rule, *map(line_of, rows.values())]
    pairs = [(row, rows[SYSTEMS[name].against]) for name, row in rows.items() if SYSTEMS[name].against in rows]
    if compared := [(theirs, ours) for theirs, ours in pairs if not theirs.missing and not ours.missing]:
        lines += ["", "As multiples of fedlora with as many processes:", "", f"| system | against | {figures}", rule]
        lines += [_multiples(theirs, ours) for theirs, ours in compared]
        behind = [text for theirs, ours in compared if (text := _behind(theirs, ours))]
        lines += ["", f"fedlora is not ahead of {'; '.join(behind)}." if behind else "fedlora is ahead in everything."]
    return "\n".join(lines) + "\n"


def _ratios(theirs: Row, ours: Row) -> dict[str, float]:
    return {label: getattr(theirs, field) / getattr(ours, field) for label, (field, _, _) in FIGURES.items()}


def _multiples(theirs: Row, ours: Row) -> str:
    values = " | ".join(f"{ratio:.2f} x" for ratio in _ratios(theirs, ours).values())
    titles = f"{SYSTEMS[theirs.system].title} | {SYSTEMS[ours.system].title}"
    return f"| {titles} | {values} | {theirs.accuracy - ours.accuracy:+.3f} |"


def _behind(theirs: Row, ours: Row) -> str:
    """A peer and what it is better at; empty if it is in nothing."""
    better = [f"{label} ({ratio:.2f} x)" for label, ratio in _ratios(theirs, ours).items() if ratio < 1]
    gap = theirs.accuracy - ours.accuracy
    better += [f"accuracy ({gap:+.3f})"] if gap > 0 else []
    return f"{SYSTEMS[theirs.system].title} in {', '.join(better)}" if better else ""

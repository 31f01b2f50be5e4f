"""Terminal output: live progress, tables, comparisons."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData
from fedlora.core.network import Network
from fedlora.core.progress import LOG
from fedlora.core.slots import kind_of
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.cost import PhaseCost
from fedlora.runs.result import Result
from fedlora.runs.search import Trial
from fedlora.tasks.scores import ONE_CLASS

_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(count: float) -> str:
    """``count`` bytes with a decimal unit: 1,234,567 is ``1.23 MB``."""
    unit = 0
    # what would be rounded to 1000 has the next unit
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 999.5 else f"{count:.3g} {_UNITS[unit]}"


def human_seconds(seconds: float) -> str:
    """``seconds`` as ``42 s`` or ``3 min 20 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"


class Live(Callback):
    """Logs a line for each evaluation, and shows a bar with the latest metric, bytes so far and remaining time.

    Rounds without an evaluation are logged as details (``DEBUG``), warnings once each.

    Args:
        console: where the bar is shown, if it is a terminal.
        bar: whether to show it.
    """

    def __init__(self, console: Console, bar: bool = True) -> None:
        self._console, self._bar = console, bar and console.is_terminal
        self._progress: Progress | None = None
        self._rounds = self._done = self._sent = 0
        self._clock = 0.0
        self._spent: list[float] = []
        self._metric = ""
        self._warned: set[str] = set()

    def run_started(self, experiment: Experiment, data: FederatedData, rows: Sequence[RoundRecord]) -> None:
        self.close()
        self._rounds, self._spent = experiment.rounds, []
        self._main = data.task.main_metric
        part = experiment.evaluate.num_examples
        self._part = f" on {part:,} examples" if part and part < data.task.num_examples("test") else ""
        self._done = rows[-1].round if rows else 0
        self._sent = sum(sum(row.down_bytes.values()) + sum(row.up_bytes.values()) for row in rows)
        self._metric = ""
        # phases are named where there are several
        tunings = [kind_of(phase.recipe.tuning) for phase in experiment.phases]
        self._phases = [f"phase {number} {name}  " for number, name in enumerate(tunings)] if tunings[1:] else [""]
        self._warned = {warning for row in rows for warning in row.warnings}
        sizes = data.population.sizes()
        LOG.info(
            f"{experiment.label}: {len(data.population)} clients with {sizes.min()} to {sizes.max()} examples, "
            f"{experiment.clients.per_round} per round, {experiment.rounds} rounds on {data.device}"
            + (f"; resuming after round {self._done}" if rows else "")
        )
        if self._bar:
            self._progress = Progress(
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.add_task("", total=self._rounds, completed=self._done)
            self._progress.start()
        self._clock = time.monotonic()

    def row_recorded(self, row: RoundRecord) -> None:
        now = time.monotonic()
        if row.round:  # the start is evaluated, not trained
            self._spent.append(now - self._clock)
        self._clock, self._done = now, row.round
        self._sent += sum(row.down_bytes.values()) + sum(row.up_bytes.values())
        if self._main in row.metrics:
            self._metric = f"{self._main} {row.metrics[self._main]:.3f}{self._part}"
        text = f"{self._metric}  sent {human_bytes(self._sent)}"
        if recent := self._spent[1:][-10:] or self._spent:
            text += f"  left {human_seconds(mean(recent) * (self._rounds - self._done))}"
        phase = self._phases[row.phase]
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=self._done, description=phase + text)
        level = logging.INFO if row.metrics else logging.DEBUG
        loss = "" if row.reported_loss is None else f"loss {row.reported_loss:.3f}  "
        LOG.log(level, f"  round {self._done}/{self._rounds}  {phase}{loss}{text}")
        # an untrained model that predicts one class only is no finding
        fresh = [one for one in row.warnings if one not in self._warned and (row.round or ONE_CLASS not in one)]
        self._warned.update(fresh)
        for warning in fresh:
            LOG.warning(f"  round {row.round}: {warning}")

    def run_finished(self, result: Result) -> None:
        if result.stopped:
            LOG.info(f"  ended after round {result.rounds}: {result.stopped}")

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


def as_dict(result: Result) -> dict[str, Any]:
    """A result as JSON values, without the ledger."""
    return {
        **result.figures(),
        "folder": str(result.folder),
        "adapter": str(result.adapter) if result.adapter else None,
    }


def search_table(trials: Sequence[Trial]) -> tuple[list[dict[str, Any]], Table]:
    """The trials of a search, as values and as a table."""
    table = Table("step", "rank", "density", "one client and back", "metric", "kept")
    for trial in trials:
        cells = [str(trial.step), str(trial.rank), f"{trial.density:g}", human_bytes(round(trial.client_bytes))]
        shown = "failed" if trial.metric is None else f"{trial.metric:.4f}"
        table.add_row(*cells, shown, "yes" if trial.kept else "")
    return [dataclasses.asdict(trial) for trial in trials], table


def cost_table(
    phases: Sequence[PhaseCost], networks: Mapping[str, Network], step_seconds: float | None
) -> tuple[dict[str, Any], Table]:
    """The estimated communication of each phase, and its duration over a network, as values and as a table.

    Args:
        phases: from ``fedlora.runs.cost.costs``.
        networks: networks by tier's name; if empty, durations are omitted.
        step_seconds: duration of a client's optimiser step; if None, the longest measured turn is used.
    """
    # a table that fits the width of a terminal
    last = ["round takes", "all take"] if networks else ["round down", "round up"]
    names = ("phase", "rounds", "one client down", "one client up", *last, "all down", "all up")
    table = Table(*(Column(name, justify="right") for name in names))
    values: list[dict[str, Any]] = []
    for number, phase in enumerate(phases):
        down, up = phase.round_bytes
        one = (sum(phase.down_bytes.values()), sum(phase.up_bytes.values()))
        middle = list(map(human_bytes, (down, up)))
        value: dict[str, Any] = {
            "tuning": phase.tuning,
            "rounds": phase.rounds,
            "clients": phase.clients,
            "first_client_down_bytes": phase.first_bytes,
            "client_down_bytes": phase.down_bytes,
            "client_up_bytes": phase.up_bytes,
            "round_down_bytes": down,
            "round_up_bytes": up,
        }
        if networks:
            value["round_seconds"] = phase.round_seconds(networks, step_seconds)
            middle = [human_seconds(value["round_seconds"]), human_seconds(phase.rounds * value["round_seconds"])]
        ends = map(human_bytes, phase.all_bytes)
        table.add_row(f"{number} {phase.tuning}", str(phase.rounds), *map(human_bytes, one), *middle, *ends)
        for name, tier in phase.tiers.items() if "" not in phase.tiers else ():
            own: dict[str, float] = {
                "client_down_bytes": round(tier.down_bytes),
                "client_up_bytes": round(tier.up_bytes),
            }
            takes = ""
            if networks:
                own["round_seconds"] = phase.tier_seconds(name, networks, step_seconds)
                takes = human_seconds(own["round_seconds"])
            sizes = (human_bytes(own[key]) for key in ("client_down_bytes", "client_up_bytes"))
            table.add_row(escape(f"  tier {name}"), "", *sizes, takes, "", "", "")
            value.setdefault("tiers", {})[name] = own
        values.append(value)
    totals = [sum(phase.all_bytes[way] for phase in phases) for way in (0, 1)]
    whole: dict[str, Any] = {"phases": values, "down_bytes": totals[0], "up_bytes": totals[1]}
    takes = ""
    if networks:
        whole["seconds"] = sum(value["rounds"] * value["round_seconds"] for value in values)
        takes = human_seconds(whole["seconds"])
    if len(phases) > 1:
        rounds = str(sum(phase.rounds for phase in phases))
        table.add_row("all", rounds, "", "", "", takes, *map(human_bytes, totals))
    return whole, table


def result_table(result: Result) -> Table:
    """The results of one run as a table."""
    table = Table(Column(), Column(justify="right"), show_header=False)
    for name, value in result.after.items():
        before = f"{result.before[name]:.4f} -> " if name in result.before else ""
        table.add_row(name, f"{before}{value:.4f}")
    for direction, kinds in (("down", result.down_bytes), ("up", result.up_bytes)):
        parts = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in kinds.items() if size)
        table.add_row(
            f"bytes {direction}", f"{human_bytes(sum(kinds.values()))}  ({parts})" if kinds else "nothing sent"
        )
    table.add_row("seconds", f"{result.seconds:.0f}")
    table.add_row("run", escape(str(result.folder)))
    if result.adapter:
        table.add_row("adapter", escape(str(result.adapter)))
    return table

"""Commands that use a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedlora.cli.common import ERR, OUT, AsFormat, Format, RunPath, run_of, show
from fedlora.core.errors import ConfigError

GROUP = "Use a run"


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(rich_help_panel=GROUP)(predict)
    app.command(rich_help_panel=GROUP)(evaluate)
    app.command(rich_help_panel=GROUP)(export)


def predict(
    run: RunPath,
    text: Annotated[str, typer.Argument(help="An input (a text, for most tasks), or a file with one per line.")],
    format_: AsFormat = Format.table,
) -> None:
    """Print a run's predictions for a text, or for other inputs of its task."""
    from fedlora.runs.inference import read_inputs

    inputs = read_inputs(text)
    found = run_of(run).predict(inputs)
    table = Table("input", "answer", "", "next")
    for one, answer in zip(inputs, found, strict=True):
        first, *rest = [
            (name, f"{value:.3g}" if isinstance(value, float) else str(value)) for name, value in answer.items()
        ] or [("", "")]
        cells = (one if len(one) < 60 else one[:57] + "...", *first, ", ".join(" ".join(pair) for pair in rest[:2]))
        table.add_row(*map(Text, cells))
    show(format_, [{"input": one, "answer": answer} for one, answer in zip(inputs, found, strict=True)], table)


def evaluate(
    run: RunPath,
    data: Annotated[Path | None, typer.Option(help="A csv, tsv, json, jsonl or parquet file, maybe with .gz.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("-c", "--column", help="use=name: what a column of the task is called there.")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="In place of --data: tasks of lm-evaluation-harness, separated by commas.")
    ] = None,
    tasks_from: Annotated[
        Path | None, typer.Option(help="A folder of tasks (YAML), in place of the harness's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most rows of each task of the harness.")] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Evaluate a run's model on the rows of a file, or on tasks of lm-evaluation-harness."""
    if data is not None and harness is None:
        if tasks_from is not None or limit is not None:
            raise ConfigError("--tasks-from and --limit are for --harness; leave them out with --data")
        _on_file(run, data, column or [], format_)
    elif data is None and harness is not None:
        if column:
            raise ConfigError("--column is for the columns of --data; the tasks of --harness name their own")
        _on_harness(run, harness, tasks_from, limit, format_)
    else:
        raise ConfigError("evaluate reads the rows of --data FILE or the tasks of --harness TASKS: give one of the two")


def _on_file(run: Path, data: Path, columns: list[str], format_: Format) -> None:
    wrong = [one for one in columns if "=" not in one]
    if wrong:
        raise ConfigError(f"--column {wrong[0]!r} is not of the form use=name, as in --column text=body")
    found = run_of(run).evaluate(data, dict(one.split("=", 1) for one in columns))
    table = Table("metric", "value")
    for name, value in found.metrics.items():
        table.add_row(name, f"{value:.4f}")
    show(format_, {**found.metrics, "warnings": list(found.warnings)}, table)
    for warning in found.warnings:
        ERR.print(warning, style="yellow", markup=False)


def _on_harness(run: Path, tasks: str, folder: Path | None, limit: int | None, format_: Format) -> None:
    from fedlora.runs.harness import harness

    scores = harness(run_of(run), tasks.split(","), folder, limit=limit)
    table = Table("task", "metric", "filter", "value", "standard error")
    for one in scores:
        error = "" if one.stderr is None else f"{one.stderr:.4f}"
        table.add_row(*map(Text, (one.task, one.metric, one.filter, f"{one.value:.4f}", error)))
    show(format_, [one._asdict() for one in scores], table)


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="A whole model that needs no peft.")] = False,
) -> None:
    """Export a run's adapter for `peft`, or the merged model."""
    run_of(run).export(out, merge)
    OUT.print(f"written to {out}", markup=False, soft_wrap=True, highlight=False)

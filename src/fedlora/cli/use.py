"""Commands that use a trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedlora.cli.common import ERR, OUT, AsFormat, Format, RunPath, run_of, show
from fedlora.core.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.runs.inference import TrainedRun
    from fedlora.tasks.data.opening import Reading

GROUP = "Use a run"

Columns = Annotated[
    list[str] | None, typer.Option("-c", "--column", help="use=name: what a column of the task is called there.")
]
DelimiterOption = Annotated[
    str | None, typer.Option("--delimiter", help="Between the fields of a csv or tsv; otherwise the run's.")
]
EncodingOption = Annotated[
    str | None, typer.Option("--encoding", help="Of a text file, such as latin-1; otherwise the run's.")
]


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(rich_help_panel=GROUP)(predict)
    app.command(rich_help_panel=GROUP)(evaluate)
    app.command(rich_help_panel=GROUP)(export)


def predict(
    run: RunPath,
    text: Annotated[str, typer.Argument(help="An input, a data file, a text file with one per line, or - for stdin.")],
    column: Columns = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
    format_: AsFormat = Format.table,
) -> None:
    """Print a run's predictions for a text, or for other inputs of its task."""
    from fedlora.runs.inputs import read_inputs

    names = _names(column)
    trained = run_of(run)
    inputs = read_inputs(text, trained.task, names, _reading(trained, delimiter, encoding))
    found = trained.predict(inputs)
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
    data: Annotated[Path, typer.Option(help="A file that data.train may name, such as csv, jsonl or parquet.")],
    column: Columns = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
    format_: AsFormat = Format.table,
) -> None:
    """Evaluate a run's model on the rows of a file."""
    names = _names(column)
    trained = run_of(run)
    found = trained.evaluate(data, names, _reading(trained, delimiter, encoding))
    table = Table("metric", "value")
    for name, value in found.metrics.items():
        table.add_row(name, f"{value:.4f}")
    show(format_, {**found.metrics, "warnings": list(found.warnings)}, table)
    for warning in found.warnings:
        ERR.print(warning, style="yellow", markup=False)


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="A whole model that needs no peft.")] = False,
) -> None:
    """Export a run's adapter for `peft`, or the merged model."""
    run_of(run).export(out, merge)
    OUT.print(f"written to {out}", markup=False, soft_wrap=True, highlight=False)


def _names(column: list[str] | None) -> dict[str, str]:
    """The names of columns by their use.

    Raises:
        ConfigError: one is not of the form ``use=name``.
    """
    wrong = [one for one in column or [] if "=" not in one]
    if wrong:
        raise ConfigError(f"--column {wrong[0]!r} is not of the form use=name, as in --column text=body")
    return dict(one.split("=", 1) for one in column or [])


def _reading(trained: TrainedRun, delimiter: str | None, encoding: str | None) -> Reading:
    """How files are read: as those of the run, unless an option says otherwise."""
    known = trained.reading
    return replace(known, delimiter=delimiter or known.delimiter, encoding=encoding or known.encoding)

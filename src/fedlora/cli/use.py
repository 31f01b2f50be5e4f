"""Commands that use a trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedlora.cli.common import OUT, AsFormat, Format, RunPath, run_of, show
from fedlora.cli.log import bar
from fedlora.core.errors import ConfigError
from fedlora.core.progress import LOG

if TYPE_CHECKING:
    from fedlora.runs.inference import TrainedRun
    from fedlora.tasks.data.opening import Reading

GROUP = "Use a run"

Columns = Annotated[
    list[str] | None, typer.Option("-c", "--column", help="use=name: the name in the file of a column of the task.")
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
    app.command(rich_help_panel=GROUP)(push)


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
    with bar("predicting"):
        found = trained.predict(inputs)
    table = Table("input", "answer", "", "next")
    for one, answer in zip(inputs, found, strict=True):
        first, *rest = [_cells(name, value) for name, value in answer.items()] or [("", "")]
        cells = (one if len(one) < 60 else one[:57] + "...", *first, ", ".join(" ".join(pair) for pair in rest[:2]))
        table.add_row(*map(Text, cells))
    show(format_, [{"input": one, "answer": answer} for one, answer in zip(inputs, found, strict=True)], table)


def _cells(name: str, value: Any) -> tuple[str, str]:
    """An item of an answer: a class with its probability, or a text or entities, whose name says nothing more."""
    if isinstance(value, str):
        return value, ""
    if name == "entities" and isinstance(value, list):
        return ", ".join(f"{one['text']} ({one['type']})" for one in value) or "none", ""
    return name, f"{value:.3g}" if isinstance(value, float) else str(value)


def evaluate(
    run: RunPath,
    data: Annotated[
        Path | None, typer.Option(help="A file that data.train may name, such as csv, jsonl or parquet.")
    ] = None,
    column: Columns = None,
    delimiter: DelimiterOption = None,
    encoding: EncodingOption = None,
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
    if (data is None) == (harness is None):
        raise ConfigError("evaluate reads the rows of --data FILE or the tasks of --harness TASKS: give one of the two")
    if data is None:
        if column or delimiter or encoding:
            raise ConfigError("--column, --delimiter and --encoding are for --data; leave them out with --harness")
        _on_harness(run, str(harness), tasks_from, limit, format_)
        return
    if tasks_from is not None or limit is not None:
        raise ConfigError("--tasks-from and --limit are for --harness; leave them out with --data")
    names = _names(column)
    trained = run_of(run)
    with bar("evaluating"):
        found = trained.evaluate(data, names, _reading(trained, delimiter, encoding))
    table = Table("metric", "value")
    for name, value in found.metrics.items():
        table.add_row(name, f"{value:.4f}")
    show(format_, {**found.metrics, "warnings": list(found.warnings)}, table)
    for warning in found.warnings:
        LOG.warning("warning: %s", warning)


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
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model, which loads without peft.")] = False,
) -> None:
    """Export a run's adapter for `peft`, or the merged model."""
    run_of(run).export(out, merge)
    OUT.print(f"written to {out}", markup=False, soft_wrap=True, highlight=False)


def push(
    run: RunPath,
    name: Annotated[str, typer.Argument(help="The repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, created if it does not exist; else main.")] = None,
) -> None:
    """Upload a finished run's adapter or model to the Hugging Face Hub; HF_TOKEN holds the access token."""
    from fedlora.runs.push import send, to_upload

    upload = to_upload(run)
    where = name + (f" (branch {revision})" if revision else "") + (", private" if private else "")
    print(f"{upload.folder} -> {where}")
    for path, size in upload.sizes.items():
        print(f"{size:>15,}  {path}")
    OUT.print(f"uploaded as {send(upload, name, private, revision)}", markup=False, soft_wrap=True, highlight=False)


def _names(column: list[str] | None) -> dict[str, str]:
    """The names of columns by their use.

    Raises:
        ConfigError: one is not of the form ``use=name``.
    """
    wrong = [one for one in column or [] if not all(one.partition("="))]
    if wrong:
        raise ConfigError(f"--column {wrong[0]!r} is not of the form use=name, as in --column text=body")
    return dict(one.split("=", 1) for one in column or [])


def _reading(trained: TrainedRun, delimiter: str | None, encoding: str | None) -> Reading:
    """How files are read: as those of the run, unless an option says otherwise."""
    known = trained.reading
    return replace(known, delimiter=delimiter or known.delimiter, encoding=encoding or known.encoding)

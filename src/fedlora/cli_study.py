"""The commands that tune settings and compare methods, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedlora.errors import ConfigError
from fedlora.terminal import ERR, OUT, AsFormat, ConfigPath, Format, Overrides, show

if TYPE_CHECKING:
    from fedlora.study import Tuned

Jobs = Annotated[int | None, typer.Option(min=1, help="Processes at a time; one for each core by default.")]
Budget = Annotated[str | None, typer.Option(help="Time after which nothing new begins: 45s, 90m, 2h.")]


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the others."""
    app.command()(tune)


def progress(text: str) -> None:
    """Prints a line beside the results."""
    ERR.print(text, markup=False, highlight=False, soft_wrap=True, style="dim")


def tune(
    config: ConfigPath,
    vary: Annotated[
        list[str], typer.Option("--vary", help="key=value,value or key=low..high; once for each key to tune.")
    ],
    set_: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try at most.")] = 8,
    budget: Budget = None,
    jobs: Jobs = None,
    holdout: Annotated[float, typer.Option(help="Part of the training data to compare by.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="Folder of the trials; goes on where it holds some.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample of settings and of the held-out part.")] = 0,
    format_: AsFormat = Format.table,
) -> None:
    """Find the best learning rates, or any settings, by successive halving on held-out training data."""
    from fedlora import study
    from fedlora.config import document_of, parse
    from fedlora.study.space import parse_vary
    from fedlora.study.tuning import seconds_of

    document = document_of(config, set_ or [])
    folder = out or Path("runs") / f"tune-{parse(document).label}"
    found = study.tune(
        document,
        parse_vary(vary),
        folder,
        trials=trials,
        holdout=holdout,
        seed=seed,
        jobs=jobs,
        budget=seconds_of(budget),
        tell=progress,
    )
    show(format_, found.as_dict(), _trials_table(found))
    for warning in found.warnings:
        ERR.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if found.best is None:
        raise ConfigError(f"no trial gave a figure; the first one: {found.trials[0].failure or 'never began'}")
    if format_ is Format.table:
        OUT.print(f"the best of them: fedlora run {folder / 'best.toml'}", soft_wrap=True, highlight=False)


def _trials_table(found: Tuned) -> Table:
    from fedlora.study.pool import shown

    keys = list(found.trials[0].values)
    table = Table(
        *keys, *(f"{found.metric or 'metric'}, round {round_}" for round_ in found.rounds), "", pad_edge=False
    )
    for trial in found.trials:
        cells = [f"{trial.metrics[round_]:.4f}" if round_ in trial.metrics else "" for round_ in found.rounds]
        remark = trial.failure or ("best" if trial.values == found.best else "")
        table.add_row(*map(Text, [*(shown(trial.values[key]) for key in keys), *cells, remark]))
    return table

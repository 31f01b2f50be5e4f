"""Commands that tune settings and compare methods."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedlora.cli.common import OUT, AsFormat, ConfigPath, Format, Overrides, show
from fedlora.cli.compare import GROUP
from fedlora.core.errors import ConfigError
from fedlora.core.progress import LOG

if TYPE_CHECKING:
    from fedlora.study import Tuned

Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Number of parallel processes; by default one per GPU, or per core without one."),
]
Budget = Annotated[str | None, typer.Option(help="Time after which no new run starts: 45s, 90m, 2h.")]


class Stage(StrEnum):
    """Parts of a study that can be run on their own."""

    tune = "tune"
    final = "final"
    table = "table"


class TableFormat(StrEnum):
    """Output formats of tables."""

    markdown = "markdown"
    csv = "csv"
    latex = "latex"


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(rich_help_panel=GROUP)(tune)
    app.command(rich_help_panel=GROUP)(study)


def tune(
    config: ConfigPath,
    vary: Annotated[
        list[str], typer.Option("--vary", help="key=value,value or key=low..high; once for each key to tune.")
    ],
    set_: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Maximum number of settings to try.")] = 8,
    budget: Budget = None,
    jobs: Jobs = None,
    holdout: Annotated[float, typer.Option(help="Share of the training data held out to compare by.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="Folder of the trials; resumes if it holds some.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample of settings and of the held-out part.")] = 0,
    format_: AsFormat = Format.table,
) -> None:
    """Find the best learning rates, or any settings, by successive halving on held-out training data."""
    from fedlora import study
    from fedlora.config import document_of, folder_name, load
    from fedlora.study.space import parse_vary
    from fedlora.study.tuning import seconds_of

    document = document_of(config, set_ or [])
    folder = out or Path("runs") / f"tune-{folder_name(load(config, set_ or []).label)}"
    found = study.tune(
        document,
        parse_vary(vary),
        folder,
        trials=trials,
        holdout=holdout,
        seed=seed,
        jobs=jobs,
        budget=seconds_of(budget),
        log=LOG.info,
    )
    show(format_, found.as_dict(), _trials_table(found))
    for warning in found.warnings:
        LOG.warning("warning: %s", warning)
    if found.best is None:
        raise ConfigError(f"no trial has a result; the first one: {found.trials[0].failure or 'never started'}")
    if format_ is Format.table:
        OUT.print(
            f"the best of them: fedlora run {folder / 'best.toml'}", markup=False, soft_wrap=True, highlight=False
        )


def study(
    file: Annotated[Path, typer.Argument(help="A study in TOML or YAML; or a results.json, to print its tables.")],
    jobs: Jobs = None,
    budget: Budget = None,
    stage: Annotated[Stage | None, typer.Option(help="Run this stage only; table runs nothing.")] = None,
    only: Annotated[str | None, typer.Option(help="Methods to run, separated by commas; all by default.")] = None,
    table: Annotated[TableFormat, typer.Option(help="Format of the tables.")] = TableFormat.markdown,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs and of results.json; resumes there.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write figures as SVG and PDF into this folder: metric by bytes, by round.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count runs and rounds without running them.")] = False,
) -> None:
    """Compare methods over settings and seeds, each tuned alike on held-out data, and print tables."""
    from fedlora.show.figures import check_installed
    from fedlora.study import FORMATS, load_study, run_study
    from fedlora.study.results import read
    from fedlora.study.runner import Runner
    from fedlora.study.tuning import seconds_of

    if file.suffix == ".json":
        of_runs = {"--jobs": jobs, "--budget": budget, "--only": only, "--out": out, "--dry-run": dry_run or None}
        _check_only_read(file, stage, [option for option, value in of_runs.items() if value is not None])
        _write_figures(read(file), figures)
        print(FORMATS[table.value](read(file)))
        return
    if figures is not None:
        check_installed()
    chosen = load_study(file)
    folder = out or Path("runs") / chosen.name
    methods = [label.strip() for label in only.split(",")] if only else []
    if dry_run:
        _print_left(Runner(chosen, folder, methods).left(), jobs)
        return
    part = stage.value if stage else None
    found = run_study(chosen, folder, stage=part, only=methods, jobs=jobs, budget=seconds_of(budget), log=LOG.info)
    _write_figures(found, figures)
    print(FORMATS[table.value](found))
    for sentence in found["broken_gates"]:
        LOG.warning("warning: %s", sentence)
    LOG.info("all results: %s", folder / "results.json")


def _check_only_read(file: Path, stage: Stage | None, options: list[str]) -> None:
    if stage is not Stage.table:
        raise ConfigError(f"{file} holds results, not a study: add --stage table to print its tables")
    if options:
        raise ConfigError(
            f"{file} holds results, whose tables --stage table prints, and {options[0]} is for runs: leave it out, "
            "or name the study's own file"
        )


def _write_figures(results: Mapping[str, Any], folder: Path | None) -> None:
    """Writes the figures of a study, unless no folder is given."""
    from fedlora.show.curves import study_figures
    from fedlora.show.figures import save

    if folder is None:
        return
    for name, figure in study_figures(results).items():
        save(figure, folder, name)


def _print_left(left: dict[str, Any], jobs: int | None) -> None:
    from fedlora.show.report import human_seconds
    from fedlora.study.pool import processes_for

    for stage, text in (("tune", "tunings (of several trials each)"), ("final", "final runs")):
        OUT.print(f"{left[stage]['runs']} {text} are left, {left[stage]['rounds']:,} rounds", highlight=False)
    if left["seconds"]:
        processes = processes_for(jobs)
        unknown = f", without {', '.join(left['not_timed'])}" if left["not_timed"] else ""
        takes = human_seconds(left["seconds"] / processes)
        OUT.print(f"about {takes} with {processes} processes{unknown}, estimated from the runs so far", highlight=False)


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

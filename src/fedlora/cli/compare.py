"""Commands that compare runs: finished ones, or the trials of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.common import (
    OUT,
    AsFormat,
    ConfigPath,
    Format,
    LinkText,
    Overrides,
    callbacks_of,
    experiment_of,
    show,
    write_page,
)
from fedlora.core.errors import ConfigError

GROUP = "Tune and compare"


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(rich_help_panel=GROUP)(compare)
    app.command(rich_help_panel=GROUP)(report)
    app.command(rich_help_panel=GROUP)(search)


def search(
    config: ConfigPath,
    kilobytes: Annotated[float, typer.Option(help="The budget: kB per client and round, both directions.")],
    set_: Overrides = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank to start at.")] = 1,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="Density to start at.")] = 1 / 16,
    factor: Annotated[int, typer.Option(min=2, help="Factor on rank or density in a step.")] = 4,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank to try.")] = 64,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the training data to compare on; 0: the test data.")
    ] = 0.1,
    out: Annotated[Path, typer.Option(help="Folder of the trials; resumes if it holds some.")] = Path("runs/search"),
    format_: AsFormat = Format.table,
) -> None:
    """Find the best rank and density under a communication budget, by short runs in pairs (FLASC-Search)."""
    from fedlora.runs.search import Bounds
    from fedlora.runs.search import search as climb
    from fedlora.show.report import search_table

    experiment, _ = experiment_of(config, set_, None)
    bounds = Bounds(rank, density, factor, 1e3 * kilobytes, max_rank)
    trials = climb(experiment, out, bounds, holdout=holdout, callbacks=callbacks_of(out, None))
    values, table = search_table(trials)
    show(format_, values, table)
    if format_ is Format.table:
        OUT.print(
            f"the best one kept: fedlora run {out / 'best.toml'} -s phases.0.rounds=...",
            markup=False,
            soft_wrap=True,
            highlight=False,
        )


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    link: LinkText = None,
    target: Annotated[
        float | None, typer.Option(help="A value of the metric, to report how long each method takes to reach it.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="The metric to compare by; the main metric by default.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report of these runs into this file.")] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: unrounded, a row for each method and metric.")
    ] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX tabular for booktabs.")] = False,
    format_: AsFormat = Format.table,
) -> None:
    """Compare finished runs, averaged over the seeds of a method; with --target, also the time to reach it."""
    from fedlora.core.network import parse_network
    from fedlora.show.compare import comparison, comparison_csv, comparison_latex, comparison_table, load_result
    from fedlora.show.run_report import report as report_on

    if link is not None and target is None:
        raise ConfigError("--link is for --target: the time over that network until the metric reaches it")
    if metric is not None and target is not None:
        raise ConfigError(
            "--target is a value of the main metric; leave --metric out, or compare by it without --target"
        )
    if as_csv + as_latex + (format_ is not Format.table) > 1:
        raise ConfigError("--csv, --latex and --format json are forms of the same table; give one of them")
    reached = None if target is None else (parse_network(link) if link else None, target)
    rows = comparison([load_result(path) for path in runs], reached, metric)
    if html is not None:
        write_page(html, report_on(runs)[0])
    if as_csv or as_latex:
        print(comparison_csv(rows) if as_csv else comparison_latex(rows))
    else:
        show(format_, rows, comparison_table(rows))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs; seeds of a method share its label.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure as SVG and PDF into this folder.")
    ] = None,
) -> None:
    """Write a report on runs as one HTML page: results, differences, curves, bytes, clients, events, partition."""
    from fedlora.show.figures import save
    from fedlora.show.run_report import report as report_on

    page, sections = report_on(runs)
    write_page(out, page)
    OUT.print(f"the report: {out}", soft_wrap=True, highlight=False, markup=False)
    if figures is not None:
        for section in sections:
            for name, figure in section.figures.items():
                save(figure, figures, name)
        OUT.print(f"its figures: {figures}", soft_wrap=True, highlight=False, markup=False)

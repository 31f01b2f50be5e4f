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
    app.command(rich_help_panel=GROUP)(search)


def search(
    config: ConfigPath,
    kilobytes: Annotated[float, typer.Option(help="The budget: kB per client and round, both directions.")],
    set_: Overrides = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank to start at.")] = 1,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="Density to start at.")] = 1 / 16,
    factor: Annotated[int, typer.Option(min=2, help="Factor on rank or density in a step.")] = 4,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank to try.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the trials; resumes if it holds some.")] = Path("runs/search"),
    format_: AsFormat = Format.table,
) -> None:
    """Find the best rank and density under a communication budget, by short runs in pairs (FLASC-Search)."""
    from fedlora.runs.search import Bounds
    from fedlora.runs.search import search as climb
    from fedlora.show.report import search_table

    experiment, _ = experiment_of(config, set_, None)
    bounds = Bounds(rank, density, factor, 1e3 * kilobytes, max_rank)
    trials = climb(experiment, out, bounds, callbacks=callbacks_of(out, None))
    values, table = search_table(trials)
    show(format_, values, table)
    if format_ is Format.table:
        OUT.print(
            f"the best one kept: fedlora run {out / 'best.toml'} -s phases.0.rounds=...",
            soft_wrap=True,
            highlight=False,
        )


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    link: LinkText = None,
    target: Annotated[
        float | None, typer.Option(help="A value of the main metric; reports the time of each run to reach it.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also plot the metric by round and by bytes into this file.")
    ] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Compare finished runs, averaged over the seeds of a method; with --target, also the time to reach it."""
    from fedlora.core.network import parse_network
    from fedlora.show.plots import comparison_html
    from fedlora.show.report import comparison, comparison_table, load_result

    if link is not None and target is None:
        raise ConfigError("--link is for --target: the time over that network until the metric reaches it")
    reached = None if target is None else (parse_network(link) if link else None, target)
    rows = comparison([load_result(path) for path in runs], reached)
    if html is not None:
        write_page(html, comparison_html(rows))
    show(format_, rows, comparison_table(rows))

"""Commands that inspect a configuration without a full training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedlora.cli.common import OUT, AsFormat, ConfigPath, Format, LinkText, Overrides, experiment_of, write_page
from fedlora.cli.common import show as show_result
from fedlora.cli.log import bar
from fedlora.core.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.show.describe import PhaseFacts

GROUP = "Plan"


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(rich_help_panel=GROUP)(show)
    app.command(rich_help_panel=GROUP)(partition)
    app.command(rich_help_panel=GROUP)(cost)


def show(
    config: ConfigPath,
    set_: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="All settings, and each trained tensor.")] = False,
    format_: AsFormat = Format.table,
) -> None:
    """Print the settings that differ from the defaults, and what each phase trains; with --full everything."""
    from dataclasses import asdict

    import tomli_w

    from fedlora.config import resolved, to_toml
    from fedlora.config.essential import essential
    from fedlora.config.federated_data import in_mode, prepare
    from fedlora.config.reading import read_configuration
    from fedlora.show.describe import phase_facts

    experiment, _ = experiment_of(config, set_, None)
    document = read_configuration(config, set_ or [])
    differs = essential(document.values)
    differs.pop("root", None)
    facts = phase_facts(experiment, prepare(in_mode(experiment)).task)
    if format_ is Format.json:
        phases = [asdict(fact) for fact in facts]
        OUT.print_json(json.dumps({"config": resolved(experiment), "differs": differs, "phases": phases}))
        return
    if full:
        print(to_toml(experiment))
    else:
        print("# settings that differ from their defaults; all settings: --full")
        print(tomli_w.dumps(differs))
    for file in dict.fromkeys(document.origins.values()):
        print(f"# {file}: {', '.join(key for key, place in document.origins.items() if place == file)}")
    for number, fact in enumerate(facts):
        _print_phase(number, fact, full)


def _print_phase(number: int, fact: PhaseFacts, full: bool) -> None:
    from fedlora.show.describe import HOLDS

    trained = sum(fact.trainable.values())
    groups = ", ".join(f"{group} {count:,}" for group, count in fact.trainable.items())
    OUT.print(
        f"[bold]phase {number}[/bold]: {fact.tuning}, {fact.rounds} rounds; {trained:,} of {fact.total:,} numbers "
        f"are trained ({trained / fact.total:.2%}): {groups}"
    )
    OUT.print(f"  aggregation holds {fact.held_bytes / 1e6:.1f} MB on the server: {HOLDS[fact.needs]}")
    if not full:
        OUT.print(f"  {len(fact.tensors)} tensors; --full lists them", highlight=False)
        return
    for name, shape in fact.tensors.items():
        OUT.print(f"  {name}  {' x '.join(map(str, shape)) or 'scalar'}", highlight=False)


def partition(
    config: ConfigPath,
    set_: Overrides = None,
    html: Annotated[Path | None, typer.Option(help="Also plot the classes of every client into this file.")] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Show how the data are partitioned among clients: sizes, skew, and a plot by the classes of clients.skew."""
    from fedlora.config.federated_data import in_mode, prepare
    from fedlora.runs.partition import partition_record
    from fedlora.show.page import page
    from fedlora.show.plots import partition_bars
    from fedlora.show.run_report import partition_section

    experiment, _ = experiment_of(config, set_, None)
    with bar("partitioning"):
        data = prepare(in_mode(experiment))
    labels, names = data.classes
    summary = data.summary().as_dict()
    if html is not None:
        section = partition_section([partition_record(experiment, data)])
        write_page(html, page("Partition", f"{len(data.population)} clients", [section]))
    table = Table(show_header=False)
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    show_result(format_, summary, table)
    if format_ is Format.table:
        OUT.print(partition_bars(data.population, labels, names))


def cost(
    config: ConfigPath,
    set_: Overrides = None,
    link: LinkText = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds of a client's step, for the time over a network. Measured on this machine by default.",
        ),
    ] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Estimate a run's communication from real messages of its first rounds; with a network, also its duration."""
    from fedlora.config.federated_data import in_mode, prepare
    from fedlora.runs.cost import costs
    from fedlora.show.report import cost_table

    experiment, _ = experiment_of(config, set_, None)
    networks = experiment.clients.networks(link or "")
    if step_seconds is not None and not networks:
        raise ConfigError("--step-seconds is for the time over a network; name one with --link or clients.network")
    effective = in_mode(experiment)
    data = prepare(effective)
    with bar("first rounds"):
        phases = costs(effective, data)
    values, table = cost_table(phases, networks, step_seconds)
    show_result(format_, values, table)

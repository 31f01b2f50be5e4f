"""Commands for getting started: listing the available choices, and printing a configuration to start from."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from fedlora.cli.common import AsFormat, Format, show

GROUP = "Begin"


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(rich_help_panel=GROUP)(new)
    app.command("list", rich_help_panel=GROUP)(list_)
    app.command(rich_help_panel=GROUP)(schema)
    app.command(rich_help_panel=GROUP)(env)


def list_(
    slot: Annotated[str | None, typer.Argument(help="A slot, or refusals; all slots by default.")] = None,
    format_: AsFormat = Format.table,
) -> None:
    """List the slots, the values of one slot with their settings, or `refusals`: unsupported combinations."""
    from fedlora.recipe.refusals import REFUSALS
    from fedlora.show.describe import SLOTS

    if slot == "refusals":
        table = Table(slot, "reason and fix")
        for sentence in REFUSALS.items():
            table.add_row(*map(Text, sentence))
        show(format_, REFUSALS, table)
    elif slot is None:
        table = Table("slot", "values")
        for name, values in SLOTS.items():
            table.add_row(name, ", ".join(values))
        show(format_, {name: list(values) for name, values in SLOTS.items()}, table)
    else:
        _list_slot(slot, format_)


def _list_slot(slot: str, format_: Format) -> None:
    from dataclasses import asdict

    from fedlora.show.describe import choices, values_of
    from fedlora.show.settings import settings_of

    rows = []
    table = Table(Column(slot, no_wrap=True), "values", "default", "description")
    for kind, text, names in choices(slot):
        settings = settings_of(kind, values_of(slot)[kind])
        rows.append({"kind": kind, "text": text, "settings": names, "arguments": [asdict(one) for one in settings]})
        table.add_section()
        table.add_row(Text(kind, style="bold"), "", "", Text(text, style="bold"))
        for one in settings:
            table.add_row(*map(Text, (f"  {one.name}", one.type, one.default_text, one.text)))
    show(format_, rows, table)


def new(method: Annotated[str, typer.Argument(help="A method; `fedlora list method` lists them.")]) -> None:
    """Print a configuration to start from: fedlora new flasc > run.toml."""
    from fedlora.config.template import template

    print(template(method), end="")


def schema() -> None:
    """Print the JSON Schema of configurations, for editors: fedlora schema > fedlora.schema.json."""
    from fedlora.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=1))


def env(format_: AsFormat = Format.table) -> None:
    """Print versions, devices and folders, for a bug report."""
    from fedlora.show.describe import environment

    facts = environment()
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(value))
    show(format_, facts, table)

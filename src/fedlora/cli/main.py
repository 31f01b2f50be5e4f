"""The command line. Everything heavy is imported inside the commands, so that help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedlora.cli import federation as cli_federation
from fedlora.cli import study as cli_study
from fedlora.cli.common import (
    ERR,
    OUT,
    AsFormat,
    ConfigPath,
    Format,
    LinkText,
    Overrides,
    RunOut,
    RunPath,
    Tracks,
    callbacks_of,
    experiment_of,
    folder_of,
    import_settings,
    run_of,
    write_page,
)
from fedlora.cli.common import show as show_result
from fedlora.core.errors import ConfigError, FedloraError

if TYPE_CHECKING:
    from fedlora.config import Experiment
    from fedlora.config.federated_data import FederatedData
    from fedlora.runs.result import Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of Hugging Face models with low-rank adapters, in as few bytes as possible.",
)


@app.callback()
def _common(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works anywhere.")] = False) -> None:
    if "--help" not in sys.argv:
        import_settings()


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    out: RunOut = None,
    engine: Annotated[str, typer.Option(help="Where clients run: serial, or flower-simulation.")] = "serial",
    track: Tracks = None,
    format_: AsFormat = Format.table,
) -> None:
    """Run an experiment, or go on with one."""
    from fedlora.show.report import as_dict, result_table

    experiment, folder = experiment_of(config, set_, out)
    result = _run(experiment, folder, track, engine=engine)
    show_result(format_, as_dict(result), result_table(result))


@app.command()
def show(config: ConfigPath, set_: Overrides = None, format_: AsFormat = Format.table) -> None:
    """Print the resolved configuration, what is trained, and which modules were matched."""
    from dataclasses import asdict

    from fedlora.config import resolved, to_toml
    from fedlora.config.federated_data import in_mode, prepare
    from fedlora.show.describe import HOLDS, phase_facts

    experiment, _ = experiment_of(config, set_, None)
    facts = phase_facts(experiment, prepare(in_mode(experiment)).task)
    if format_ is Format.json:
        phases = [asdict(fact) for fact in facts]
        OUT.print_json(json.dumps({"config": resolved(experiment), "phases": phases}))
        return
    print(to_toml(experiment))
    for number, fact in enumerate(facts):
        trained = sum(fact.trainable.values())
        groups = ", ".join(f"{group} {count:,}" for group, count in fact.trainable.items())
        OUT.print(
            f"[bold]phase {number}[/bold]: {fact.tuning}, {fact.rounds} rounds; {trained:,} of {fact.total:,} numbers "
            f"are trained ({trained / fact.total:.2%}): {groups}"
        )
        OUT.print(f"  aggregation holds {fact.held_bytes / 1e6:.1f} MB on the server: {HOLDS[fact.needs]}")
        for name, shape in fact.tensors.items():
            OUT.print(f"  {name}  {' x '.join(map(str, shape)) or 'scalar'}", highlight=False)


@app.command()
def cost(
    config: ConfigPath,
    set_: Overrides = None,
    link: LinkText = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds of a client's step, over a network. Measured here by default."),
    ] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Tell the bytes of a run before it is trained, from real messages of its first rounds; over a network its time."""
    from fedlora.config.federated_data import in_mode, prepare
    from fedlora.runs.cost import costs
    from fedlora.show.report import cost_table

    experiment, _ = experiment_of(config, set_, None)
    networks = experiment.clients.networks(link or "")
    if step_seconds is not None and not networks:
        raise ConfigError("--step-seconds is for the time over a network; name one with --link or clients.network")
    effective = in_mode(experiment)
    values, table = cost_table(costs(effective, prepare(effective)), networks, step_seconds)
    show_result(format_, values, table)


@app.command("list")
def list_(slot: Annotated[str | None, typer.Argument()] = None, format_: AsFormat = Format.table) -> None:
    """List the slots, the values of one slot with their settings, or `refusals`: combinations that are refused."""
    from fedlora.recipe.refusals import REFUSALS
    from fedlora.show.describe import SLOTS, choices

    if slot == "refusals":
        table = Table(slot, "why, and what to do")
        for sentence in REFUSALS.items():
            table.add_row(*map(Text, sentence))
        show_result(format_, REFUSALS, table)
        return
    if slot is None:
        table = Table("slot", "values")
        for name, values in SLOTS.items():
            table.add_row(name, ", ".join(values))
        show_result(format_, {name: list(values) for name, values in SLOTS.items()}, table)
        return
    rows = choices(slot)
    table = Table(slot, "what it is", "settings")
    for row in rows:
        table.add_row(*map(Text, row))
    show_result(format_, [dict(zip(("kind", "text", "settings"), row, strict=True)) for row in rows], table)


@app.command()
def new(method: Annotated[str, typer.Argument(help="A method; `fedlora list method` names them.")]) -> None:
    """Print a configuration to start from: fedlora new flasc > run.toml."""
    from fedlora.config.template import template

    print(template(method), end="")


@app.command()
def partition(
    config: ConfigPath,
    set_: Overrides = None,
    html: Annotated[Path | None, typer.Option(help="Also draw the classes of every client into this file.")] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Show how the data are dealt: sizes, skew, and a drawing by what clients.skew looks at."""
    from fedlora.config.federated_data import in_mode, prepare
    from fedlora.show.plots import partition_bars, partition_html

    experiment, _ = experiment_of(config, set_, None)
    setting = prepare(in_mode(experiment))
    labels, names = setting.classes
    summary = setting.summary().as_dict()
    if html is not None:
        write_page(html, partition_html(setting.population, labels, names))
    table = Table(show_header=False)
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    show_result(format_, summary, table)
    if format_ is Format.table:
        OUT.print(partition_bars(setting.population, labels, names))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    link: LinkText = None,
    target: Annotated[
        float | None, typer.Option(help="A value of the main metric, to tell how long each takes to it.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also draw the metric by round and by bytes into this file.")
    ] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Put finished runs side by side; seeds of a method are averaged. With --target, how long each takes to it."""
    from fedlora.core.network import parse_network
    from fedlora.show.plots import comparison_html
    from fedlora.show.report import comparison, comparison_table, load_result

    if link is not None and target is None:
        raise ConfigError("--link is for --target: the time over that network until the metric reaches it")
    reached = None if target is None else (parse_network(link) if link else None, target)
    rows = comparison([load_result(path) for path in runs], reached)
    if html is not None:
        write_page(html, comparison_html(rows))
    show_result(format_, rows, comparison_table(rows))


@app.command()
def search(
    config: ConfigPath,
    kilobytes: Annotated[float, typer.Option(help="The budget: kB to one client and back in a round.")],
    set_: Overrides = None,
    rank: Annotated[int, typer.Option(min=1, help="Where it begins.")] = 1,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where it begins.")] = 1 / 16,
    factor: Annotated[int, typer.Option(min=2, help="What rank or density is multiplied by in a step.")] = 4,
    max_rank: Annotated[int, typer.Option(min=1, help="No rank above is tried.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the trials; goes on where it holds some.")] = Path("runs/search"),
    format_: AsFormat = Format.table,
) -> None:
    """Search rank and density for a budget of bytes, by short runs in pairs (FLASC-Search)."""
    from fedlora.runs.search import Bounds
    from fedlora.runs.search import search as climb
    from fedlora.show.report import search_table

    experiment, _ = experiment_of(config, set_, None)
    bounds = Bounds(rank, density, factor, 1e3 * kilobytes, max_rank)
    trials = climb(experiment, out, bounds, callbacks=callbacks_of(out, None))
    values, table = search_table(trials)
    show_result(format_, values, table)
    if format_ is Format.table:
        OUT.print(
            f"the best one kept: fedlora run {out / 'best.toml'} -s phases.0.rounds=...",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="A whole model that needs no peft.")] = False,
) -> None:
    """Write a run's adapter for `peft`, or the merged model."""
    run_of(run).export(out, merge)
    OUT.print(f"written to {out}", markup=False, soft_wrap=True, highlight=False)


@app.command()
def predict(
    run: RunPath,
    text: Annotated[str, typer.Argument(help="An input (a text, for most tasks), or a file with one per line.")],
    format_: AsFormat = Format.table,
) -> None:
    """Say what a run's model makes of a text, or of what else its task takes."""
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
    show_result(format_, [{"input": one, "answer": answer} for one, answer in zip(inputs, found, strict=True)], table)


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[Path, typer.Option(help="A csv, tsv, json, jsonl or parquet file, maybe with .gz.")],
    column: Annotated[
        list[str] | None, typer.Option("-c", "--column", help="use=name: what a column of the task is called there.")
    ] = None,
    format_: AsFormat = Format.table,
) -> None:
    """Evaluate a run's model on the rows of a file."""
    wrong = [one for one in column or [] if "=" not in one]
    if wrong:
        raise ConfigError(f"--column {wrong[0]!r} is not of the form use=name, as in --column text=body")
    found = run_of(run).evaluate(data, dict(one.split("=", 1) for one in column or []))
    table = Table("metric", "value")
    for name, value in found.metrics.items():
        table.add_row(name, f"{value:.4f}")
    show_result(format_, {**found.metrics, "warnings": list(found.warnings)}, table)
    for warning in found.warnings:
        ERR.print(warning, style="yellow", markup=False)


@app.command()
def env(format_: AsFormat = Format.table) -> None:
    """Print versions, devices and folders, for a bug report."""
    from fedlora.show.describe import environment

    facts = environment()
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(value))
    show_result(format_, facts, table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the run folders go; goes on where they hold checkpoints.")] = Path(
        "runs/demo"
    ),
    set_: Overrides = None,
    format_: AsFormat = Format.table,
) -> None:
    """Train the embedded model with dense LoRA, FLASC, FeDeRA and SLoRA on one federation, and compare them."""
    from fedlora.cli.demo import METHODS, configuration
    from fedlora.config import parse
    from fedlora.config.federated_data import prepare
    from fedlora.show.report import as_dict, comparison, comparison_table

    ERR.print(
        "Model all-MiniLM-L6-v2 (22.7 M parameters); data: docstrings of this Python's standard library, 20 packages "
        "to tell apart; 100 clients with skewed labels.",
        highlight=False,
    )
    # what cannot run is refused before anything is trained
    experiments = {method: parse(configuration(method, set_ or [])) for method in METHODS}
    setting = prepare(experiments["lora"])
    results = [_run(experiment, out / method, setting=setting) for method, experiment in experiments.items()]
    rows = comparison([as_dict(result) for result in results])
    show_result(format_, rows, comparison_table(rows))
    if format_ is Format.table:
        OUT.print("runs: " + "  ".join(str(result.folder) for result in results), soft_wrap=True, highlight=False)
        OUT.print(f'try:  fedlora predict {results[0].folder} "Parse a MIME message from a file."', highlight=False)


def _run(
    experiment: Experiment,
    folder: Path | None,
    tracks: list[str] | None = None,
    setting: FederatedData | None = None,
    engine: str = "serial",
) -> Result:
    from fedlora.federation.engines import ENGINES
    from fedlora.runs.experiment import run as run_experiment

    folder = folder_of(experiment, folder)
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}; there are: {', '.join(ENGINES)}")
    callbacks = [*callbacks_of(folder, tracks), cli_federation.Messages()]
    if engine == "flower-simulation":
        from fedlora.federation.deploy.simulate import simulate

        return simulate(experiment, folder, callbacks=callbacks)
    return run_experiment(experiment, folder, callbacks=callbacks, setting=setting)


cli_federation.add_to(app)
cli_study.add_to(app)


def main() -> None:
    """Runs the command line: exit code 2 for what the user can mend, 1 for a fault of ours, 130 after Ctrl-C."""
    # threads that spin while they wait starve each other where several processes share the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    try:
        app(args=[argument for argument in sys.argv[1:] if argument != "--debug"])
    except FedloraError as error:
        if debug:
            raise
        stopped = type(error).__name__ == "Stopped"
        text, style = (str(error), None) if stopped else (f"error: {error}", "red")
        ERR.print(text, style=style, markup=False, soft_wrap=True, highlight=False)
        sys.exit(130 if stopped else 2)
    except Exception as error:
        if debug:
            raise
        ERR.print(
            f"fedlora failed, and that is a fault of fedlora ({type(error).__name__}: {error}); "
            "run the command again with --debug and report what it prints",
            style="red",
            markup=False,
            soft_wrap=True,
            highlight=False,
        )
        sys.exit(1)

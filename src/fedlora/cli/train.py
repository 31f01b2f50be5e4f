"""Commands that train on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.common import (
    OUT,
    AsFormat,
    ConfigPath,
    Format,
    Overrides,
    RunOut,
    Tracks,
    callbacks_of,
    experiment_of,
    folder_of,
    other_class,
    show,
    write_page,
)
from fedlora.cli.federation import Messages
from fedlora.core.errors import ConfigError
from fedlora.core.progress import LOG

if TYPE_CHECKING:
    from fedlora.config import Experiment
    from fedlora.config.federated_data import FederatedData
    from fedlora.runs.result import Result

GROUP = "Train"


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(rich_help_panel=GROUP)(run)
    app.command(rich_help_panel=GROUP)(demo)


def run(
    config: ConfigPath,
    set_: Overrides = None,
    out: RunOut = None,
    engine: Annotated[
        str, typer.Option(help="Where clients run: serial, processes, flower-simulation, or package.module:Class.")
    ] = "serial",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of the engine processes; one for each core or GPU by default.")
    ] = None,
    track: Tracks = None,
    report: Annotated[bool, typer.Option("--report", help="Also write report.html into the run's folder.")] = False,
    format_: AsFormat = Format.table,
) -> None:
    """Run an experiment, or resume it."""
    from fedlora.show.figures import check_installed
    from fedlora.show.report import as_dict, result_table

    if report:
        check_installed()
    experiment, folder = experiment_of(config, set_, out)
    result = _run(experiment, folder, track, engine=engine, workers=workers)
    if report:
        from fedlora.show.run_report import report as report_on

        write_page(result.folder / "report.html", report_on([result.folder])[0])
    show(format_, as_dict(result), result_table(result))


def demo(
    llm: Annotated[
        bool, typer.Option("--llm", help="Instruction tuning of SmolLM2-135M-Instruct, from the extra llm.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the run folders go: runs/demo or runs/demo-llm; resumes where they hold checkpoints."),
    ] = None,
    set_: Overrides = None,
    format_: AsFormat = Format.table,
) -> None:
    """Train a built-in model with dense LoRA, FLASC, FeDeRA and others on one federation, and compare them."""
    from fedlora.cli.demo import CLASSIFIER, LLM, configuration
    from fedlora.config import parse
    from fedlora.config.federated_data import prepare
    from fedlora.show.compare import comparison, comparison_table
    from fedlora.show.report import as_dict

    chosen = LLM if llm else CLASSIFIER
    out = out or Path("runs/demo-llm" if llm else "runs/demo")
    LOG.info("%s", chosen.about)
    # invalid configurations are rejected before anything is trained
    experiments = {method: parse(configuration(chosen, method, set_ or [])) for method in chosen.methods}
    data = prepare(experiments["lora"])
    results = [_run(experiment, out / method, data=data) for method, experiment in experiments.items()]
    rows = comparison([as_dict(result) for result in results])
    show(format_, rows, comparison_table(rows))
    if format_ is Format.table:
        for label, result in zip(experiments, results, strict=True):
            if llm:
                OUT.print(f"{label}: loss {result.before['loss']:.3f} before, {result.after['loss']:.3f} after")
        lines = (
            "runs: " + "  ".join(str(result.folder) for result in results),
            f'try:  fedlora predict {results[0].folder} "{chosen.question}"',
        )
        for line in lines:
            OUT.print(line, markup=False, soft_wrap=True, highlight=False)


def _run(
    experiment: Experiment,
    folder: Path | None,
    tracks: list[str] | None = None,
    data: FederatedData | None = None,
    engine: str = "serial",
    workers: int | None = None,
) -> Result:
    from fedlora.engines import Engine, Processes
    from fedlora.federation.engines import ENGINES
    from fedlora.runs.experiment import run as run_experiment

    folder = folder_of(experiment, folder)
    chosen = ENGINES.get(engine) or other_class("engine", Engine, engine, ENGINES)
    if workers is not None:
        if chosen is not Processes:
            raise ConfigError(f"--workers = {workers} is for --engine processes; leave it out with {engine!r}")
        chosen = partial(Processes, workers=workers)
    callbacks = [*callbacks_of(folder, tracks), Messages()]
    if engine == "flower-simulation":
        from fedlora.federation.deploy.simulate import simulate

        return simulate(experiment, folder, callbacks=callbacks)
    return run_experiment(
        experiment, folder, callbacks=callbacks, data=data, engine=None if engine == "serial" else chosen
    )

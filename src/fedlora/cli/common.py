"""Shared by all commands: consoles, common arguments, and reading of configurations."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from fedlora.cli.log import ERR, shows_progress
from fedlora.core.errors import ConfigError
from fedlora.core.files import write_atomically
from fedlora.core.progress import LOG, stage

if TYPE_CHECKING:
    from fedlora.config import Experiment
    from fedlora.runs.callbacks import Callback
    from fedlora.runs.inference import TrainedRun

OUT = Console()


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"


ConfigPath = Annotated[Path, typer.Argument(help="A TOML or YAML file, or the folder of a run.")]
RunPath = Annotated[Path, typer.Argument(help="The folder of a run.")]
RunOut = Annotated[Path | None, typer.Option("--out", help="Folder of the run; resumes if it holds a checkpoint.")]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", help="key.key=value; overrides the file.")]
Tracks = Annotated[
    list[str] | None,
    typer.Option("--track", help="Also log metrics to: tensorboard, wandb, mlflow, ..., or package.module:Class."),
]
LinkText = Annotated[str | None, typer.Option("--link", help="A network for all: down=10Mbit,up=1Mbit,latency=50ms")]
AsFormat = Annotated[Format, typer.Option("--format", help="A table for people, or JSON for programs.")]


def import_settings() -> None:
    """Imports the configuration modules, with a notice on a terminal, and exempts them from garbage collection."""
    stage("loading PyTorch")
    gc.disable()
    importlib.import_module("fedlora.config")
    gc.freeze()
    gc.enable()


def experiment_of(path: Path, overrides: list[str] | None, out: Path | None) -> tuple[Experiment, Path | None]:
    """The experiment of a file or of a run's folder, and the folder of the run, if the arguments name one.

    Raises:
        ConfigError: there is none, or it names something that does not exist.
    """
    from fedlora.config import load

    if path.is_dir() and not (path / "config.toml").exists():
        raise ConfigError(f"{path} is a folder without config.toml; name a file or the folder of a run")
    experiment = load(path, overrides or [])
    if experiment.root and path.is_file() and Path(experiment.root) != path.parent.absolute():
        LOG.warning("note: relative paths start from the working folder, since there are none such beside %s", path)
    stage("loading the libraries of models and data")
    return experiment, out or (path if path.is_dir() else None)


def run_of(folder: Path) -> TrainedRun:
    """A finished run.

    Raises:
        ConfigError: there is none.
    """
    stage("loading the model")
    from fedlora.runs.inference import load_run

    run = load_run(folder)
    for note in run.notes:
        LOG.warning("warning: %s", note)
    return run


def folder_of(experiment: Experiment, folder: Path | None) -> Path:
    """The folder of a run: the given one, or the default one derived from its settings."""
    from fedlora.config import default_folder

    return folder or default_folder(experiment)


def write_page(file: Path, page: str) -> None:
    """Writes a page with a plot.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        if file.exists() and not file.is_file():  # such as /dev/stdout
            file.write_text(page, encoding="utf-8")
        else:
            file.resolve().parent.stat()  # no folder is made for a name that may be wrong
            write_atomically(file.resolve(), page.encode())
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written ({error.strerror}); make room, or name a file in an existing folder"
        ) from error


def callbacks_of(folder: Path, tracks: list[str] | None) -> list[Callback]:
    """The callbacks for progress on the terminal and for trackers.

    Args:
        folder: the run's folder.
        tracks: names of trackers.

    Raises:
        ConfigError: there is no such tracker.
    """
    from fedlora.config.track import Track
    from fedlora.runs.trackers import make_tracker
    from fedlora.show.report import Live

    return [Live(ERR, bar=shows_progress()), *(make_tracker(Track(kind=name), folder) for name in tracks or [])]


def other_class(slot: str, base: type, name: str, known: Collection[str]) -> Any:
    """A class from the user's own code or from an installed package.

    Raises:
        ConfigError: there is no class of that name.
    """
    from fedlora.core.slots import Slot

    installed = Slot(slot, base).installed()
    if ":" not in name and name not in installed:
        raise ConfigError(f"there is no {slot} {name!r}; there are: {', '.join([*known, *installed])}")
    return Slot(slot, base).find(name)


def show(format_: Format, values: Any, table: RenderableType) -> None:
    """Prints a result in human- or machine-readable form."""
    if format_ is Format.json:
        print(json.dumps(values, indent=1))
    else:
        OUT.print(table)

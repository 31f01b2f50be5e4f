"""What all commands share: where they print, the arguments that many take, and how they read a configuration."""

from __future__ import annotations

import gc
import importlib
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora.core.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.config import Experiment
    from fedlora.runs.callbacks import Callback
    from fedlora.runs.inference import TrainedRun

OUT = Console()
ERR = Console(stderr=True)


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"


ConfigPath = Annotated[Path, typer.Argument(help="A TOML file, or the folder of a run.")]
RunPath = Annotated[Path, typer.Argument(help="The folder of a run.")]
RunOut = Annotated[Path | None, typer.Option("--out", help="Folder of the run; goes on if it holds a checkpoint.")]
Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", help="key.key=value, over what the file says.")]
Tracks = Annotated[list[str] | None, typer.Option("--track", help="Also send figures to: tensorboard.")]
LinkText = Annotated[str | None, typer.Option("--link", help="A network for all: down=10Mbit,up=1Mbit,latency=50ms")]
AsFormat = Annotated[Format, typer.Option("--format", help="A table for people, or JSON for programs.")]


def import_settings() -> None:
    """Imports what reads configurations, says so on a terminal, and looks for no garbage in it, then or later."""
    waiting("PyTorch")
    gc.disable()
    importlib.import_module("fedlora.config")
    gc.freeze()
    gc.enable()


def waiting(what: str) -> None:
    """Says on a terminal what a command is loading."""
    if ERR.is_terminal:
        ERR.print(f"loading {what} ...", style="dim", highlight=False)


def experiment_of(path: Path, overrides: list[str] | None, out: Path | None) -> tuple[Experiment, Path | None]:
    """The experiment of a file or of a run's folder, and the folder of the run, if the arguments name one.

    Raises:
        ConfigError: there is none, or it asks for something that is not there.
    """
    from fedlora.config import load

    if path.is_dir() and not (path / "config.toml").exists():
        raise ConfigError(f"{path} is a folder without config.toml; name a TOML file or the folder of a run")
    experiment = load(path, overrides or [])
    waiting("the model and the data")
    return experiment, out or (path if path.is_dir() else None)


def run_of(folder: Path) -> TrainedRun:
    """A finished run.

    Raises:
        ConfigError: there is none.
    """
    waiting("the model")
    from fedlora.runs.inference import load_run

    return load_run(folder)


def folder_of(experiment: Experiment, folder: Path | None) -> Path:
    """The folder of a run: the one that was named, or the one that its settings do."""
    from fedlora.config import digest

    return folder or Path("runs") / f"{experiment.label}-{digest(experiment)}"


def write_page(file: Path, page: str) -> None:
    """Writes a drawing.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); name a file in a folder there is") from error


def callbacks_of(folder: Path, tracks: list[str] | None) -> list[Callback]:
    """Progress on the terminal, and the places that figures also go to.

    Args:
        folder: of the run.
        tracks: names of trackers.

    Raises:
        ConfigError: there is no such tracker.
    """
    from fedlora.runs.trackers import TRACKERS
    from fedlora.show.report import Live

    if unknown := [name for name in tracks or [] if name not in TRACKERS]:
        raise ConfigError(f"there is no tracker {unknown[0]!r}; there are: {', '.join(TRACKERS)}")
    return [Live(ERR), *(TRACKERS[name](folder / name) for name in tracks or [])]


def show(format_: Format, values: Any, table: Table) -> None:
    """Prints a result for people or for programs."""
    if format_ is Format.json:
        print(json.dumps(values, indent=1))
    else:
        OUT.print(table)

"""A finished run as a model: prediction, evaluation on other data, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import config
from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.config.federated_data import in_mode
from fedlora.core.devices import pick_device
from fedlora.core.errors import ConfigError, DataError
from fedlora.core.state import ServerState
from fedlora.recipe import Recipe
from fedlora.rounds.downlink import view
from fedlora.runs.base_model import base_model
from fedlora.runs.export import export
from fedlora.runs.folder import RunFolder
from fedlora.tasks import Evaluation, Prepared
from fedlora.tasks.data.folders import PICTURES


@dataclass(frozen=True)
class TrainedRun:
    """A run's trained model, ready for inference; the training data are not needed.

    Args:
        experiment: its configuration.
        recipe: the recipe of its last phase.
        state: the latest checkpoint, with its parameters as a client would receive them.
        workspace: the model with the checkpoint's parameters loaded.
        metrics: metrics at the end of the run; empty if it has not finished.
    """

    experiment: Experiment
    recipe: Recipe
    state: ServerState
    workspace: Workspace
    metrics: dict[str, float]

    @property
    def task(self) -> Prepared:
        """The task, without data."""
        return self.workspace.task

    def predict(self, inputs: list[str]) -> list[dict[str, Any]]:
        """The model's prediction for each input; see the task's ``predict``."""
        self.workspace.model.eval()
        with self.workspace.predicting(self.recipe.local.compute):
            return self.task.predict(self.workspace.model, inputs, self.workspace.device)

    def evaluate(self, path: Path | str, columns: Mapping[str, str] | None = None) -> Evaluation:
        """Metrics on the rows of a file.

        Args:
            path: a csv, tsv, json, jsonl or parquet file, optionally with ``.gz``.
            columns: column name used by the task -> name in the file, if different.

        Raises:
            DataError: the file cannot be read.
        """
        task = self.task.with_rows(Path(path), columns or {})
        self.workspace.model.eval()
        with self.workspace.predicting(self.recipe.local.compute):
            rows = np.arange(task.num_examples("test"))
            return task.evaluate(self.workspace.model, rows, "test", self.workspace.device)

    def export(self, folder: Path | str, merge: bool = False) -> None:
        """Writes an adapter that ``peft`` loads, or with ``merge`` a whole model that does not need ``peft``.

        Raises:
            ConfigError: the folder already exists, or the tuning cannot be exported in that form.
        """
        folder = Path(folder)
        if folder.exists():
            raise ConfigError(f"{folder} is there already; name a new folder")
        export(folder, self, merge)


_LISTS = {".txt", ".csv", ".tsv", ".json", ".jsonl"}
"""Suffixes by which an argument without spaces is taken to be a file."""


def read_inputs(text: str) -> list[str]:
    """The inputs given by a command-line argument: the text itself, or the lines of the file it names.

    Raises:
        DataError: the file is not text, or is empty.
    """
    file = Path(text)
    if file.suffix.lower() in _LISTS and not text.split()[1:] and not file.exists():
        raise DataError(f"there is no file {text}; name one with an input per line, or give the input itself")
    try:
        # an image file is an input, not a list of inputs
        by_line = file.is_file() and file.suffix.lower() not in PICTURES
        inputs = file.read_text(encoding="utf-8").splitlines() if by_line else [text]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; give a file with one input per line") from error
    except OSError:  # a text too long for a file name is an input itself
        inputs = [text]
    inputs = [line for line in inputs if line.strip()]
    if not inputs:
        raise DataError("there is no text to predict; give a text, or a file with a text per line")
    return inputs


def load_run(path: Path | str, model: Any = None) -> TrainedRun:
    """Loads the model of a run from its latest checkpoint.

    Args:
        path: the run's folder.
        model: if the run's base model was passed from Python, the same model again: ``fedlora.Model(object=...,
            tokenizer=...)``, or the pair of both. If omitted, it is read from the folder that it was loaded from,
            provided that this folder is unchanged.

    Raises:
        ConfigError: ``path`` is not the folder of a run with a checkpoint, or the base model is not available.
    """
    path = Path(path)
    files = RunFolder(path)
    if not (path / "config.toml").exists():
        raise ConfigError(f"{path} is not a run's folder: it has no config.toml")
    latest = files.latest()
    if latest is None:
        if config.load(path).mode == "local":
            raise ConfigError(
                f"in {path} clients trained alone, and each has a model of its own: see {path / 'clients'}/N/adapter"
            )
        raise ConfigError(f"the run in {path} has no checkpoint yet; go on with: fedlora run {path}")
    experiment = in_mode(config.load(path))
    state, _ = latest
    recipe = experiment.phases[state.phase].recipe
    manifest = files.read_json("manifest.json")
    names = list(manifest["label_names"])
    base = base_model(experiment.model, model, manifest.get("handed_over", {}), path)
    experiment = dataclasses.replace(experiment, model=base)
    task = experiment.task.restore(experiment.model, names)
    workspace = Workspace(task, experiment.seed, pick_device(experiment.device), experiment.deterministic)
    workspace.apply_setup(state.phase, recipe, state.setup)
    state = dataclasses.replace(state, params=view(recipe, state, experiment.seed))
    workspace.load(recipe, state.params, state.folds)
    metrics = files.read_json("result.json")["after"] if (path / "result.json").exists() else {}
    return TrainedRun(experiment, recipe, state, workspace, metrics)

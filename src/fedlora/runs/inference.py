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
from fedlora.config.places import located_model
from fedlora.core.devices import pick_device
from fedlora.core.errors import ConfigError, DataError, shown
from fedlora.core.state import ServerState
from fedlora.recipe import Recipe
from fedlora.rounds.checkpoint import can_go_on
from fedlora.rounds.downlink import view
from fedlora.runs.base_model import base_model
from fedlora.runs.export import export
from fedlora.runs.folder import RunFolder
from fedlora.tasks import Evaluation, Prepared
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.data.sources import reading_of
from fedlora.tasks.models.fingerprints import NAMES, changed


@dataclass(frozen=True)
class TrainedRun:
    """A run's trained model, ready for inference; the training data are not needed.

    Args:
        experiment: its configuration.
        recipe: the recipe of its last phase.
        state: the latest checkpoint, with its parameters as a client would receive them.
        workspace: the model with the checkpoint's parameters loaded.
        metrics: metrics at the end of the run; empty if it has not finished.
        folder: the run's folder.
        notes: sentences about what has changed since it was trained.
    """

    experiment: Experiment
    recipe: Recipe
    state: ServerState
    workspace: Workspace
    metrics: dict[str, float]
    folder: Path
    notes: tuple[str, ...] = ()

    @property
    def task(self) -> Prepared:
        """The task, without data."""
        return self.workspace.task

    def predict(self, inputs: list[str]) -> list[dict[str, Any]]:
        """The model's prediction for each input; see the task's ``predict``.

        Raises:
            DataError: an input is not of the form that the task needs, or one was given instead of a list.
        """
        if isinstance(inputs, str | Path | Mapping):  # a text has letters, which are texts too
            raise DataError(f"the inputs are {shown(inputs)}, but a list was expected: call predict([...]) for one too")
        self.workspace.model.eval()
        with self.workspace.predicting(self.recipe.local.compute):
            return self.task.predict(self.workspace.model, inputs, self.workspace.device)

    @property
    def reading(self) -> Reading:
        """How files are read: as those of the run's data."""
        return reading_of(self.experiment.data)

    def evaluate(
        self, path: Path | str, columns: Mapping[str, str] | None = None, reading: Reading | None = None
    ) -> Evaluation:
        """Metrics on the rows of a file.

        Args:
            path: what ``Files`` reads: a file, a pattern, or a folder written by ``save_to_disk``.
            columns: column name used by the task -> name in the file, if different.
            reading: how files are read; by default as those of the run's data.

        Raises:
            DataError: the file cannot be read.
        """
        task = self.task.with_rows(Path(path), columns or {}, "test", reading or self.reading)
        self.workspace.model.eval()
        with self.workspace.predicting(self.recipe.local.compute):
            rows = np.arange(task.num_examples("test"))
            found = task.evaluate(self.workspace.model, rows, "test", self.workspace.device)
        return found._replace(warnings=self.notes + task.notes + found.warnings)

    def export(self, folder: Path | str, merge: bool = False) -> None:
        """Writes an adapter that ``peft`` loads, or with ``merge`` a whole model that does not need ``peft``.

        Raises:
            ConfigError: the folder already exists, or the tuning cannot be exported in that form.
        """
        folder = Path(folder)
        if folder.exists():
            raise ConfigError(f"{folder} already exists; name a new folder")
        export(folder, self, merge)


_EDITED = "restore the original file unless it was edited on purpose"


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
        raise ConfigError(f"the run in {path} has no checkpoint yet; resume with: fedlora run {path}")
    experiment = in_mode(config.load(path))
    state, facts = latest
    same = files.began_with(facts, experiment) or not can_go_on(files.checkpoints[-1])
    manifest = files.read_json("manifest.json")
    names = list(manifest["label_names"])
    base = base_model(located_model(experiment), model, manifest.get("handed_over", {}), path)
    experiment = dataclasses.replace(experiment, model=base)
    task = experiment.task.restore(experiment.model, names)
    task.pairs = manifest.get("pairs", task.pairs)  # older runs have not recorded it
    try:
        recipe = experiment.phases[state.phase].recipe
        workspace = Workspace(task, experiment.seed, pick_device(experiment.device), experiment.deterministic)
        workspace.apply_setup(state.phase, recipe, state.setup)
        state = dataclasses.replace(state, params=view(recipe, state, experiment.seed))
        workspace.load(recipe, state.params, state.folds)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        if same:
            raise
        raise ConfigError(f"{path / 'config.toml'} describes another model than the checkpoint; {_EDITED}") from error
    metrics = files.read_json("result.json")["after"] if (path / "result.json").exists() else {}
    edited = () if same else (f"{path / 'config.toml'} is not the one that the run was trained with; {_EDITED}",)
    notes = edited + tuple(
        f"{NAMES[name]} changed since the run in {path} was trained, so its figures do not hold for what is computed "
        f"now: put the old {name} back ({base.path})"
        for name in changed(manifest.get("fingerprints", {}), task.fingerprints)
    )
    return TrainedRun(experiment, recipe, state, workspace, metrics, path, notes)

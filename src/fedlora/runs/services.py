"""Experiment trackers that ``accelerate`` supports: Weights & Biases, MLflow, trackio, Comet and others."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fedlora.config import Experiment, resolved
from fedlora.config.federated_data import FederatedData
from fedlora.config.track import Track
from fedlora.core.errors import ConfigError
from fedlora.core.later import accelerate, wandb
from fedlora.recipe.modes import MODES
from fedlora.rounds.ledger import RoundRecord
from fedlora.runs.callbacks import Callback
from fedlora.runs.folder import RunFolder
from fedlora.runs.result import Result

_RUNS = "trackers.json"
"""The file of a run's folder with the trackers' own names of the run, by kind."""


class Service(Callback, ABC):
    """Sends the configuration, every row of the ledger, the result and the adapter to a tracker.

    Steps are rounds. Nothing is sent in the mode ``local``, where each client has its own ledger, nor by a run that was
    finished before.

    Args:
        track: the tracker's settings.
        folder: the run's folder.

    Raises:
        ConfigError: the tracker's package is not installed.
    """

    kind: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, track: Track, folder: Path) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                f"{self.package} is not installed, which track.kind = {self.kind!r} needs: pip install it"
            )
        self._track, self._folder = track, RunFolder(folder)
        self._tracker: Any = None
        self._down = self._up = 0

    def run_started(self, experiment: Experiment, data: FederatedData, rows: Sequence[RoundRecord]) -> None:
        """See ``Callback.run_started``: a resumed run continues with the same steps."""
        self.close()
        if MODES[experiment.mode].separate or (self._folder.path / "result.json").exists():
            return
        self._down = sum(sum(row.down_bytes.values()) for row in rows)
        self._up = sum(sum(row.up_bytes.values()) for row in rows)
        accelerate.PartialState()  # accelerate's trackers write to a log that needs it
        held = self._held()
        with _stdout_as_stderr():
            tracker = self._begin(held.get(self.kind))
            tracker.start()
            self._tracker = tracker
            tracker.store_init_configuration(flat(resolved(experiment)))
        if (name := self._name_of_run()) and name != held.get(self.kind):
            self._folder.write_json(_RUNS, {**held, self.kind: name})

    def row_recorded(self, row: RoundRecord) -> None:
        """See ``Callback.row_recorded``: the numbers of the row, and cumulative bytes."""
        if self._tracker is None:
            return
        self._down += sum(row.down_bytes.values())
        self._up += sum(row.up_bytes.values())
        self._tracker.log({**numbers(row), "bytes/down": self._down, "bytes/up": self._up}, step=row.round)

    def run_finished(self, result: Result) -> None:
        """See ``Callback.run_finished``: the numbers of the result, and the adapter."""
        if self._tracker is None:
            return
        figures = {"after": result.after, "seconds": result.seconds}
        self._tracker.log({f"result/{name}": value for name, value in flat(figures).items()}, step=result.rounds)
        with _stdout_as_stderr():
            if result.stopped:
                self._tracker.store_init_configuration({"stopped": result.stopped})
            if result.adapter:
                self._keep(result.adapter)

    def close(self) -> None:
        """See ``Callback.close``."""
        if self._tracker is not None:
            with _stdout_as_stderr():
                self._tracker.finish()
            self._tracker = None

    @abstractmethod
    def _begin(self, held: str | None) -> Any:
        """An ``accelerate`` tracker that is not started yet; ``held`` is the tracker's name of a resumed run."""

    def _name_of_run(self) -> str | None:
        """The tracker's own name of the run, by which it can be resumed; None if it cannot."""
        return None

    def _keep(self, adapter: Path) -> None:
        """Stores the adapter; only its path, unless a tracker keeps files."""
        self._tracker.store_init_configuration({"adapter": str(adapter.absolute())})

    @property
    def _name(self) -> str:
        return self._track.name or self._folder.path.absolute().name

    def _held(self) -> dict[str, str]:
        return self._folder.read_json(_RUNS) if (self._folder.path / _RUNS).exists() else {}


class WandB(Service):
    """Weights & Biases; ``options.mode = "offline"`` writes to the run's folder only."""

    kind, package = "wandb", "wandb"

    def _begin(self, held: str | None) -> Any:
        own = {"id": held or secrets.token_hex(8), "resume": "allow", "name": self._name, "dir": self._folder.path}
        return accelerate.tracking.WandBTracker(self._track.project, **{**own, **self._track.options})

    def _name_of_run(self) -> str | None:
        return str(self._tracker.tracker.id)

    def _keep(self, adapter: Path) -> None:
        kept = wandb.Artifact(f"adapter-{self._tracker.tracker.id}", type="model")
        kept.add_dir(str(adapter))
        self._tracker.tracker.log_artifact(kept)


class MLflow(Service):
    """MLflow, at the tracking URI of its environment variables; the project is the experiment."""

    kind, package = "mlflow", "mlflow"

    def _begin(self, held: str | None) -> Any:
        own = {"run_id": held, "run_name": self._name}
        return accelerate.tracking.MLflowTracker(self._track.project, **{**own, **self._track.options})

    def _name_of_run(self) -> str | None:
        return str(self._tracker.tracker.info.run_id)

    def _keep(self, adapter: Path) -> None:
        self._tracker.log_artifacts(str(adapter), "adapter")


class Trackio(Service):
    """trackio: local files, or a Space of the Hugging Face Hub with ``options.space_id``."""

    kind, package = "trackio", "trackio"

    def _begin(self, held: str | None) -> Any:
        own = {"name": held or self._name, "resume": "must" if held else "never"}
        return accelerate.tracking.TrackioTracker(self._track.project, **{**own, **self._track.options})

    def _name_of_run(self) -> str | None:
        return str(self._tracker.tracker.name)

    def _keep(self, adapter: Path) -> None:
        self._tracker.tracker.log_artifact(str(adapter), name="adapter", type="model")


class Comet(Service):
    """Comet; a resumed run begins a new experiment at its next step."""

    kind, package = "comet_ml", "comet_ml"

    def _begin(self, held: str | None) -> Any:
        return accelerate.tracking.CometMLTracker(self._track.project, **self._track.options)

    def _keep(self, adapter: Path) -> None:
        self._tracker.tracker.log_model("adapter", str(adapter))


class Aim(Service):
    """Aim, in the repository of the working folder; a resumed run begins a new one at its next step."""

    kind, package = "aim", "aim"

    def _begin(self, held: str | None) -> Any:
        own = {"experiment": self._track.project}
        return accelerate.tracking.AimTracker(self._name, **{**own, **self._track.options})

    def _keep(self, adapter: Path) -> None:
        self._tracker.tracker["adapter"] = str(adapter.absolute())


class ClearML(Service):
    """ClearML; a resumed run begins a new task at its next step."""

    kind, package = "clearml", "clearml"

    def _begin(self, held: str | None) -> Any:
        own = {"project_name": self._track.project, "task_name": self._name}
        return accelerate.tracking.ClearMLTracker(self._track.project, **{**own, **self._track.options})

    def _keep(self, adapter: Path) -> None:
        self._tracker.tracker.upload_artifact("adapter", str(adapter))


class DVCLive(Service):
    """DVCLive, in the run's folder."""

    kind, package = "dvclive", "dvclive"

    def _begin(self, held: str | None) -> Any:
        own = {"dir": str(self._folder.path / "dvclive"), "resume": True, "save_dvc_exp": False}
        return accelerate.tracking.DVCLiveTracker(self._name, **{**own, **self._track.options})


class SwanLab(Service):
    """SwanLab; a resumed run begins a new experiment at its next step."""

    kind, package = "swanlab", "swanlab"

    def _begin(self, held: str | None) -> Any:
        own = {"experiment_name": self._name, "logdir": str(self._folder.path / "swanlab")}
        return accelerate.tracking.SwanLabTracker(self._track.project, **{**own, **self._track.options})


def numbers(row: RoundRecord) -> dict[str, float]:
    """The numbers of a row under their names in the ledger, nested ones as ``metrics/accuracy``.

    Before the first round there is no loss, norm or density; under noise, clients report no loss.
    """
    trained = ("loss", "update_norm", "density_down", "density_up", "examples", "steps")
    absent = (() if row.round else trained) + (("loss",) if row.reported_loss is None else ())
    found = {
        name: value
        for name, value in flat(dataclasses.asdict(row)).items()
        if isinstance(value, int | float) and name != "round" and name not in absent
    }
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their paths, joined by ``/``; sequences of plain values become text.

    >>> flat({"a": {"b": 1}, "c": [{"d": 2}], "e": [3, 4]})
    {'a/b': 1, 'c/0/d': 2, 'e': '3, 4'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return found


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """Trackers print greetings, and standard output is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


SERVICES: dict[str, type[Service]] = {
    one.kind: one for one in (WandB, MLflow, Trackio, Comet, Aim, ClearML, DVCLive, SwanLab)
}
"""Trackers by ``kind``."""

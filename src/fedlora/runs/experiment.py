"""``fedlora.run``: from a configuration to an adapter."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from fedlora import config
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, check_prepared, in_mode, manifest, prepare
from fedlora.core.errors import ConfigError, FedloraError
from fedlora.core.interrupts import sigterm_as_ctrl_c
from fedlora.core.state import named_seed
from fedlora.engines import AnyEngine
from fedlora.population.clients import Population, draw_cohort
from fedlora.population.external import Partitioner
from fedlora.recipe.modes import MODES
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.runs.claim import claimed, look
from fedlora.runs.evaluation import over_clients
from fedlora.runs.folder import RunFolder
from fedlora.runs.result import Result
from fedlora.runs.session import Session
from fedlora.runs.trackers import make_tracker


class Stopped(FedloraError):
    """The user interrupted the run; everything is saved."""


def run(
    experiment: Experiment,
    folder: Path | str | None = None,
    *,
    partitioner: Partitioner | None = None,
    callbacks: Sequence[Callback] = (),
    data: FederatedData | None = None,
    engine: AnyEngine | None = None,
    until: int | None = None,
) -> Result:
    """Runs an experiment, or resumes it if its folder contains a checkpoint.

    A run that is rejected before the first round leaves no folder behind. Only one process at a time can train in a
    folder.

    Args:
        experiment: the experiment to run.
        folder: the run's folder; ``runs/<label>-<digest>`` if absent.
        partitioner: partitions the data instead of the configuration's partition.
        callbacks: called during the run, in this order, and closed at its end.
        data: data returned by ``prepare`` for the same experiment, to share among runs that differ in their method.
        engine: where clients run, or its class; in this process if absent.
        until: the round to pause after, with the model evaluated and saved; a later call resumes from it. Nothing is
            exported.

    Returns:
        Metrics, bytes and the folder; with ``until``, for the rounds up to it, with metrics taken from the ledger.

    Raises:
        FedloraError: an error whose message says how to fix it.
        Stopped: the user interrupted the run; it can be resumed.
    """
    if until is not None and until < 0:
        raise ConfigError(f"until = {until}, but the number of a round to pause after was expected: give 0 or more")
    if data is not None:
        if partitioner is not None:
            raise ConfigError(
                "the data are divided already: give the partitioner to fedlora.prepare, or leave data out"
            )
        check_prepared(experiment, data)
    path = Path(folder) if folder is not None else config.default_folder(experiment)
    return train(experiment, path, partitioner, callbacks, data, engine, until, held=False)


def train(
    experiment: Experiment,
    path: Path,
    partitioner: Partitioner | None,
    callbacks: Sequence[Callback],
    data: FederatedData | None,
    engine: AnyEngine | None,
    until: int | None,
    held: bool,
) -> Result:
    """``run``, also in a folder that the caller has claimed.

    Args:
        held: whether the caller has already claimed the folder (``claim.claimed``) for the duration of this call.
        experiment, path, partitioner, callbacks, data, engine, until: as for ``run``.
    """
    files = RunFolder(path)
    try:
        # callbacks are closed before the files of a rejected run are removed, as some of them write there too
        own = [make_tracker(track, path) for track in experiment.track]
        with sigterm_as_ctrl_c(), ExitStack() as claim, closing(CallbackList([*callbacks, *own])) as callback:
            if not held:
                look(files, experiment)
            effective = in_mode(experiment)
            data = data or prepare(effective, partitioner)
            if not held:
                claim.enter_context(claimed(files, experiment, callback.message))
            if MODES[experiment.mode].separate:
                return _run_separately(experiment, data, files, callback, until)
            return Session(effective, data, files, callback, engine).run(until)
    except KeyboardInterrupt:
        if not files.begun:
            raise Stopped(
                "stopped before the first round; nothing was saved. Run the same command to start over"
            ) from None
        on = "Run the same command to resume" if engine else f"Resume with: fedlora run {shlex.quote(str(path))}"
        raise Stopped(f"stopped; every finished round is saved. {on}") from None


def _run_separately(
    experiment: Experiment, data: FederatedData, files: RunFolder, callback: CallbackList, until: int | None
) -> Result:
    """Runs several clients in isolation; the result contains means over them."""
    alone = in_mode(experiment)
    count = min(experiment.num_local, len(data.population))
    chosen = draw_cohort(data.population, count, named_seed(experiment.seed, "local"))
    results: list[Result] = []
    for client in chosen:
        rows = data.population.rows_of(client)
        single = Population((data.population.names[client],), rows, np.array([0, len(rows)]))
        kept = {0: data.holdout[client]} if client in data.holdout else {}
        own = dataclasses.replace(data, population=single, holdout=kept, notes=() if results else data.notes)
        inner = RunFolder(files.path / "clients" / str(client))
        inner.path.mkdir(parents=True, exist_ok=True)
        results.append(Session(alone, own, inner, callback, None).run(until))
    result = dataclasses.replace(
        results[0],
        folder=files.path,
        before=_over_local([one.before for one in results], data),
        after=_over_local([one.after for one in results], data),
        seconds=sum(one.seconds for one in results),
        rows=(),
        adapter=None,
    )
    if until is None:
        files.write_json("manifest.json", manifest(experiment, data))
        files.write_json("result.json", {**result.figures(), "adapter": None})
    return result


def _over_local(metrics: list[dict[str, float]], data: FederatedData) -> dict[str, float]:
    """The mean over clients trained in isolation; metrics on their own rows are summarised by ``over_clients``."""
    main = data.task.main_metric
    means = {
        name: float(np.mean([one[name] for one in metrics])) for name in metrics[0] if not name.startswith("client_")
    }
    own = [one[f"client_mean_{main}"] for one in metrics if f"client_mean_{main}" in one]
    return means | over_clients(main, own, data.task.higher_is_better)

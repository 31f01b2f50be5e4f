"""Clients in the processes of a Ray cluster, by Flower's simulation: the same configuration, the same bits."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
import torch

from fedlora.config import Experiment
from fedlora.core.errors import ConfigError, ProcessError
from fedlora.federation.deploy.federate import federate
from fedlora.federation.deploy.flower_versions import PRIVATE, check_flower
from fedlora.federation.deploy.processes import quiet
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.protocol.transport import Transport
from fedlora.runs.callbacks import Callback
from fedlora.runs.result import Result
from fedlora.tasks import Sites

T = TypeVar("T")
LONGEST = 30 * 86400.0
"""Seconds of a round under Ray, where nobody is late."""


def simulate(
    experiment: Experiment,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    workers: int | None = None,
    ray: dict[str, Any] | None = None,
) -> Result:
    """Runs an experiment with clients in Ray's processes.

    Each worker keeps a model, and any worker takes any client's turn, so that thousands of clients cost no more than
    those of a round. What clients remember lies in the run's folder, which all workers must be able to reach.

    Args:
        experiment: what to run.
        folder: where to keep the run.
        callbacks: are called as the run goes on, and of what happens to sites.
        workers: how many turns run at a time; as many as there are cores, or GPUs if there are any, by default.
        ray: what ``ray.init`` gets, such as the address of a cluster.

    Raises:
        ConfigError: the experiment's rows lie with sites.
    """
    if isinstance(experiment.data, Sites):
        raise ConfigError("data.kind = 'sites' is for real sites; a simulation deals the data of any other kind")
    place = folder.resolve() / "simulation"

    def main(transport: Transport) -> Result:
        def begun() -> None:
            write_site(place, experiment.device)

        rules = ServerPolicy(round_timeout=LONGEST)
        return federate(experiment, folder, transport, rules, anywhere=True, callbacks=callbacks, begun=begun)

    return with_ray(main, place, workers, ray)


def write_site(folder: Path, device: str) -> None:
    """The file of the one site that all workers are."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"name": "simulation", "share": {"number": 0, "of": 1}, "device": device}
    (folder / "site.toml").write_text(tomli_w.dumps(document))


def with_ray(
    main: Callable[[Transport], T], folder: Path, workers: int | None = None, ray: dict[str, Any] | None = None
) -> T:
    """Starts Ray's workers and gives ``main`` a transport to them.

    Args:
        main: what is done with them.
        folder: where ``write_site`` writes before the first envelope is sent.
        workers: how many; as many as there are GPUs, or cores if there are none, by default.
        ray: what ``ray.init`` gets.

    Raises:
        ProcessError: the workers are gone.
        ConfigError: Ray would not work here.
    """
    check_flower(PRIVATE)
    if " " in sys.executable:
        raise ConfigError(
            f"Ray cannot start workers where the path of Python has a space ({sys.executable}), and would wait for "
            "ever; install fedlora in another place, or use another engine"
        )
    quiet()
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedlora.federation.flower.app import SITE_FILE, GridTransport, client_app, nodes_of

    gpus = torch.cuda.device_count()
    workers = workers or gpus or os.cpu_count() or 1
    outcome: Future[T] = Future()
    app, crashed = ServerApp(), threading.Event()

    @app.main()
    def serve(grid: Any, context: Any) -> None:
        try:
            outcome.set_result(main(GridTransport(grid, lambda: nodes_of(grid), check)))
        except BaseException as error:  # Flower would tell it in another way
            outcome.set_exception(error)

    def check() -> None:
        if crashed.is_set():
            raise ProcessError("Ray's processes ended; what they said is above")

    # Ray's processes begin with what this one has; those of a cluster that runs already have to be told
    os.environ[SITE_FILE] = str(folder / "site.toml")
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // workers))
    settings = {"include_dashboard": False, "num_cpus": workers}
    share = {"num_cpus": 1, "num_gpus": gpus / workers}
    backend: Any = {"init_args": settings | (ray or {}), "client_resources": share}
    try:
        with _quiet_logs():
            run_simulation(server_app=app, client_app=client_app, num_supernodes=workers, backend_config=backend)
    except RuntimeError:
        if not outcome.done() or outcome.exception() is None:
            raise
    finally:
        crashed.set()
    return outcome.result(timeout=0)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Flower's own reports of progress would go between ours."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

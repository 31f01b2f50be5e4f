"""Clients in the processes of a Ray cluster, through Flower's simulation: same configuration, bit-identical results."""

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
"""Timeout of a round under Ray in seconds, long enough that no client is ever late."""


def simulate(
    experiment: Experiment,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    workers: int | None = None,
    ray: dict[str, Any] | None = None,
) -> Result:
    """Runs an experiment with clients in Ray's processes.

    Each worker keeps a model loaded, and any worker takes any client's turn, so the cost depends on the clients per
    round and not on their total number. Client state is stored in the run's folder, which must be accessible to all
    workers.

    Args:
        experiment: the experiment to run.
        folder: the run's folder.
        callbacks: called during the run, and on events of sites.
        workers: number of concurrent client turns; by default the number of GPUs, or of cores if there are none.
        ray: arguments for ``ray.init``, such as the address of a cluster.

    Raises:
        ConfigError: the experiment's rows are held by sites, or its device is one of several GPUs.
    """
    if isinstance(experiment.data, Sites):
        raise ConfigError("data.kind = 'sites' is for real sites; a simulation distributes data of any other kind")
    gpus = gpus_for(experiment.device)
    place = folder.resolve() / "simulation"

    def main(transport: Transport) -> Result:
        def begun() -> None:
            write_site(place, experiment.device)

        rules = ServerPolicy(round_timeout=LONGEST)
        return federate(experiment, folder, transport, rules, anywhere=True, callbacks=callbacks, begun=begun)

    return with_ray(main, place, workers, ray, gpus)


def gpus_for(device: str) -> int:
    """How many GPUs Ray may hand out to workers on a device of this name.

    Raises:
        ConfigError: the name is of one GPU, which a worker sees under another number.
    """
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device = {device!r} names one GPU, but Ray hands out GPUs itself: set device = 'cuda', and "
            f"CUDA_VISIBLE_DEVICES={device[5:]} before the program starts"
        )
    return 0 if device == "cpu" else torch.cuda.device_count()


def write_site(folder: Path, device: str) -> None:
    """Writes the file of the single site that all workers represent."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"name": "simulation", "share": {"number": 0, "of": 1}, "device": device}
    (folder / "site.toml").write_text(tomli_w.dumps(document))


def with_ray(
    main: Callable[[Transport], T],
    folder: Path,
    workers: int | None = None,
    ray: dict[str, Any] | None = None,
    gpus: int = 0,
) -> T:
    """Starts Ray's workers and calls ``main`` with a transport to them.

    Args:
        main: the function to run with the transport.
        folder: the folder into which ``write_site`` writes before the first envelope is sent.
        workers: number of workers; by default the number of GPUs, or of cores if there are none.
        ray: arguments for ``ray.init``.
        gpus: number of GPUs that they share.

    Raises:
        ProcessError: the workers have died.
        ConfigError: Ray would not work here.
    """
    _check_installed()
    quiet()
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedlora.federation.flower.app import SITE_FILE, GridTransport, client_app, nodes_of

    workers = workers or gpus or os.cpu_count() or 1
    outcome: Future[T] = Future()
    app, crashed = ServerApp(), threading.Event()

    @app.main()
    def serve(grid: Any, context: Any) -> None:
        try:
            outcome.set_result(main(GridTransport(grid, lambda: nodes_of(grid), check)))
        except BaseException as error:  # Flower would report it differently
            outcome.set_exception(error)

    def check() -> None:
        if crashed.is_set():
            raise ProcessError("Ray's processes ended; their output is above")

    # Ray's processes inherit this environment; those of an already running cluster must receive it explicitly
    os.environ[SITE_FILE] = str(folder / "site.toml")
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // workers))
    settings = {"include_dashboard": False, "num_cpus": workers}
    share = {"num_cpus": 1, "num_gpus": gpu_share(gpus, workers)}
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


def _check_installed() -> None:
    check_flower(PRIVATE)
    if " " in sys.executable:
        raise ConfigError(
            f"Ray does not support a space in the path of Python ({sys.executable}), and would hang; install "
            "fedlora in another folder, or use another engine"
        )


def gpu_share(gpus: int, workers: int) -> float:
    """The part of a GPU that each worker asks Ray for, which gives parts of one GPU or whole ones.

    >>> gpu_share(4, 3), gpu_share(2, 3), gpu_share(1, 4), gpu_share(0, 4)
    (1.0, 0.5, 0.25, 0.0)
    """
    return 1.0 / -(-workers // gpus) if gpus else 0.0


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Silences Flower's own progress output, which would interleave with ours."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

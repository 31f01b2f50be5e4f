"""A complete federation on this machine, with real processes, TLS and keys, for the duration of one run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from fedlora.config import Experiment
from fedlora.config.federated_data import prepare
from fedlora.core.errors import ConfigError
from fedlora.federation.deploy.folder import ServerConfig, init
from fedlora.federation.deploy.processes import Child, free_port, stop_all
from fedlora.federation.deploy.serve import serve
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.runs.callbacks import Callback
from fedlora.runs.result import Result
from fedlora.tasks import Sites

POLL = 0.2


def demo(
    experiment: Experiment,
    folder: Path,
    federation: Path,
    sites: int,
    *,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Runs an experiment on sites on this machine, among which the clients of its partition are divided.

    Args:
        experiment: the experiment to run.
        folder: the run's folder.
        federation: the folder for keys, certificates and the sites' state; existing ones are reused.
        sites: number of sites.
        callbacks: called during the run, and on events of sites.

    Raises:
        ConfigError: the experiment's rows are held by sites.
    """
    if isinstance(experiment.data, Sites):
        raise ConfigError(
            "data.kind = 'sites' is for real sites; the demo distributes data of any other kind to its sites"
        )
    rules = ServerPolicy(min_available=len(prepare(experiment).population))
    with started_sites(federation, sites):
        return serve(experiment, folder, federation / "server", rules=rules, callbacks=callbacks)


@contextmanager
def started_sites(federation: Path, count: int) -> Iterator[list[Child]]:
    """Sites that share a partition, each running `fedlora join` in its own process; stopped on exit.

    Args:
        federation: the federation's folder; created if it does not exist.
        count: number of sites.

    Raises:
        ConfigError: the existing federation has other sites.
    """
    names = [f"site-{number}" for number in range(count)]
    if not (federation / "server").exists():
        init(federation, names, "localhost", port=free_port())
    if (held := ServerConfig.load(federation / "server").sites) != tuple(names):
        raise ConfigError(f"{federation} has the sites {', '.join(held)}; name another folder with --federation")
    children = [site(federation, name, number, count) for number, name in enumerate(names)]
    try:
        yield [child.start() for child in children]
    finally:
        stop_all(children)


def site(federation: Path, name: str, number: int, count: int) -> Child:
    """A site that represents its share of the clients."""
    place = federation / "sites" / name
    document = {"name": name, "share": {"number": number, "of": count}, "poll_seconds": POLL}
    (place / "site.toml").write_text(tomli_w.dumps(document))
    port = ServerConfig.load(federation / "server").port
    command = [sys.executable, "-m", "fedlora", "join", f"127.0.0.1:{port}", "--site-config", str(place / "site.toml")]
    return Child(command, place / "processes", grace=40.0)

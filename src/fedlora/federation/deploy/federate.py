"""Runs with remote clients: from a configuration and a transport to the result of ``experiment.run``."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, prepare, prepare_sites
from fedlora.config.handed_over import check_on_disk
from fedlora.config.places import located_data, located_model
from fedlora.core.errors import ConfigError
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.protocol.transport import Transport
from fedlora.federation.server.remote import Remote
from fedlora.recipe.modes import MODES
from fedlora.runs import experiment as experiments
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.runs.claim import claimed, look
from fedlora.runs.folder import RunFolder
from fedlora.runs.result import Result
from fedlora.tasks import Prepared, Sites

KNOWN = "federation.json"
"""The file in a run's folder with the run's name for sites and the information reported by them."""


def federate(
    experiment: Experiment,
    folder: Path,
    transport: Transport,
    rules: ServerPolicy,
    *,
    names: Sequence[str] = (),
    anywhere: bool = False,
    callbacks: Sequence[Callback] = (),
    begun: Callable[[], None] = lambda: None,
) -> Result:
    """Runs an experiment on sites, or resumes it.

    Args:
        experiment: the experiment to run.
        folder: the run's folder.
        transport: carries messages.
        rules: quorum and timeouts.
        names: names of the possible sites, for ``data.kind = "sites"``.
        anywhere: whether any site can take any client's turn.
        callbacks: called during the run, and on events of sites.
        begun: called once the run has claimed the folder.

    Raises:
        CheckpointError: the folder contains another experiment's run.
        ConfigError: the experiment cannot be run on sites, or another process is training in the folder.
        QuorumError: too few clients can be reached, or reply.
    """
    if not MODES[experiment.mode].sends:
        raise ConfigError(
            f"mode = {experiment.mode!r} does not communicate, so it has no work for sites; use `fedlora run`"
        )
    check_on_disk(experiment, "sites")
    noisy = any(phase.recipe.privacy.needs_uniform_mean for phase in experiment.phases)
    if noisy and rules.over_sample > 1:
        raise ConfigError("noise is calibrated for all sampled clients; leave over_sample at 1")
    if rules.min_clients > experiment.clients.per_round:
        raise ConfigError(
            f"min_clients = {rules.min_clients} client results are required, but clients.per_round = "
            f"{experiment.clients.per_round} clients are sampled in a round; lower min_clients"
        )
    if rules.over_sample > 1 and experiment.clients.sampling != "fixed":
        raise ConfigError(
            "over_sample samples more clients than are needed, and a Poisson sample has no fixed size; leave it at 1"
        )
    files, report = RunFolder(folder), CallbackList(callbacks)
    look(files, experiment, extend=False)
    ready = prepare(experiment) if not isinstance(experiment.data, Sites) else None
    model, data = located_model(experiment), located_data(experiment.data, experiment.root)
    task = ready.task if ready else experiment.task.prepare(model, data)
    with claimed(files, experiment, report.message, extend=False):
        if not (folder / KNOWN).exists():
            files.write_json(KNOWN, {"run": secrets.token_hex(8), "sites": {}})
        begun()
        remote = Remote(transport, rules, str(files.read_json(KNOWN)["run"]), anywhere, callbacks)
        if ready:
            remote.open(experiment, task, len(ready.population))
        data = ready or _of_sites(experiment, task, remote, files, names)
        return experiments.train(experiment, folder, None, callbacks, data, remote, None, held=True)


def _of_sites(
    experiment: Experiment, task: Prepared, remote: Remote, files: RunFolder, names: Sequence[str]
) -> FederatedData:
    """The federated data of sites with their own rows, after the run has been announced to them."""
    ordered = sorted(names)
    numbers = {name: number for number, name in enumerate(ordered)}
    # information on sites is kept while they are offline
    known = files.read_json(KNOWN)
    noisy = any(phase.recipe.local.example_privacy for phase in experiment.phases)
    if noisy and files.begun:
        remote.accounted = {name: size for name, (size, _) in known["sites"].items()}
    remote.open(experiment, task, len(ordered), numbers)
    for name, site_info in remote.site_infos.items():
        known["sites"][name] = [sum(site_info.sizes.values()), site_info.kind]
    files.write_json(KNOWN, known)
    sites = {name: known["sites"].get(name, [0, ""]) for name in ordered}
    absent = [name for name in ordered if name not in known["sites"]]
    if absent and (noisy or experiment.clients.tiers):
        raise ConfigError(
            f"site {absent[0]!r} has never connected, but tiers and the privacy accounting of examples need the "
            "size and kind of every site; set min_available to the number of sites"
        )
    sizes = {name: size for name, (size, _) in sites.items()}
    remote.accounted = sizes if noisy else {}
    return prepare_sites(experiment, task, sizes, {name: kind for name, (_, kind) in sites.items()})

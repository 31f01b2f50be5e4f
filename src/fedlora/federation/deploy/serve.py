"""The server of a federation: Flower's SuperLink on the loopback interface, and the rounds in this process."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import Experiment
from fedlora.core.errors import ConfigError, FedloraError, ProcessError
from fedlora.federation.deploy.certificates import check_dates
from fedlora.federation.deploy.federate import federate
from fedlora.federation.deploy.flower_versions import PRIVATE, check_flower
from fedlora.federation.deploy.folder import ServerConfig, public_keys
from fedlora.federation.deploy.processes import Child, quiet, wait_until_up, write_secret
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.federation.protocol.transport import Transport
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.runs.claim import held
from fedlora.runs.result import Result
from fedlora.tasks import Sites

if TYPE_CHECKING:
    from fedlora.federation.flower.runtime import Link

RESTARTS = 5
"""Number of consecutive attempts to start a SuperLink that does not come up."""
_REMEDY = "this federation's server is running; stop it, or make another federation for another run"


def serve(
    experiment: Experiment,
    folder: Path,
    federation: Path,
    *,
    rules: ServerPolicy | None = None,
    insecure: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Runs an experiment on the sites of a federation, or resumes it.

    Args:
        experiment: the experiment to run.
        folder: the run's folder.
        federation: the server's folder, written by ``init``.
        rules: quorum and timeouts; those in the federation's folder if absent.
        insecure: plain text without keys, reachable on the loopback interface only.
        callbacks: called during the run, and on events of sites.

    Raises:
        ConfigError: the federation's files are missing or contradict each other, a certificate has ended, its server
            runs already, or Flower is not installed.
        ProcessError: the SuperLink does not start.
        QuorumError: too few clients can be reached, or reply.
    """
    check_flower(PRIVATE)
    quiet()
    config = ServerConfig.load(federation)
    if insecure and isinstance(experiment.data, Sites):
        raise ConfigError("without TLS sites cannot be identified; leave --insecure out")
    keys_of = {} if insecure else public_keys(federation, config)
    rules, home = rules or config.rules, federation / "superlink"
    home.mkdir(exist_ok=True, mode=0o700)
    report = CallbackList(callbacks)
    if not insecure:
        check_dates([federation / "ca.crt", federation / "server.pem"], report)
    with (
        held(home, _REMEDY, report.message),
        superlink(federation, config.port, callbacks, insecure) as link,
        sites_of(link, keys_of) as transport,
    ):
        return federate(experiment, folder, transport, rules, names=config.sites, callbacks=callbacks)


@contextmanager
def sites_of(link: Link, public: Mapping[str, bytes]) -> Iterator[Transport]:
    """Starts a run on a SuperLink and yields the transport to its sites; closing it ends the run.

    Args:
        link: connection to the SuperLink.
        public: the public key file of each authorised site, by name; empty in plain text.
    """
    from fedlora.federation.flower import runtime
    from fedlora.federation.flower.app import GridTransport

    known = {name: runtime.key_of(key) for name, key in public.items()}
    runtime.register(link, known)
    run = runtime.start_run(link)
    with runtime.open_grid(link, run) as grid:
        yield GridTransport(grid, lambda: runtime.addresses(grid, known))


@contextmanager
def superlink(federation: Path, port: int, callbacks: Sequence[Callback], insecure: bool) -> Iterator[Link]:
    """A SuperLink with TLS, site authentication and a database, restarted whenever it ends.

    Args:
        federation: the server's folder.
        port: its port on the loopback interface.
        callbacks: receive a message when it is restarted.
        insecure: plain text without keys.

    Raises:
        ConfigError: the TLS files are missing.
        ProcessError: it does not start.
    """
    from fedlora.federation.flower.runtime import Link

    ca = None if insecure else federation / "ca.crt"
    command, home = _command(federation, port, insecure), federation / "superlink"
    home.mkdir(exist_ok=True, mode=0o700)
    secret = home / "secret"
    if not secret.exists():
        write_secret(secret, secrets.token_bytes(32))
    address = f"127.0.0.1:{port}"
    child = Child([*command, "--superexec-auth-secret-file", str(secret)], home)
    report = CallbackList(callbacks)
    ended = threading.Event()
    up = threading.Event()
    failures: list[str] = []

    def begin() -> bool:
        try:
            child.start()
            wait_until_up(child, address, ca)
        except (FedloraError, OSError) as error:
            failures.append(f"the SuperLink does not start: {error}")
            return False
        failures.clear()
        return True

    def keep() -> None:
        # a child dies with the thread that started it
        came = begin()
        up.set()
        while came and not ended.wait(0.2) and len(failures) < RESTARTS:
            if not child.alive:
                report.message(f"the SuperLink ended and is restarted ({child.last_words()[-200:]})")
                begin()
        child.stop()

    thread = threading.Thread(target=keep, name="superlink", daemon=True)
    thread.start()
    try:
        up.wait()
        if failures:
            raise ProcessError(failures[0])
        yield Link(address, ca.read_bytes() if ca else None, secret.read_bytes())
    finally:
        ended.set()
        thread.join(30)


def _command(federation: Path, port: int, insecure: bool) -> list[str]:
    """The command that starts a SuperLink; with TLS, sites must authenticate."""
    command = [
        sys.executable, "-m", "fedlora.federation.flower.superlink",
        "--host", "127.0.0.1", "--port", str(port), "--isolation", "process",
        "--disable-runtime-dependency-installation", "--database", str(federation / "superlink" / "state.db"),
    ]  # fmt: skip
    if insecure:
        return [*command, "--insecure"]
    for name, file in {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}.items():
        if not (federation / file).exists():
            raise ConfigError(
                f"{federation / file} does not exist; `fedlora federation init` writes it, and TLS needs it"
            )
        command += [f"--ssl-{name}", str(federation / file)]
    return [*command, "--enable-supernode-auth"]

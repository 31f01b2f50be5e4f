"""A site: Flower's SuperNode with the site's key, and one process that keeps the model loaded."""

from __future__ import annotations

import ipaddress
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedlora.core.errors import ConfigError
from fedlora.core.interrupts import sigterm_as_ctrl_c
from fedlora.federation.deploy.certificates import check_dates
from fedlora.federation.deploy.flower_versions import PRIVATE, check_flower
from fedlora.federation.deploy.processes import Child, free_port, quiet, stop_all, write_secret
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.runs.callbacks import Callback, CallbackList
from fedlora.runs.claim import held

FIRST_WAIT, LONGEST_WAIT = 2.0, 30.0
"""Seconds before a process that ended is restarted: the first, doubled each time up to the second."""
_REMEDY = (
    "this site has joined already; stop that one, or give each site a folder of its own as `state` in its site.toml"
)


def join(server: str, file: Path, callbacks: Sequence[Callback] = (), *, insecure: bool = False) -> None:
    """Works for a server until interrupted; reconnects after failures on either side.

    Args:
        server: host and port of the federation's proxy.
        file: the site's ``site.toml``; ``site.key`` and ``ca.crt`` are in the same folder.
        callbacks: receive messages about events.
        insecure: plain text without keys, on the loopback interface only.

    Raises:
        ConfigError: the files are missing or readable by others, the certificate has ended, plain text would leave
            this machine, or the site has joined already.
        KeyboardInterrupt: the user interrupted; all processes have been stopped.
    """
    check_flower(PRIVATE)
    quiet()
    with sigterm_as_ctrl_c():
        _work(server, file, CallbackList(callbacks), insecure)


def _work(server: str, file: Path, report: Callback, insecure: bool) -> None:
    host, _, port = server.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"{server!r} is not of the form host:port, such as fl.example.org:9443, with a port up to 65535"
        )
    if insecure and not _is_loopback(host):
        raise ConfigError(f"--insecure sends everything in plain text, and {host} is another machine; leave it out")
    settings = SiteConfig.load(file)
    trust = ["--insecure"] if insecure else _credentials(file.parent, report)
    with held(Path(settings.state), _REMEDY, report.message):
        _run(server, file, settings.name, str(settings.poll_seconds), trust, report)


def _run(server: str, file: Path, name: str, poll_seconds: str, trust: list[str], report: Callback) -> None:
    home = Path(tempfile.mkdtemp(prefix="fedlora-site-"))
    secret = home / "secret"
    inner = f"127.0.0.1:{free_port()}"
    node = Child(
        [
            sys.executable, "-m", "fedlora.federation.flower.supernode", poll_seconds,
            "--superlink", server, *trust, "--isolation", "process",
            "--host", "127.0.0.1", "--port", inner.rpartition(":")[2], "--superexec-auth-secret-file", str(secret),
        ],
        home / "supernode",
    )  # fmt: skip
    worker = Child(
        [sys.executable, "-m", "fedlora.federation.deploy.worker", inner, str(secret), str(file.absolute())],
        home / "worker",
    )
    try:
        write_secret(secret, secrets.token_bytes(32))
        _keep(name, {"the SuperNode": node, "the worker": worker}, report)
    finally:
        # a second interrupt does not cut the shutdown short, so no process is left behind
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        stop_all([node, worker])
        shutil.rmtree(home, ignore_errors=True)
        report.message(f"{name}: left")
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _keep(name: str, children: dict[str, Child], report: Callback) -> None:
    """Keeps processes running until interrupted; one that ends soon after its start is restarted after a longer wait.

    Warnings and errors in their logs are reported, each once.
    """
    waits = dict.fromkeys(children, FIRST_WAIT)
    due = dict.fromkeys(children, 0.0)
    said: set[str] = set()
    report.message(f"{name}: joining; Ctrl-C leaves")
    while True:
        for what, child in children.items():
            for line in child.complaints():
                if (sentence := re.sub(r"[\d.]+", "", line)) not in said:
                    said.add(sentence)
                    report.message(f"{name}: {line}")
            if child.alive:
                if time.monotonic() - child.started > 2 * LONGEST_WAIT:
                    waits[what] = FIRST_WAIT
                continue
            if child.started and not due[what]:
                due[what] = time.monotonic() + waits[what]
                report.message(f"{name}: {what} ended; restarting in {waits[what]:.0f} s ({child.last_words()[-200:]})")
                waits[what] = min(2 * waits[what], LONGEST_WAIT)
            elif time.monotonic() >= due[what]:
                child.start()
                due[what] = 0.0
        time.sleep(0.2)


def _credentials(folder: Path, report: Callback) -> list[str]:
    """Arguments for TLS and the site's key.

    Raises:
        ConfigError: a file is missing, the certificate has ended, or others can read the key.
    """
    ca, key = folder / "ca.crt", folder / "site.key"
    for each in (ca, key):
        if not each.exists():
            raise ConfigError(f"{each} does not exist; it is in the folder that the server's operator provided")
    if key.stat().st_mode & 0o077:
        raise ConfigError(
            f"{key} can be read by other users; chmod 600 it, and ask for a new key if it may have been read"
        )
    check_dates([ca], report)
    return ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

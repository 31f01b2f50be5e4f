"""Integration through Flower's internals: runs without a shell command, and apps that persist between messages.

Flower starts a process for every message of an app. Here the server's loop is the server app, in the calling process,
and a site's process handles one message after another.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.app import Context, Error, Message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlora.core.errors import ConfigError, ProcessError
from fedlora.federation.flower.uploads import believe

believe(RuntimeHttpClient)
POLL = 0.2
PATIENCE = 120.0
"""Seconds allowed for a run to start."""
LONGEST_OUTAGE = 600.0
"""Seconds for which a SuperLink may be unavailable."""
_PROJECT = b"""[project]
name = "fedlora-app"
version = "0.1.0"
description = "Runs the installed fedlora"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedlora"
[tool.flwr.app.components]
serverapp = "fedlora.federation.flower.app:server_app"
clientapp = "fedlora.federation.flower.app:client_app"
[tool.flwr.app.config]
"""


class Link(NamedTuple):
    """The endpoint of a Flower process on this machine.

    Args:
        address: host and port.
        ca: the certificate of the authority that signed its certificate; None for plain text.
        secret: the secret that authenticates our requests for tasks.
    """

    address: str
    ca: bytes | None
    secret: bytes


def _control(link: Link) -> ControlHttpClient:
    return ControlHttpClient.from_server_address(
        server_address=link.address,
        insecure=link.ca is None,
        root_certificates=link.ca,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )


def key_of(public: bytes) -> bytes:
    """The key of a public key file in the format in which Flower lists it."""
    pem: bytes = serialization.load_ssh_public_key(public).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def register(link: Link, keys: dict[str, bytes]) -> None:
    """Makes the SuperLink accept only these sites.

    Args:
        link: connection to the SuperLink.
        keys: keys as returned by ``key_of``, by name of the site.

    Raises:
        ConfigError: a key was removed earlier, and Flower never accepts such a key again.
    """
    control = _control(link)
    try:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        known = {bytes(node.public_key): node.node_id for node in nodes if not node.unregistered_at}
        removed = {bytes(node.public_key) for node in nodes} - known.keys()
        for name, key in keys.items():
            if key in removed:
                raise ConfigError(
                    f"the key of site {name!r} was removed from this server earlier, and Flower does not accept it "
                    "again; make a new one with ssh-keygen -t ecdsa -b 384"
                )
            if key not in known:
                control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
        for key in known.keys() - set(keys.values()) if keys else ():
            control.UnregisterNode(UnregisterNodeRequest(node_id=known[key]))
    finally:
        control.close()


def start_run(link: Link) -> int:
    """Starts a run, whose server app task can then be acquired; returns the run's id."""
    fab, _ = build_fab_from_files({"pyproject.toml": _PROJECT})
    control = _control(link)
    try:
        digest = hashlib.sha256(fab).hexdigest()
        return int(control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, fab, {})))).run_id)
    finally:
        control.close()


def _runtime(link: Link, token: str | None = None) -> RuntimeHttpClient:
    retry = make_simple_http_retry_invoker()
    signed = SuperExecAuthHttpInterceptor(
        master_secret=link.secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
    )
    return RuntimeHttpClient.from_server_address(
        server_address=link.address,
        insecure=link.ca is None,
        root_certificates=link.ca,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            signed if token is None else RuntimeTokenHttpInterceptor(token),
        ],
        retry_invoker=retry,
    )


def _acquire(client: RuntimeHttpClient, kind: TaskType, seconds: float) -> str:
    """Waits for a task; returns its token.

    Raises:
        ProcessError: no task became available.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
        if answer.HasField("task") and answer.token:
            return str(answer.token)
        time.sleep(POLL)
    raise ProcessError(f"the SuperLink gave no task in {seconds:.0f} s; see its log")


class _Grid(HttpGrid):  # type: ignore[misc]
    """A grid that treats a message as not sent if the SuperLink was down for longer than it keeps partial messages."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        try:
            tickets: Iterable[str] = super().push_messages(messages)
            return tickets
        except ObjectPushError as error:
            logging.getLogger("fedlora").warning("a message was not stored and is sent again: %s", error)
            return []


@contextmanager
def open_grid(link: Link, run: int) -> Iterator[Grid]:
    """The grid of a run started by ``start_run``; closing it ends the run.

    Args:
        link: connection to the SuperLink.
        run: the run's id; earlier runs that were started but never acquired are ended.

    Raises:
        ProcessError: the SuperLink can no longer be reached, or abandoned the run.
    """
    client = _runtime(link)
    try:
        while True:
            token = _acquire(client, TaskType.SERVER_APP, PATIENCE)
            grid = _Grid(
                runtime_api_address=link.address, insecure=link.ca is None, root_certificates=link.ca, token=token
            )
            grid._retry_invoker.max_time = LONGEST_OUTAGE
            runtime = grid._runtime_client
            pulled = runtime.PullTaskInput(PullTaskInputRequest())
            context = context_from_proto(pulled.context)
            if pulled.run.run_id == run:
                break
            _end(grid, context, SubStatus.FAILED, "it was never started")
    finally:
        client.close()
    heart = HeartbeatSender(make_task_heartbeat_fn_http(runtime))
    heart.start()
    TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, pulled.run.run_id
    TaskIdentity.node_id = pulled.context.node_id
    grid.set_run(run_from_proto(pulled.run))
    status, details = SubStatus.FAILED, "it was stopped"
    try:
        yield grid
        status, details = SubStatus.COMPLETED, ""
    except (httpx.HTTPError, RunNotRunningException) as error:
        raise ProcessError(
            f"the SuperLink can no longer be reached, or aborted the run ({type(error).__name__}); run the same "
            "command to resume"
        ) from error
    finally:
        heart.stop()
        _end(grid, context, status, details)


def _end(grid: HttpGrid, context: Context, status: str, details: str) -> None:
    """Reports the final status of a run to the SuperLink, if it is reachable."""
    grid._retry_invoker.max_tries = 1
    request = PushTaskOutputRequest(context=context_to_proto(context), sub_status=status, details=details)
    try:
        grid._runtime_client.PushTaskOutput(request)
    except (httpx.HTTPError, RunNotRunningException) as error:
        logging.getLogger("fedlora").debug("the end of the run could not be reported: %s", error)
    grid.close()


def addresses(grid: Grid, keys: dict[str, bytes]) -> dict[str, int]:
    """The sites that are online: node id by name; nodes with unknown keys are ignored."""
    names = {key: name for name, key in keys.items()}
    found = {}
    for node in grid.get_nodes():
        name = names.get(bytes(node.public_key)) if keys else str(node.node_id)
        if name is not None:
            found[name] = node.node_id
    return dict(sorted(found.items()))


def take_messages(link: Link, handle: Callable[[Message], Message]) -> None:
    """Handles a SuperNode's messages one after another, indefinitely; never executes app code sent with them.

    Args:
        link: connection to the SuperNode.
        handle: returns the reply; an exception becomes an error reply.
    """
    client = _runtime(link)
    while True:
        answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not (answer.HasField("task") and answer.token):
            time.sleep(POLL)
            continue
        task = _runtime(link, str(answer.token))
        heart = HeartbeatSender(make_task_heartbeat_fn_http(task))
        heart.start()
        try:
            message, context, _, _ = pull_task_input(task)
            try:
                reply, status, details = handle(message), SubStatus.COMPLETED, ""
            except Exception as error:
                logging.getLogger("fedlora").exception("a message could not be answered")
                # its message may quote rows
                status, details = SubStatus.FAILED, f"{type(error).__name__}; see the site's own log"
                reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=details), reply_to=message)
            push_message(task, reply, context)
            push_task_output(task, context, status, details)
        except (Exception, RunNotRunningException) as error:  # the SuperNode misses the heartbeat and reports it
            logging.getLogger("fedlora").warning("a message was abandoned: %s: %s", type(error).__name__, error)
        finally:
            heart.stop()
            task.close()

"""Child processes of a federation: logs, endings, secrets, and waiting until one answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedlora.core.errors import ConfigError, ProcessError
from fedlora.federation.deploy.processes import Child, free_port, stop_all, wait_until_up, write_secret
from fedlora.federation.deploy.simulate import gpu_share, gpus_for

SERVER = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def child(home: Path, code: str, *arguments: str, grace: float = 10.0) -> Child:
    return Child([sys.executable, "-c", code, *arguments], home, grace=grace)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_is_waited_for_and_ends_when_it_is_asked(tmp_path: Path) -> None:
    port = free_port()
    with child(tmp_path / "server", SERVER, str(port)) as server:
        wait_until_up(server, f"127.0.0.1:{port}", None)
        assert server.alive
        server.ask()
        server.ask()  # a second time changes nothing
        until(lambda: not server.alive)
    assert (tmp_path / "server").stat().st_mode & 0o777 == 0o700


def test_one_that_ends_at_once_is_told_with_its_last_error(tmp_path: Path) -> None:
    code = "print('INFO begun'); print('ERROR no such key'); print('and why'); raise SystemExit(3)"
    with child(tmp_path / "broken", code) as broken:
        until(lambda: not broken.alive)
        with pytest.raises(ProcessError, match="ended at once: ERROR no such key and why"):
            wait_until_up(broken, "127.0.0.1:1", None)


def test_one_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.federation.deploy.processes.PATIENCE", 0.3)
    address = f"127.0.0.1:{free_port()}"
    with (
        child(tmp_path / "mute", "import time; time.sleep(60)") as mute,
        pytest.raises(ProcessError, match=r"nothing answers at 127\.0\.0\.1"),
    ):
        wait_until_up(mute, address, None)
    assert not mute.alive


def test_what_does_not_end_is_ended(tmp_path: Path) -> None:
    both = [child(tmp_path / str(number), STUBBORN, grace=0.2).start() for number in range(2)]
    for one in both:
        until(lambda one=one: "up" in one.last_words())
    stop_all(both)
    assert not any(one.alive for one in both)
    never = child(tmp_path / "never", "")
    never.stop()
    assert (never.alive, never.last_words(), never.complaints()) == (False, "", [])


def test_complaints_are_told_once(tmp_path: Path) -> None:
    code = "import sys; print('WARNING slow', flush=True); sys.stdin.read(); print('fine'); print('ERROR late')"
    with child(tmp_path / "talker", code) as talker:
        until(lambda: not talker.alive)
        assert talker.complaints() == ["WARNING slow", "ERROR late"]
        assert talker.complaints() == []


def test_a_secret_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"abc")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "key", b"other")
    assert (tmp_path / "key").read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("gpus", "workers", "share"), [(0, 4, 0.0), (1, 4, 0.25), (2, 2, 1.0), (2, 3, 0.5), (4, 3, 1.0)]
)
def test_a_worker_of_ray_takes_one_gpu_or_a_part_of_one(gpus: int, workers: int, share: float) -> None:
    assert gpu_share(gpus, workers) == share


def test_ray_hands_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [gpus_for(name) for name in ("auto", "cuda", "cpu")] == [2, 2, 0]
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1 before the program starts"):
        gpus_for("cuda:1")

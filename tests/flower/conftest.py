"""One federation of real processes for all tests of this folder: TLS, keys, a SuperLink, four sites."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from fixtures.fake_transport import Told
from fixtures.tiny import make_rows, save_model, write_rows

pytest.importorskip("flwr", reason="needs the extra flower: make flower")

from fedlora.config import Experiment
from fedlora.federation.deploy import demo, folder, processes, serve
from fedlora.federation.deploy.federate import federate
from fedlora.federation.deploy.processes import Child
from fedlora.federation.flower.runtime import Link
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.runs.result import Result

SITES = 4
# Ray's own limit; fedlora says so where it is met
needs_ray = pytest.mark.skipif(" " in sys.executable, reason="Ray does not work where the path of Python has a space")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(str(item.fspath)).parents:
            item.add_marker(pytest.mark.flower)
            item.add_marker(pytest.mark.filterwarnings("default"))  # Flower's own are no errors of ours


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny world that other processes can read, and settings that they inherit."""
    place = tmp_path_factory.mktemp("flower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setenv("FEDLORA_CACHE", str(place / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        save_model(place / "bert")
        write_rows(place / "train.jsonl", make_rows(72, 0))
        write_rows(place / "test.jsonl", [{**row, "user": "other"} for row in make_rows(24, 1)])
        yield place
    assert leftovers(place) == []


class Federation:
    """A server and its sites, as their users would start them, and what tests do to them."""

    def __init__(self, place: Path, count: int = SITES) -> None:
        self.place, self.count = place, count
        self.names = [f"site-{number}" for number in range(count)]
        if not place.exists():
            folder.init(place, self.names, "localhost", port=processes.free_port())
        self.config = folder.ServerConfig.load(place / "server")
        self.children = {name: self.site(name) for name in self.names}
        self.link: Link | None = None
        self.told = Told()

    def site(self, name: str, **settings: Any) -> Child:
        import tomli_w

        number = self.names.index(name)
        document = {"name": name, "share": {"number": number, "of": self.count}, "poll_seconds": 0.2, **settings}
        where = self.place / "sites" / name
        (where / "site.toml").write_text(tomli_w.dumps(document))
        port = self.config.port
        command = [sys.executable, "-m", "fedlora", "join", f"127.0.0.1:{port}"]
        return Child([*command, "--site-config", str(where / "site.toml")], where / "processes", grace=40.0)

    def run(
        self,
        experiment: Experiment,
        where: Path,
        rules: ServerPolicy | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> Result:
        assert self.link is not None
        keys = folder.public_keys(self.place / "server", self.config)
        with serve.sites_of(self.link, keys) as transport:
            before()
            return federate(
                experiment, where, transport, rules or ServerPolicy(min_clients=1, round_timeout=120), names=self.names,
                callbacks=[self.told],
            )  # fmt: skip

    def __enter__(self) -> Federation:
        self._superlink = serve.superlink(self.place / "server", self.config.port, [self.told], False)
        self.link = self._superlink.__enter__()
        for child in self.children.values():
            child.start()
        return self

    def __exit__(self, *error: Any) -> None:
        processes.stop_all(self.children.values())
        self._superlink.__exit__(None, None, None)


@pytest.fixture(scope="session")
def federation(root: Path) -> Iterator[Federation]:
    with Federation(root / "federation") as started:
        yield started


def processes_of(text: str) -> list[int]:
    """The processes whose command has ``text`` in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in command:
                found.append(int(entry.name))
    return found


def leftovers(place: Path) -> list[str]:
    """Processes of ours that are still there after a while."""
    for _ in range(50):
        found = processes_of(str(place))
        if not found:
            return []
        time.sleep(0.2)
    return [
        subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout for pid in found
    ]


__all__ = ["SITES", "Federation", "demo", "federation", "needs_ray", "processes_of", "root"]

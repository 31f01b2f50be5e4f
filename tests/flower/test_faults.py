"""What goes wrong over real processes: killed workers, killed sites, a killed server, garbage, a slow link."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from fixtures.malformed_replies import WRONGS
from fixtures.tiny import document, experiment, ledger
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import http_grid

import fedlora
from fedlora import config
from fedlora.config import Experiment
from fedlora.federation.deploy import folder, serve
from fedlora.federation.deploy.processes import Child, free_port
from fedlora.federation.protocol.policies import ServerPolicy
from fedlora.rounds.checkpoint import load_state
from fedlora.runs.experiment import Stopped

from .conftest import Federation, processes_of

SLOW = "method.local.epochs=60"
"""Turns that last about a second, so that something can happen in between."""
PATIENT = ServerPolicy(min_available=8, round_timeout=240, rejoin_timeout=200)


def chosen(root: Path, *overrides: str, rounds: int = 3) -> Experiment:
    common = ("clients.per_round=8", "clients.num=8", "method.kind='flasc'", "method.memory='last_round'")
    return experiment(root, "lora", *common, "method.feedback=true", *overrides, rounds=rounds)


def params(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_state(sorted((folder / "checkpoints").glob("round-*"))[-1])[0].params)


def assert_same(one: Path, other: Path) -> None:
    def plain(folder: Path) -> list[dict[str, Any]]:
        return [{**row, "warnings": []} for row in ledger(folder)]

    assert plain(one) == plain(other)
    left, right = params(one), params(other)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@contextmanager
def at(condition: Callable[[], bool], deed: Callable[[], None], done: list[str]) -> Iterator[None]:
    """Does something as soon as something holds, from the side."""

    def watch() -> None:
        for _ in range(3000):
            if condition():
                deed()
                done.append("done")
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(1)


def rounds_done(folder: Path) -> int:
    file = folder / "ledger.jsonl"
    return file.read_text().count("\n") - 1 if file.exists() else -1


def kill(text: str, among: str) -> None:
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in processes_of(text)}
    victims = [pid for pid, command in commands.items() if among in command]
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def test_a_client_that_raises_is_refused_and_named(root: Path, federation: Federation) -> None:
    where, done = root / "raises", []
    state = federation.place / "sites" / "site-1" / "state"

    def setup() -> Path:
        run = json.loads((where / "federation.json").read_text())["run"]
        return Path(state / run / "setup-0.bin")

    def spoil() -> None:
        # where a file should be there is a folder: an error of the site's own, not of a message
        setup().unlink()
        setup().mkdir()

    with at(lambda: rounds_done(where) >= 1 and setup().is_file(), spoil, done):
        result = federation.run(
            chosen(root, SLOW), where, ServerPolicy(min_clients=1, min_available=8, round_timeout=120)
        )
    assert done
    told = [row.refused for row in result.rows[1:]]
    assert {client for row in told for client in row} == {"1", "5"}
    assert "Flower's code 2: IsADirectoryError" in told[-1]["5"]
    assert result.rounds == 3


def test_a_killed_worker_is_started_again_and_asked_again(root: Path, federation: Federation) -> None:
    fedlora.run(chosen(root, SLOW), root / "undisturbed")
    where, done = root / "worker", []
    site = str(federation.place / "sites" / "site-2" / "site.toml")
    with at(lambda: rounds_done(where) >= 1, lambda: kill(site, "deploy.worker"), done):
        federation.run(chosen(root, SLOW), where, PATIENT)
    assert done
    assert_same(where, root / "undisturbed")


def test_a_site_killed_mid_round_and_back_changes_nothing(root: Path, federation: Federation) -> None:
    where, done = root / "site", []
    child = federation.children["site-3"]

    def deed() -> None:
        assert child.process
        os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
        child.start()

    # a child dies with the thread that started it
    keep = threading.Event()

    def deed_and_stay() -> None:
        deed()
        done.append("done")
        keep.wait(600)

    with at(lambda: rounds_done(where) >= 1, deed_and_stay, []):
        federation.run(chosen(root, SLOW), where, PATIENT)
    assert done
    keep.set()
    assert_same(where, root / "undisturbed")
    time.sleep(1)
    federation.children["site-3"] = federation.site("site-3").start()
    child.stop()


def test_a_superlink_killed_mid_round_comes_back_with_its_database(root: Path, federation: Federation) -> None:
    where, done = root / "superlink", []
    text = str(federation.place / "server" / "superlink" / "state.db")
    with at(lambda: rounds_done(where) >= 1, lambda: kill(text, "flower.superlink"), done):
        federation.run(chosen(root, SLOW), where, PATIENT)
    assert done
    assert any("restarted" in text for text in federation.told.messages)
    assert_same(where, root / "undisturbed")


def test_objects_whose_answers_are_lost_are_not_taken_for_refused(
    root: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what the client does by itself where the connection breaks before the answer: it asks once more
    once = RuntimeHttpClient._unary_unary
    doubled = []

    def twice(self: RuntimeHttpClient, **request: Any) -> Any:
        if request["path"].endswith("push-object"):
            doubled.append(once(self, **request))
        return once(self, **request)

    one = experiment(root, "lora", "clients.per_round=8", "clients.num=8", rounds=1)
    fedlora.run(one, root / "doubled-serial")
    monkeypatch.setattr(RuntimeHttpClient, "_unary_unary", twice)
    federation.run(one, root / "doubled", PATIENT)
    assert len(doubled) > 8
    assert_same(root / "doubled", root / "doubled-serial")


def test_a_run_stopped_amid_an_upload_leaves_sites_that_work(
    root: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = http_grid.push_objects, []

    def torn(objects: dict[str, Any], push_object_fn: Callable[[str, bytes], None], **which: Any) -> None:
        if rounds_done(root / "torn") >= 0:
            name = next(iter(objects))
            push_object_fn(name, objects[name].deflate())
            time.sleep(4)  # until its site waits for the rest
            stopped.append(name)
            raise KeyboardInterrupt
        whole(objects, push_object_fn, **which)

    monkeypatch.setattr(http_grid, "push_objects", torn)
    one = experiment(root, "lora", "clients.per_round=8", "clients.num=8", rounds=1)
    with pytest.raises((Stopped, KeyboardInterrupt)):
        federation.run(one, root / "torn", PATIENT)
    monkeypatch.undo()
    assert len(stopped) == 1
    federation.run(one, root / "torn", ServerPolicy(min_available=8, round_timeout=60))
    assert_same(root / "torn", root / "doubled-serial")


def test_after_a_total_loss_of_the_server_the_run_goes_on_from_its_checkpoint(root: Path) -> None:
    where = root / "total"
    with (
        Federation(root / "total-federation", 2) as first,
        pytest.raises((Stopped, KeyboardInterrupt)),
        at(lambda: rounds_done(where) >= 1, lambda: os.kill(os.getpid(), signal.SIGINT), []),
    ):
        first.run(chosen(root, SLOW), where, PATIENT)
    assert 1 <= rounds_done(where) < 3
    for file in (root / "total-federation" / "server" / "superlink").glob("state.db*"):
        file.unlink()
    with Federation(root / "total-federation", 2) as second:
        second.run(chosen(root, SLOW), where, PATIENT)
    assert_same(where, root / "undisturbed")


LIES = dict(list(WRONGS.items())[::4])
"""Some of what sites may answer; ``test_remote.py`` has all, without a network."""
ROGUE = """
import sys
if "fedlora.federation.deploy.worker" in sys.orig_argv:
    from fedlora.federation.protocol import envelopes
    from fedlora.federation.site import site
    from fixtures.malformed_replies import WRONGS
    honest, changes, old = site.Site.answer, [one[0] for one in WRONGS.values()][::4], []
    def answer(self, raw):
        found, head = honest(self, raw), envelopes.read(raw).head
        if head["kind"] == "job" and head["client"] == 3:
            old.append(found)
            turn = head["progress"][0]
            return changes[turn - 1](found, old) if turn else found
        return found
    site.Site.answer = answer
"""
"""Python runs this at the start of every process of the site; its worker then lies, in another way each round."""


def test_a_site_that_answers_wrongly_is_refused_each_time_and_the_rounds_go_on(
    root: Path, federation: Federation
) -> None:
    (root / "rogue").mkdir()
    (root / "rogue" / "sitecustomize.py").write_text(ROGUE)
    tests = Path(__file__).parents[1]
    federation.children["site-3"].stop()
    rogue = federation.site("site-3")
    rogue.env = {"PYTHONPATH": os.pathsep.join(map(str, (root / "rogue", tests)))}
    rounds = 1 + len(LIES)
    lies = experiment(root, "lora", "clients.per_round=8", "clients.num=8", rounds=rounds)
    try:
        with rogue:
            result = federation.run(lies, root / "rogue-run", PATIENT)
    finally:
        federation.children["site-3"].start()
    assert [set(row.refused) for row in result.rows[1:]] == [set()] + [{"3"}] * len(LIES)
    for (wrong, (_, why)), row in zip(LIES.items(), result.rows[2:], strict=True):
        assert re.search(why, row.refused["3"]), wrong


def test_the_server_app_alone_runs_what_its_configuration_names(root: Path) -> None:
    from flwr.app import Context, RecordDict

    from fedlora.federation.flower import app

    file = root / "app.toml"
    file.write_text(tomli_w.dumps(document(root, "flasc", "clients.num=4", "clients.per_round=4", rounds=2)))
    with Federation(root / "app-federation", 1) as started:
        keys = folder.public_keys(started.place / "server", started.config)
        assert started.link is not None
        with serve.sites_of(started.link, keys) as transport:
            assert isinstance(transport, app.GridTransport)
            names = {"config": str(file), "folder": str(root / "app-run")}
            app.server_app(transport._grid, Context(1, 0, {}, RecordDict(), names))
    fedlora.run(config.load(file), root / "app-serial")
    assert_same(root / "app-run", root / "app-serial")


class SlowLink:
    """A TCP proxy that lets a number of bytes a second through, each way."""

    def __init__(self, target: int, rate: float) -> None:
        self.rate, self.target = rate, target
        self.listener = socket.create_server(("127.0.0.1", free_port()))
        self.port = self.listener.getsockname()[1]
        self.bytes = {"down": 0, "up": 0}
        self.closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closed:
            try:
                inner, _ = self.listener.accept()
            except OSError:
                return
            outer = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, way in ((inner, outer, "up"), (outer, inner, "down")):
                threading.Thread(target=self._copy, args=(source, sink, way), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while piece := source.recv(16384):
                if self.rate:
                    time.sleep(len(piece) / self.rate)
                sink.sendall(piece)
                self.bytes[way] += len(piece)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.closed = True
        self.listener.close()


def behind(federation: Federation, link: SlowLink, name: str) -> Child:
    """A site that reaches the server through a link."""
    child = federation.site(name)
    child.command = [part.replace(f":{federation.config.port}", f":{link.port}") for part in child.command]
    return child


@pytest.mark.slow
def test_twenty_megabytes_over_a_slow_link_arrive(root: Path) -> None:
    from fixtures.tiny import save_model
    from transformers import BertConfig, BertForSequenceClassification

    # 5 million weights that are all trained: 20 MB
    save_model(root / "larger")
    layers = {"num_hidden_layers": 6, "num_attention_heads": 4}
    shape = BertConfig(vocab_size=64, hidden_size=256, intermediate_size=1024, **layers)
    BertForSequenceClassification(shape).save_pretrained(str(root / "larger"))
    settings = ("clients.num=1", "clients.per_round=1", "method.local.max_steps=1")
    large = experiment(root, "full", f"model.path={root / 'larger'}", *settings, rounds=1)
    fedlora.run(large, root / "large-serial")
    federation = Federation(root / "slow-federation", 1)
    link = SlowLink(federation.config.port, 250_000)
    federation.children = {"site-0": behind(federation, link, "site-0")}
    with federation:
        result = federation.run(large, root / "large", ServerPolicy(round_timeout=540))
    link.close()
    assert sum(result.down_bytes.values()) > 18e6
    assert sum(result.up_bytes.values()) > 18e6
    assert_same(root / "large", root / "large-serial")
    assert link.bytes["down"] < 1.1 * sum(result.down_bytes.values())


def test_what_flower_adds_on_the_socket_is_small(root: Path) -> None:
    federation = Federation(root / "counted-federation", 1)
    link = SlowLink(federation.config.port, 0)
    federation.children = {"site-0": behind(federation, link, "site-0")}
    with federation:
        one = experiment(root, "full", "clients.num=1", "clients.per_round=1", rounds=4)
        result = federation.run(one, root / "counted")
    link.close()
    payload = sum(result.down_bytes.values()) + sum(result.up_bytes.values())
    carried = sum(link.bytes.values())
    print(f"payload {payload:,} bytes, on the socket {carried:,}: {(carried - payload) / 4:,.0f} a round beside")
    assert payload < carried < payload + 4 * 200_000


def test_the_server_does_not_go_on_in_plain_text_without_certificates(root: Path) -> None:
    with (
        pytest.raises(fedlora.FedloraError, match="and TLS needs it"),
        serve.superlink(root / "nowhere", free_port(), (), False),
    ):
        pass

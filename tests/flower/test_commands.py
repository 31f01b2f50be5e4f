"""The commands as their users type them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomli_w
from fixtures.tiny import document, ledger

import fedlora
from fedlora.cli import main as cli
from fedlora.config import parse
from fedlora.core.errors import ConfigError
from fedlora.federation.deploy import flower_versions as versions
from fedlora.federation.deploy import folder, join
from fedlora.federation.deploy.serve import serve
from fedlora.federation.deploy.simulate import simulate
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.runs.callbacks import Callback
from fedlora.runs.claim import held

from .conftest import needs_ray, processes_of


def fedlora_said(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fedlora", *arguments], capture_output=True, text=True, timeout=600)


def test_the_demo_is_a_whole_federation_and_takes_itself_down(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    values = document(root, "lora", "clients.num=4", "clients.per_round=4", rounds=2)
    file = root / "demo.toml"
    file.write_text(tomli_w.dumps(values))
    place = root / "demo"
    out = ("--out", str(place / "run"), "--federation", str(place / "federation"))
    done = fedlora_said("federation", "demo", str(file), "--sites", "2", *out, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 2
    assert "site-1 connected with 36 examples of 2 clients" in done.stderr
    assert processes_of(str(place)) == []
    assert list(tmp_path.iterdir()) == []
    fedlora.run(parse(values), root / "demo-serial")
    assert ledger(place / "run") == ledger(root / "demo-serial")
    assert (place / "run" / "adapter" / "adapter_model.safetensors").exists()


@needs_ray
def test_the_simulation_is_one_option_away(root: Path) -> None:
    values = document(root, "flasc", "clients.num=4", "clients.per_round=4", rounds=2)
    file = root / "simulated.toml"
    file.write_text(tomli_w.dumps(values))
    done = fedlora_said("run", str(file), "--engine", "flower-simulation", "--out", str(root / "simulated"))
    assert done.returncode == 0, done.stderr
    fedlora.run(parse(values), root / "simulated-serial")
    assert ledger(root / "simulated") == ledger(root / "simulated-serial")


@needs_ray
def test_a_run_under_ray_that_cannot_go_well_ends_with_its_sentence(root: Path) -> None:
    values = document(root, "lora", "clients.num=4", "clients.per_round=4", "method.local.optimizer.lr=1e30", rounds=2)
    file = root / "hopeless.toml"
    file.write_text(tomli_w.dumps(values))
    done = fedlora_said("run", str(file), "--engine", "flower-simulation", "--out", str(root / "hopeless"))
    assert done.returncode == 2
    assert "lower local.optimizer.lr" in done.stderr


def test_where_ray_would_wait_for_ever_it_is_told_so(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my tools/python")
    with pytest.raises(ConfigError, match="a space in the path of Python"):
        simulate(parse(document(root)), tmp_path / "run")


def test_serve_and_join_say_what_is_missing(root: Path, tmp_path: Path) -> None:
    file = root / "plain.toml"
    file.write_text(tomli_w.dumps(document(root)))
    done = fedlora_said("serve", str(file), "--federation", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "`fedlora federation init DIR --sites N` writes a federation" in done.stderr
    done = fedlora_said("join", "localhost:1", "--site-config", str(tmp_path / "site.toml"))
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
    done = fedlora_said("federation", "init", str(tmp_path / "fed"))
    assert done.returncode == 2
    assert "--sites 3" in done.stderr


def test_rows_are_beside_the_name_of_the_site_s_file_also_if_it_is_a_link(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder.init(tmp_path / "fed", ["a"], "localhost")
    place = tmp_path / "fed" / "sites" / "a"
    (place / "site.toml").rename(tmp_path / "managed.toml")
    (place / "site.toml").symlink_to(tmp_path / "managed.toml")
    given: list[str] = []
    monkeypatch.setattr(join, "_keep", lambda name, children, report: given.extend(children["the worker"].command))
    join.join("localhost:1", place / "site.toml")
    assert SiteConfig.load(Path(given[-1])).rows == str(place / "rows.jsonl")


def test_one_site_joins_once_and_one_server_serves_once(root: Path, tmp_path: Path) -> None:
    folder.init(tmp_path / "fed", ["a"], "localhost")
    place, quiet = tmp_path / "fed" / "sites" / "a", Callback()
    with held(place / "state", "", quiet.message), pytest.raises(ConfigError, match="this site has joined already"):
        join.join("localhost:1", place / "site.toml")
    server = tmp_path / "fed" / "server"
    with (
        held(server / "superlink", "", quiet.message),
        pytest.raises(ConfigError, match=r"in use by process .*; this federation's server is running"),
    ):
        serve(parse(document(root)), tmp_path / "run", server)
    assert not (tmp_path / "run").exists()


def test_a_federation_is_written_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_secret", full)
        with pytest.raises(ConfigError, match=r"fed cannot be written \(No space left on device\); make room"):
            folder.init(tmp_path / "fed", ["a"], "localhost")
    assert not (tmp_path / "fed").exists()
    folder.init(tmp_path / "fed", ["a"], "localhost")
    assert (tmp_path / "fed" / "authority" / "ca.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("version", ["1.28.0", "1.43.0", "2.0.0"])
def test_another_version_of_flower_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ConfigError, match=f"Flower {version} is installed, and this needs 1.41 or newer, below 1.43"):
        versions.check_flower(versions.PRIVATE)


def test_no_flower_at_all_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", gone)
    with pytest.raises(ConfigError, match="pip install"):
        versions.check_flower(versions.PUBLIC)


def test_help_does_not_wait_for_flower() -> None:
    heavy = "any(name.split('.')[0] in ('flwr', 'ray', 'torch') for name in sys.modules)"
    code = f"import sys, fedlora.cli.main; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert cli.app


@pytest.mark.parametrize("process", ["supernode", "superlink"])
def test_flower_s_own_processes_hold_no_torch(process: str) -> None:
    code = f"import sys, fedlora.federation.flower.{process}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

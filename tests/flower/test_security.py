"""Who gets in, what a key file may look like, and what is never sent or written."""

from __future__ import annotations

import os
import shutil
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fixtures.fake_transport import Told
from fixtures.tiny import experiment

from fedlora.core.errors import ConfigError
from fedlora.federation.deploy import certificates, folder, join, keys, serve
from fedlora.federation.deploy.processes import Child, free_port, write_secret
from fedlora.federation.protocol.policies import ServerPolicy, SiteConfig

from .conftest import Federation, processes_of


def test_keys_are_their_owner_s_alone(tmp_path: Path) -> None:
    folder.init(tmp_path / "fed", ["clinic", "hospital"], "fl.example.org")
    secrets = sorted((tmp_path / "fed").rglob("*.key"))
    assert len(secrets) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets} == {0o600}
    assert not any(
        b"PRIVATE KEY" in file.read_bytes()
        for file in (tmp_path / "fed").rglob("*")
        if file.is_file() and file.suffix != ".key"
    )
    with pytest.raises(ConfigError, match="never overwritten"):
        folder.init(tmp_path / "fed", ["a"], "localhost")
    with pytest.raises(FileExistsError):
        write_secret(secrets[0], b"")
    loaded = SiteConfig.load(tmp_path / "fed" / "sites" / "clinic" / "site.toml")
    assert loaded.name == "clinic"
    assert folder.ServerConfig.load(tmp_path / "fed" / "server").rules == ServerPolicy(min_available=2)


def test_keys_that_cannot_be_are_named(tmp_path: Path) -> None:
    folder.init(tmp_path / "fed", ["clinic", "hospital"], "fl.example.org")
    server = tmp_path / "fed" / "server"
    config, file = folder.ServerConfig.load(server), server / "sites" / "hospital.pub"
    other = serialization.PublicFormat.OpenSSH
    ed25519 = Ed25519PrivateKey.generate().public_key().public_bytes(serialization.Encoding.OpenSSH, other)
    for wrong in (b"", b"garbage", b"ssh-foo AAAA", ed25519, (tmp_path / "fed/sites/hospital/site.key").read_bytes()):
        file.write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"hospital\.pub is not the public key of a site"):
            folder.public_keys(server, config)
    file.write_bytes((server / "sites" / "clinic.pub").read_bytes().strip() + b" me@here\n")
    with pytest.raises(ConfigError, match="sites 'clinic' and 'hospital' have the same public key"):
        folder.public_keys(server, config)
    with pytest.raises(ConfigError, match="sites names a site twice"):
        folder.ServerConfig(sites=("clinic", "hospital", "clinic"))


def test_a_key_that_was_removed_cannot_come_back(tmp_path: Path) -> None:
    from fedlora.federation.flower import runtime

    place = tmp_path / "fed" / "server"
    folder.init(tmp_path / "fed", ["clinic", "hospital"], "localhost", port=free_port())
    config = folder.ServerConfig.load(place)
    known = {name: runtime.key_of(key) for name, key in folder.public_keys(place, config).items()}
    with serve.superlink(place, config.port, [], False) as link:
        runtime.register(link, known)
        runtime.register(link, known)
        runtime.register(link, {"clinic": known["clinic"]})
        with pytest.raises(ConfigError, match="the key of site 'hospital' was removed from this server earlier"):
            runtime.register(link, known)


@pytest.mark.parametrize("host", ["", "bad host", "x;evil", "*.example.org", "m\u00fcnchen.de", "https://x"])
def test_a_host_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"host = .*: string should match"):
        folder.init(tmp_path / "fed", ["a"], host)
    with pytest.raises(ConfigError, match="cannot both listen on port 8000"):
        folder.init(tmp_path / "fed", ["a"], "localhost", 8000, 8000)
    assert not (tmp_path / "fed").exists()


def test_a_certificate_is_for_the_host_and_signed_by_the_authority(tmp_path: Path) -> None:
    folder.init(tmp_path / "fed", ["a"], "fl.example.org")
    command = [
        "openssl",
        "verify",
        "-CAfile",
        str(tmp_path / "fed/server/ca.crt"),
        "-verify_hostname",
        "fl.example.org",
    ]
    done = subprocess.run([*command, str(tmp_path / "fed/server/server.pem")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = [part.replace("fl.example.org", "evil.example.org") for part in command]
    assert subprocess.run([*wrong, str(tmp_path / "fed/server/server.pem")], capture_output=True).returncode != 0


def test_certificates_are_renewed_before_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, told = tmp_path / "fed", Told()
    server, site = place / "server", place / "sites" / "a" / "ca.crt"
    monkeypatch.setattr(keys, "YEARS", 20 / 365)
    folder.init(place, ["a"], "fl.example.org")
    certificates.check_dates([server / "server.pem", site], told)
    assert len(told.messages) == 2
    assert all("fedlora federation renew" in message for message in told.messages)
    kept = {file: file.read_bytes() for file in place.rglob("*") if file.suffix in (".key", ".pub", ".toml")}
    shutil.copytree(place, tmp_path / "old")
    monkeypatch.undo()
    done = subprocess.run(
        [sys.executable, "-m", "fedlora", "federation", "renew", str(place)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"copy {server / 'server.pem'} and {server / 'ca.crt'} into the server's folder" in done.stdout
    assert kept == {file: file.read_bytes() for file in kept}
    certificates.check_dates([server / "server.pem", server / "ca.crt", site], told)
    assert len(told.messages) == 2
    for ca in (tmp_path / "old/server/ca.crt", site):
        for certificate in (tmp_path / "old/server/server.pem", server / "server.pem"):
            verify = ["openssl", "verify", "-CAfile", str(ca), "-verify_hostname", "fl.example.org", str(certificate)]
            assert subprocess.run(verify, capture_output=True).returncode == 0


def test_certificates_that_have_ended_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "fed"
    monkeypatch.setattr(keys, "YEARS", -0.5 / 365)
    folder.init(place, ["a"], "localhost")
    ended = "ended on .*, so no site can connect; `fedlora federation renew"
    with pytest.raises(ConfigError, match=rf"sites/a/ca\.crt {ended}"):
        join.join("localhost:1", place / "sites" / "a" / "site.toml")
    with pytest.raises(ConfigError, match=rf"server/ca\.crt {ended}"):
        serve.serve(experiment(tmp_path), tmp_path / "run", place / "server")
    (place / "sites" / "a" / "ca.crt").write_text("")
    with pytest.raises(ConfigError, match="is not a certificate that can be read"):
        join.join("localhost:1", place / "sites" / "a" / "site.toml")
    for wrong in ("server/server.pem", "authority/ca.key"):
        (place / wrong).write_text("")
        with pytest.raises(ConfigError, match=r"cannot be renewed .* if that key is lost, make a new federation"):
            certificates.renew(place)
    with pytest.raises(ConfigError, match=r"cannot be renewed .*name the folder that"):
        certificates.renew(tmp_path / "other")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    folder.init(tmp_path / "fed", ["a"], "localhost")
    site = tmp_path / "fed" / "sites" / "a"
    (site / "site.toml").write_text(tomli_w.dumps({"name": "a", "share": {"number": 0, "of": 1}}))
    (site / "site.key").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by other users"):
        join.join("127.0.0.1:1", site / "site.toml")


@pytest.mark.parametrize(
    ("server", "insecure", "why"),
    [
        ("nowhere", False, "not of the form host:port"),
        ("localhost:99999", False, "not of the form host:port"),
        ("https://localhost:9443", False, "not of the form host:port"),
        ("192.0.2.1:80", True, "plain text, and 192.0.2.1 is another"),
    ],
)
def test_what_join_does_not_do(tmp_path: Path, server: str, insecure: bool, why: str) -> None:
    (tmp_path / "site.toml").write_text(tomli_w.dumps({"name": "a", "share": {"number": 0, "of": 1}}))
    with pytest.raises(ConfigError, match=why):
        join.join(server, tmp_path / "site.toml", insecure=insecure)


def test_an_unknown_key_gets_no_work_and_sees_no_message(root: Path, federation: Federation) -> None:
    stranger = root / "stranger"
    stranger.mkdir()
    private, _ = keys.make_site()
    write_secret(stranger / "site.key", private)
    (stranger / "ca.crt").write_bytes((federation.place / "server" / "ca.crt").read_bytes())
    document = {"name": "site-0", "share": {"number": 0, "of": 1}, "poll_seconds": 0.1}
    (stranger / "site.toml").write_text(tomli_w.dumps(document))
    command = [sys.executable, "-m", "fedlora", "join", f"127.0.0.1:{federation.config.port}"]
    with Child([*command, "--site-config", str(stranger / "site.toml")], stranger / "processes") as child:
        for _ in range(900):
            if "ended" in child.last_words():
                break
            time.sleep(0.1)
        assert "the SuperNode ended" in child.last_words()
        federation.run(experiment(root, rounds=1), root / "with-a-stranger")
    assert not (stranger / "state").exists()


def test_plain_text_is_not_answered(federation: Federation) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{federation.config.port}/health", timeout=5).raise_for_status()


def test_the_superlink_listens_on_the_loopback_interface_alone(federation: Federation) -> None:
    wanted = f"{federation.config.port:04X}"
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and local.rpartition(":")[2] == wanted:
                listening.append(local.rpartition(":")[0])
    assert listening == ["0100007F"]


def test_a_task_is_not_handed_to_whoever_asks(federation: Federation) -> None:
    from flwr.supercore.constant import TaskType

    from fedlora.federation.flower import runtime

    trust = ssl.create_default_context(cafile=str(federation.place / "server" / "ca.crt"))
    url = f"https://127.0.0.1:{federation.config.port}/v1/runtime/acquire-task"
    asked = runtime.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]).SerializeToString()
    answer = httpx.post(url, content=asked, verify=trust, headers={"content-type": "application/protobuf"})
    assert answer.status_code in (401, 403), answer.text


def test_keys_of_sites_that_left_are_accepted_no_more(root: Path) -> None:
    from flwr.proto.control_pb2 import ListNodesRequest

    from fedlora.federation.flower import runtime

    place = root / "leaving"
    folder.init(place, ["clinic", "hospital"], "localhost", port=free_port())
    config = folder.ServerConfig.load(place / "server")
    known = {name: runtime.key_of(key) for name, key in folder.public_keys(place / "server", config).items()}
    with serve.superlink(place / "server", config.port, (), False) as link:

        def accepted() -> set[bytes]:
            control = runtime._control(link)
            nodes = control.ListNodes(ListNodesRequest()).nodes_info
            control.close()
            return {bytes(node.public_key) for node in nodes if not node.unregistered_at}

        runtime.register(link, known)
        assert accepted() == set(known.values())
        runtime.register(link, {"clinic": known["clinic"]})
        assert accepted() == {known["clinic"]}


def test_plain_text_works_on_this_machine_when_it_is_asked_for(root: Path) -> None:
    place = root / "plain"
    folder.init(place, ["site-0"], "localhost", port=free_port())
    port = folder.ServerConfig.load(place / "server").port
    site = place / "sites" / "site-0"
    (site / "site.toml").write_text(
        tomli_w.dumps({"name": "site-0", "share": {"number": 0, "of": 1}, "poll_seconds": 0.2})
    )
    command = [sys.executable, "-m", "fedlora", "join", "--insecure", f"127.0.0.1:{port}"]
    with Child([*command, "--site-config", str(site / "site.toml")], site / "processes"):
        chosen = experiment(root, rounds=1)
        result = serve.serve(chosen, root / "plain-run", place / "server", rules=ServerPolicy(), insecure=True)
    assert result.rows[1].refused == {}
    assert len(result.rows[1].cohort) == 3


def test_nothing_is_installed_and_nobody_is_told(federation: Federation) -> None:
    seen = 0
    for pid in processes_of(str(federation.place)):
        entry = Path(f"/proc/{pid}")
        command = (entry / "cmdline").read_text()
        if "superlink" not in command and "supernode" not in command:
            continue
        environment = (entry / "environ").read_text().split("\0")
        assert "FLWR_TELEMETRY_ENABLED=0" in environment
        assert "FLWR_DISABLE_UPDATE_CHECK=1" in environment
        assert "--allow-runtime-dependency-installation" not in command
        seen += 1
    assert seen >= 1


def test_secrets_are_in_no_log_and_on_no_command_line(federation: Federation) -> None:
    secrets = [file.read_bytes() for file in federation.place.rglob("*.key")]
    lines = {
        line for secret in secrets for line in secret.splitlines() if b"PRIVATE KEY" not in line and len(line) > 20
    }
    logs = list(federation.place.rglob("log.txt"))
    assert logs
    for log in logs:
        content = log.read_bytes()
        assert not any(line in content for line in lines)
    for pid in processes_of(str(federation.place)):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert not any(line in command for line in lines)


def test_a_site_leaves_politely(root: Path, federation: Federation) -> None:
    import signal

    place = root / "polite"
    place.mkdir()
    (place / "site.toml").write_text(tomli_w.dumps({"name": "a", "share": {"number": 0, "of": 1}}))
    source = federation.place / "sites" / "site-0"
    (place / "ca.crt").write_bytes((source / "ca.crt").read_bytes())
    write_secret(place / "site.key", keys.make_site()[0])
    command = [sys.executable, "-m", "fedlora", "join", f"127.0.0.1:{federation.config.port}"]
    process = subprocess.Popen(
        [*command, "--site-config", str(place / "site.toml")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert "a: joining" in process.stderr.readline()
    time.sleep(2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "a: left" in said
    assert process.returncode == 130
    assert processes_of(str(place)) == []


@pytest.mark.skipif(not Path("/usr/sbin/nginx").exists(), reason="nginx is not installed")
def test_the_proxy_lets_sites_through_and_nobody_to_the_control_interface(root: Path, federation: Federation) -> None:
    from fedlora.federation.deploy.file_templates import PROXY

    server = federation.place / "server"
    port = free_port()
    text = PROXY.format(host="localhost", port=federation.config.port, proxy_port=port)
    (server / "nginx.conf").write_text(f"daemon off; pid {root}/nginx.pid; error_log {root}/nginx.log;\n" + text)
    # nginx's files lie where a user may write
    with Child(["/usr/sbin/nginx", "-p", str(server), "-c", "nginx.conf"], root / "nginx"):
        verify = str(server / "ca.crt")
        trust = ssl.create_default_context(cafile=verify)
        url = f"https://localhost:{port}"
        for _ in range(100):
            try:
                code = httpx.post(f"{url}/v1/control/start-run", content=b"", verify=trust).status_code
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        assert code == 403
        assert httpx.post(f"{url}/v1/runtime/acquire-task", content=b"", verify=trust).status_code == 403
        assert httpx.get(f"{url}/health", verify=trust).status_code == 403
        # a site behind the proxy
        child = federation.children["site-0"]
        child.stop()
        through = federation.site("site-0")
        through.command = [part.replace(f":{federation.config.port}", f":{port}") for part in through.command]
        with through:
            result = federation.run(
                experiment(root, "lora", "clients.num=8", "clients.per_round=8", rounds=1),
                root / "through-nginx",
                ServerPolicy(min_available=8, round_timeout=120),
            )
            assert result.rows[1].refused == {}
        federation.children["site-0"] = federation.site("site-0").start()

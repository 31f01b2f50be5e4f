"""The files of a federation: written once by ``fedlora federation init``, distributed, and read by server and sites."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w

from fedlora.config.files import naming, read
from fedlora.core.component import MODEL_CONFIG, Field, dataclass
from fedlora.core.errors import ConfigError
from fedlora.federation.deploy.file_templates import PROXY, README, SITE, SITE_README
from fedlora.federation.deploy.flower_versions import PRIVATE, check_flower
from fedlora.federation.deploy.processes import write_secret
from fedlora.federation.protocol.policies import Name, ServerPolicy, parse_as

SERVER_FILE = "server.toml"


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class ServerConfig:
    """The server's settings of a federation, ``server/server.toml``.

    Args:
        host: name or address by which sites reach the proxy in front of the server.
        proxy_port: the proxy's port, open to sites.
        port: port of Flower's SuperLink, on the loopback interface only.
        sites: names of the sites.
        rules: quorum and timeouts.

    Raises:
        ConfigError: a site is named twice.
    """

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "localhost"
    proxy_port: Annotated[int, Field(ge=1, le=65535)] = 9443
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    sites: Annotated[tuple[Name, ...], Field(min_length=1)]
    rules: ServerPolicy = field(default_factory=ServerPolicy)

    def __post_init__(self) -> None:
        if len(set(self.sites)) < len(self.sites):
            raise ConfigError("sites names a site twice; name each once")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads the file of a server's folder.

        Raises:
            ConfigError: it cannot be read, or contains unknown keys or values.
        """
        file = folder / SERVER_FILE
        if not file.exists():
            raise ConfigError(
                f"{file} does not exist; `fedlora federation init DIR --sites N` writes a federation, and "
                "--federation DIR/server names its server's folder"
            )
        document = read(file)
        with naming(document):
            return parse_as(cls, document.values, file)


def public_keys(folder: Path, config: ServerConfig) -> dict[str, bytes]:
    """The public key file of each site, by name.

    Raises:
        ConfigError: one is missing or of the wrong type, or two sites have the same.
    """
    from fedlora.federation.deploy import keys

    found: dict[str, bytes] = {}
    owners: dict[bytes, str] = {}
    for name in config.sites:
        file = folder / "sites" / f"{name}.pub"
        if not file.exists():
            raise ConfigError(
                f"{file} does not exist; put the public key of site {name!r} there, or leave it out of sites"
            )
        found[name] = file.read_bytes()
        try:
            point = keys.public_point(found[name])
        except ValueError as error:
            raise ConfigError(
                f"{file} is not the public key of a site ({error}); put the site's site.pub there, which "
                "`fedlora federation init` or ssh-keygen -t ecdsa -b 384 writes"
            ) from error
        if (owner := owners.setdefault(point, name)) != name:
            raise ConfigError(f"sites {owner!r} and {name!r} have the same public key; each needs a key of its own")
    return found


def init(folder: Path, names: list[str], host: str, port: int = 8000, proxy_port: int = 9443) -> None:
    """Creates a federation: certificate authority, server certificate, a key pair and folder per site, instructions.

    Args:
        folder: a new folder.
        names: names of the sites.
        host: name or address by which sites reach the server.
        port: port of Flower's SuperLink, on the loopback interface.
        proxy_port: port of the proxy in front of it.

    Raises:
        ConfigError: the folder is not empty or cannot be written, or a name, the host or a port is invalid.
    """
    check_flower(PRIVATE)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; name a new folder, since keys are never overwritten")
    if len(set(names)) != len(names):
        raise ConfigError("two sites have the same name; give each a name of its own")
    if port == proxy_port:
        raise ConfigError(
            f"the proxy and the SuperLink cannot both listen on port {port}; change --port or --proxy-port"
        )
    server = {
        "host": host,
        "proxy_port": proxy_port,
        "port": port,
        "sites": names,
        "rules": {"min_available": len(names)},
    }
    parse_as(ServerConfig, server, folder / "server" / SERVER_FILE)
    try:
        _write(folder, server)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); make room, or name another one") from error


def _write(folder: Path, server: Mapping[str, Any]) -> None:
    """Writes the folder's files with new keys."""
    from fedlora.federation.deploy import keys

    names, host, port, proxy_port = (server[key] for key in ("sites", "host", "port", "proxy_port"))
    (folder / "server" / "sites").mkdir(parents=True, mode=0o700)
    (folder / "authority").mkdir(mode=0o700)
    authority = keys.make_authority()
    ca = keys.certificate_pem(authority.certificate)
    key, certificate = keys.make_server(authority, host)
    write_secret(folder / "authority" / "ca.key", keys.private_pem(authority.key))
    write_secret(folder / "server" / "server.key", key)
    (folder / "server" / "server.pem").write_bytes(certificate)
    (folder / "server" / "ca.crt").write_bytes(ca)
    (folder / "server" / SERVER_FILE).write_text(tomli_w.dumps(server))
    (folder / "server" / "nginx.conf").write_text(PROXY.format(host=host, port=port, proxy_port=proxy_port))
    for name in names:
        place = folder / "sites" / name
        place.mkdir(parents=True, mode=0o700)
        private, public = keys.make_site()
        write_secret(place / "site.key", private)
        for file in (place / "site.pub", folder / "server" / "sites" / f"{name}.pub"):
            file.write_bytes(public)
        (place / "ca.crt").write_bytes(ca)
        (place / "site.toml").write_text(SITE.format(name=name))
        (place / "README.md").write_text(SITE_README.format(name=name, host=host, proxy_port=proxy_port))
    (folder / "README.md").write_text(
        README.format(host=host, port=port, proxy_port=proxy_port, names=", ".join(names), first=names[0])
    )

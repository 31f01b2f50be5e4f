"""Certificates that end: warnings before, and new ones that the authority's key signs."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from fedlora.core.errors import ConfigError
from fedlora.core.files import write_atomically
from fedlora.federation.deploy.flower_versions import PRIVATE, check_flower
from fedlora.federation.deploy.folder import ServerConfig
from fedlora.runs.callbacks import Callback

NOTICE = datetime.timedelta(days=30)
"""How long before its end a certificate is warned about."""
_REMEDY = (
    "`fedlora federation renew DIR`, where authority/ca.key is, writes new certificates and says where they are copied"
)


def check_dates(files: Iterable[Path], report: Callback) -> None:
    """Reports certificates that end soon.

    Args:
        files: the files of certificates; missing ones are left to those who need them.
        report: receives a message for each that ends within ``NOTICE``.

    Raises:
        ConfigError: one has ended, or is not a certificate.
    """
    from fedlora.federation.deploy import keys

    now = datetime.datetime.now(datetime.UTC)
    for file in filter(Path.exists, files):
        try:
            end = keys.load_certificate(file.read_bytes()).not_valid_after_utc
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} is not a certificate that can be read ({error}); copy it again") from error
        if end <= now:
            raise ConfigError(f"the certificate {file} ended on {end:%Y-%m-%d}, so no site can connect; {_REMEDY}")
        if end - now < NOTICE:
            report.message(f"warning: the certificate {file} ends on {end:%Y-%m-%d}; {_REMEDY}")


def renew(folder: Path) -> list[str]:
    """Signs new certificates of a federation's authority and server, for the same keys.

    Old and new ones are accepted together, so that they may be copied one after another.

    Args:
        folder: the folder that ``init`` wrote.

    Returns:
        What is to be done with the files, one step each.

    Raises:
        ConfigError: files of the federation are missing or cannot be read or written.
    """
    check_flower(PRIVATE)
    from fedlora.federation.deploy import keys

    server = folder / "server"
    try:
        authority = keys.make_authority(keys.load_private((folder / "authority" / "ca.key").read_bytes()))
        public = keys.load_certificate((server / "server.pem").read_bytes()).public_key()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the certificates of {folder} cannot be renewed ({error}): name the folder that `fedlora federation init` "
            "wrote, with authority/ca.key and server/server.pem; if that key is lost, make a new federation"
        ) from error
    config = ServerConfig.load(server)
    ca = keys.certificate_pem(authority.certificate)
    try:
        write_atomically(server / "server.pem", keys.sign_server(authority, config.host, public))
        for file in (server / "ca.crt", *sorted(folder.glob("sites/*/ca.crt"))):
            write_atomically(file, ca)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); make room, and renew again") from error
    return [
        f"new certificates until {authority.certificate.not_valid_after_utc:%Y-%m-%d}, for the same keys:",
        f"1. copy {server / 'server.pem'} and {server / 'ca.crt'} into the server's folder; restart nginx and "
        "`fedlora serve`, which resumes",
        f"2. copy {server / 'ca.crt'} over the ca.crt of each site ({', '.join(config.sites)}); restart `fedlora join`",
        "until the old certificates end, each fits the new ones, so the order does not matter",
    ]

"""The process of a site that holds the model: ``python -m fedlora.federation.deploy.worker ADDRESS SECRET SITE``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from fedlora.federation.flower.app import answer
from fedlora.federation.flower.runtime import Link, take_messages
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.federation.site.site import Site


def main() -> None:
    """Replies to the messages of the SuperNode at an address, until stopped."""
    address, secret, file = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    site = Site(SiteConfig.load(Path(file)))
    take_messages(Link(address, None, Path(secret).read_bytes()), lambda message: answer(site, message))


if __name__ == "__main__":
    main()

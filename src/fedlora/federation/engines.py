"""The engines that one machine can run by name; real sites are reached by ``fedlora serve``."""

from fedlora.engines import Engine, Serial
from fedlora.federation.server.remote import Remote

ENGINES: dict[str, type[Engine]] = {"serial": Serial, "flower-simulation": Remote}

"""The engines that can be selected by name on one machine; for real sites, use ``fedlora serve``."""

from fedlora.engines import Engine, Processes, Serial
from fedlora.federation.server.remote import Remote

ENGINES: dict[str, type[Engine]] = {"serial": Serial, "processes": Processes, "flower-simulation": Remote}

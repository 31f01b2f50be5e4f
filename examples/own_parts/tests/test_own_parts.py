"""fedlora's own checks on these classes."""

from own_parts.identity import Identity
from own_parts.majority import MajoritySign

from fedlora import testing


def test_the_aggregator() -> None:
    testing.check_aggregator(MajoritySign())


def test_the_initialisation() -> None:
    testing.check_lora_init(Identity())

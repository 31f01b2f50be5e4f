"""fedlora's own checks on these classes."""

from own_parts.identity import Identity
from own_parts.majority import MajoritySign

from fedlora.testing import check_aggregator, check_lora_init


def test_the_aggregator() -> None:
    check_aggregator(MajoritySign())


def test_the_initialisation() -> None:
    check_lora_init(Identity())

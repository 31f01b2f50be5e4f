"""fedlora's own checks on these classes."""

from own_parts.identity import Identity
from own_parts.majority import MajoritySign
from own_parts.short_texts import ShortTexts

from fedlora import Rows
from fedlora.testing import check_aggregator, check_lora_init, check_task


def test_the_aggregator() -> None:
    check_aggregator(MajoritySign())


def test_the_initialisation() -> None:
    check_lora_init(Identity())


def test_the_task() -> None:
    rows = [{"text": f"{word} {number}", "label": word} for number in range(12) for word in ("good", "bad")]
    check_task(ShortTexts(), Rows(train=rows, test=rows[:6]), ["good 3"])

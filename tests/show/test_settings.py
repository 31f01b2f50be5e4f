"""The settings of what stands in a slot, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.core.component import MODEL_CONFIG, Count, Part, Positive, Share, dataclass
from fedlora.methods import METHODS
from fedlora.server.optimizers import AnyServerOptimizer, Sgd
from fedlora.show.describe import SLOTS, choices
from fedlora.show.settings import settings_of
from fedlora.transport import Quota


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Everything:
    """One of each type.

    Args:
        needed: has no default.
        server: a slot.
    """

    needed: Share
    count: Count = 3
    part: Part | None = None
    text: str = "a"
    flag: bool = False
    either: str | tuple[str, ...] = ("b", "c")
    server: AnyServerOptimizer = Sgd(lr=0.5)
    quota: Quota = Quota()
    other: Any = None
    path: Path = Path("x")
    positive: Positive = 1e-8


EXPECTED = {
    "needed": ("number, above 0 and 1 at most", "required", "has no default."),
    "count": ("integer, 1 or more", "3", ""),
    "part": ("number, 0 or more and below 1", "", ""),
    "text": ("text", '"a"', ""),
    "flag": ("true or false", "false", ""),
    "either": ("text or list of text", '["b", "c"]', ""),
    "server": (
        "table with kind sgd, adam, adamw, fed_adam, fed_yogi or fed_adagrad",
        '{ kind = "sgd", lr = 0.5 }',
        "a slot.",
    ),
    "quota": ("table of A, B, head", "{}", ""),
    "other": ("any value", "", ""),
    "path": ("text", "x", ""),
    "positive": ("number, above 0", "1e-08", ""),
}


def test_types_and_defaults_are_words_of_toml() -> None:
    found = {one.name: (one.type, one.default_text, one.text) for one in settings_of("", Everything)}
    assert found == EXPECTED
    assert [one.name for one in settings_of("", Everything) if one.required] == ["needed"]


@pytest.mark.parametrize("slot", SLOTS)
def test_every_setting_of_every_value_has_a_type_and_a_sentence(slot: str) -> None:
    for (kind, _, names), value in zip(choices(slot), SLOTS[slot].values(), strict=True):
        found = settings_of(kind, value)
        assert ", ".join(one.name for one in found) == names
        # rows, and functions on them, come from Python alone
        free = kind in ("rows", "collated")
        vague = [one for one in found if not one.text or ("any value" in one.type and not free)]
        assert [(kind, one.name) for one in vague] == []


def test_an_argument_of_a_method_has_what_it_means_there() -> None:
    down = {kind: one for kind in ("fedavg", "flasc") for one in settings_of(kind, METHODS[kind]) if one.name == "down"}
    assert down["flasc"].type == "number, above 0 and 1 at most"
    assert down["flasc"].default == 0.25
    assert down["fedavg"].type.startswith("table of sparsify, precision")

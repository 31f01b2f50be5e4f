"""What of a configuration is not at its default."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import pytest
import tomli_w

from fedlora import config
from fedlora.config.essential import essential
from fedlora.config.template import template
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS


@pytest.mark.parametrize("kind", METHODS)
def test_a_template_is_its_method(kind: str) -> None:
    assert essential(tomllib.loads(template(kind))) == {"method": {"kind": kind}}


@pytest.mark.parametrize("kind", METHODS)
def test_a_resolved_configuration_is_read_as_the_same_and_nothing_more_can_go(kind: str) -> None:
    experiment = config.parse({"seed": 3, "clients": {"num": 50}, "method": {"kind": kind, "rounds": 7}})
    document = config.resolved(experiment)
    before = copy.deepcopy(document)
    found = essential(document)
    assert document == before
    assert config.parse(tomllib.loads(tomli_w.dumps(found))) == experiment
    assert (found["seed"], found["clients"]) == (3, {"num": 50})
    assert essential(found) == found
    assert len(str(found)) < len(str(document)) / 2


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, {}),
        ({"seed": 0, "clients": {"num": 100}}, {}),
        ({"task": {"kind": "text_classification", "max_length": 32}}, None),
        ({"task": {"kind": "causal_lm"}}, None),
        ({"method": {"kind": "flasc", "rank": 16, "server": {"lr": 5e-3}}}, {"method": {"kind": "flasc"}}),
        ({"method": {"kind": "flasc", "rank": 8, "server": {"lr": 1.0}}}, None),
        ({"method": {"kind": "flasc", "down": 0.5}, "label": "half"}, None),
        ({"data": {"kind": "files", "train": "a.csv", "test_fraction": 0.5}}, None),
    ],
)
def test_what_is_at_its_default_is_left_out(document: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert essential(document) == (document if expected is None else expected)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown key 'sed'"):
        essential({"sed": 3})

"""What must hold before a study's figures mean anything."""

from __future__ import annotations

import pytest

from fedlora.core.errors import ConfigError
from fedlora.study.gates import check, parse_rules, parse_target, parse_term
from fedlora.study.results import figures

VARY = {"clients.partition.alpha": [0.5, 0.01]}
SETTINGS = {"alpha=0.5": {"clients.partition.alpha": 0.5}, "alpha=0.01": {"clients.partition.alpha": 0.01}}
LABELS = ["lora", "full", "head_only", "flasc-1.16"]
FIGURES = {
    ("lora", "alpha=0.5"): 0.80,
    ("full", "alpha=0.5"): 0.84,
    ("head_only", "alpha=0.5"): 0.75,
    ("lora", "alpha=0.01"): 0.70,
    ("full", "alpha=0.01"): 0.90,
    ("head_only", "alpha=0.01"): 0.80,
}


def broken(*rules: str, failed: dict[tuple[str, str], str] | None = None) -> list[str]:
    ends = {("lora", "alpha=0.5"): ["lr"]}
    return check(parse_rules(rules, LABELS, VARY), SETTINGS, FIGURES, ends, "test data", failed or {})


def test_a_rule_is_about_every_setting_or_the_one_it_names() -> None:
    assert broken("lora >= head_only") == [
        "the gate 'lora >= head_only' does not hold at alpha=0.01 on test data: lora 0.7000, head_only 0.8000"
    ]
    assert broken("lora >= head_only at clients.partition.alpha = 0.5", "lora >= head_only at alpha=0.5") == []
    assert len(broken("lora > full - 0.03")) == 2
    assert len(broken("lora >= full - 0.05")) == 1
    assert len(broken("lora >= 0.95 * full - 0.01", "0.75 < lora", "full <= 1")) == 2


def test_what_is_not_there_yet_is_not_judged() -> None:
    assert broken("flasc-1.16 >= lora") == []


def test_a_gate_on_a_method_that_failed_does_not_hold() -> None:
    failed = {("flasc-1.16", "alpha=0.01"): "the loss is not finite"}
    assert broken("flasc-1.16 >= lora", failed=failed) == [
        "the gate 'flasc-1.16 >= lora' cannot be judged at alpha=0.01 on test data, as flasc-1.16 failed: the loss is "
        "not finite"
    ]
    assert broken("flasc-1.16 >= lora at alpha = 0.5", "lora <= full", failed=failed) == []


def test_a_method_with_nothing_to_tune_is_judged_and_one_without_any_result_is_not() -> None:
    row = {"method": "lora", "setting": "all", "done": True, "value": 0.8}
    rows = [{**row, "best": {}}, {**row, "method": "full", "best": None, "value": None}]
    assert figures({"tuning": rows}, "tune") == {("lora", "all"): 0.8}


def test_the_ends_of_grids_are_named() -> None:
    assert broken("inside the grid") == [
        "the gate 'inside the grid' does not hold, the best value is an end of its grid: lora at alpha=0.5: lr"
    ]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("lora", "is not understood"),
        ("lora >= nothing", "no method 'nothing'"),
        ("lora >= full at alpha = 3", "no setting 'alpha = 3'"),
        ("lora >= full at beta = 0.5", "no setting 'beta = 0.5'"),
        ("lora + full >= 1", "is not a value"),
    ],
)
def test_other_rules_are_refused(rule: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_rules([rule], LABELS, VARY)


def test_terms() -> None:
    assert parse_term("0.9 * full").value(0.5) == pytest.approx(0.45)
    assert parse_term("full + 1e-2").value(0.5) == pytest.approx(0.51)
    assert parse_term("0.7").value(0.5) == 0.7


def test_a_label_may_be_a_number() -> None:
    rules = parse_rules(["16 >= lora - 0.1", "lora >= 0.9 * 16", "lora >= 16", "lora >= 4"], ["lora", "16"], {})
    assert [rule.labels for rule in rules] == [["16", "lora"], ["lora", "16"], ["lora", "16"], ["lora"]]
    assert [parse_target(target, ["16"]).label for target in ("0.9 * 16", "16", 16)] == ["16", "16", ""]

"""Sentences about data, in the first row of the ledger and in evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny import experiment, make_rows, tiny_world, write_rows

import fedlora
from fedlora.config.federated_data import prepare
from fedlora.core.errors import DataError
from fedlora.tasks.data.notes import near_equal, shared, unread

world = pytest.fixture(scope="module")(tiny_world)


def test_a_run_says_once_what_to_look_at_in_its_data(world: Path, tmp_path: Path) -> None:
    rows = [{**row, "note": "x", "group": n % 2} for n, row in enumerate(make_rows(40, 0))]
    rows[0] |= {"text": " "}
    rows[1] |= {"label": rows[1]["label"].upper()}
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", [*rows[2:5], {**rows[5], "text": "w1 w2 w3 w4 w5 w6"}])
    chosen = experiment(
        world, "lora", f"data.train={train}", f"data.test={test}",
        "clients.partition={kind='iid'}", "clients.num=4", "clients.skew={kind='column', name='group'}", rounds=1,
    )  # fmt: skip
    result = fedlora.run(chosen, tmp_path / "run")
    notes = [one for one in result.rows[0].warnings if "useful" not in one]
    assert [one.split(":")[0] for one in notes[2:3]] == ["the columns were not read"]
    assert "differ only in spelling" in notes[0]
    assert notes[1] == "1 of 40 train rows have a blank 'text'"
    assert "'note'" in notes[2]
    assert "'group'" not in notes[2]
    assert notes[3].startswith("3 of 4 test rows (75%) have the content of a training row")
    assert not any("differ only" in one for row in result.rows[1:] for one in row.warnings)
    found = fedlora.load_run(tmp_path / "run").evaluate(train)
    assert "1 of 40 test rows have a blank 'text'" in found.warnings


def test_rows_without_any_text_are_refused(world: Path, tmp_path: Path) -> None:
    blank = write_rows(tmp_path / "rows.jsonl", [{**row, "text": " "} for row in make_rows(40, 0)])
    with pytest.raises(DataError, match="column 'text' of all 40 training rows is blank"):
        prepare(experiment(world, "lora", f"data.train={blank}"))


def test_names_that_differ_in_meaning_are_not_near_equal() -> None:
    assert near_equal(["a", "b", "a b", "10", "100", "1e1", "nan"]) == []
    assert "'Ａ' and 'a'" in near_equal(["Ａ", "a"])[0]
    assert "'1' and '1.0'" in near_equal(["1", "1.0"])[0]


def test_nothing_is_said_about_data_as_they_should_be() -> None:
    assert unread(["text", "label"], {"text", "label", "user"}) == []
    assert unread([f"c{n}" for n in range(30)], set())[0].endswith("'c19', 10 more")
    assert shared(["a", "b"], ["c"]) == []

"""Data to choose settings by: a part of the training rows, never the test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.tiny import COLOURS, document, make_rows, tiny_world, write_rows

from fedlora import config
from fedlora.config.federated_data import FederatedData, prepare
from fedlora.core.errors import ConfigError
from fedlora.study.halving import held_out

world = pytest.fixture(scope="module")(tiny_world)


def setting(values: dict[str, Any], share: float = 0.2) -> tuple[FederatedData, FederatedData]:
    """The final run's data, and those to choose by."""
    return prepare(config.parse(values)), prepare(config.parse(held_out(values, share, 0)))


def texts(found: FederatedData, split: str) -> set[str]:
    return set(found.task.data["train" if split == "train" else "test"]["text"])


def test_test_rows_are_on_neither_side(world: Path) -> None:
    final, chosen = setting(document(world))
    train, test = texts(chosen, "train"), texts(chosen, "test")
    assert train | test == texts(final, "train")
    assert not train & test
    assert 5 <= len(test) <= 25
    assert chosen.task.label_names == final.task.label_names


def test_test_rows_are_not_even_looked_at(world: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"text": "w1", "label": "a class that nobody trains on"}])
    values = document(world)
    values["data"]["test"] = str(tmp_path / "test.jsonl")
    chosen = prepare(config.parse(held_out(values, 0.2, 0)))
    assert chosen.task.label_names == sorted(COLOURS)


def test_where_test_rows_are_drawn_they_are_dropped_first(world: Path) -> None:
    values = document(world, "lora", f"data={{kind='files', train={str(world / 'train.jsonl')!r}, test_fraction=0.3}}")
    final, chosen = setting(values)
    assert texts(chosen, "train") | texts(chosen, "test") == texts(final, "train")
    assert not texts(final, "test") & (texts(chosen, "train") | texts(chosen, "test"))
    # the classes are those of all rows, also of those that are held out
    assert chosen.task.label_names == final.task.label_names


def users(found: FederatedData) -> set[str]:
    return set(found.population.names)


@pytest.mark.parametrize("test_clients", [0.0, 0.3])
def test_of_users_some_more_are_held_out(world: Path, tmp_path: Path, test_clients: float) -> None:
    write_rows(tmp_path / "train.jsonl", make_rows(90, 0))
    values = document(world, "lora", f"clients.test_clients={test_clients}")
    values["data"]["train"] = str(tmp_path / "train.jsonl")
    values["clients"]["partition"] = {"kind": "natural", "column": "user"}
    final, chosen = setting(values)
    column = chosen.task.column("user", "train")
    tested = set(column[chosen.test_rows].tolist())
    assert chosen.split == "train"
    assert users(chosen) < users(final)
    assert tested == users(final) - users(chosen)
    assert len(tested) == round(0.2 * len(users(final)))
    values["mode"] = "centralised"
    _, pooled = setting(values)
    assert set(column[pooled.population.rows].tolist()) == users(chosen)


@pytest.mark.parametrize("task", ["language", "instruction", "questions", "tokens"])
def test_every_task_holds_out_by_its_own_content(tmp_path: Path, task: str) -> None:
    from fedlora.tasks import CausalLM, Files, Instruction, QuestionAnswering, TokenClassification, Validation

    rows = {
        "language": [{"text": f"text {number}"} for number in range(60)],
        "instruction": [{"prompt": f"p {number}", "answer": "a"} for number in range(60)],
        "questions": [
            {"context": f"c {number}", "question": "q", "answers": {"text": ["c"], "answer_start": [0]}}
            for number in range(60)
        ],
        "tokens": [{"tokens": [f"t{number}"], "tags": ["B-X" if number % 2 else "O"]} for number in range(60)],
    }[task]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Files(train=str(tmp_path / "rows.jsonl"), test_fraction=0.3)
    chosen = Validation(source=source, share=0.2)
    kinds = {"language": CausalLM, "instruction": Instruction, "questions": QuestionAnswering}
    kind = kinds.get(task, TokenClassification)()
    final, held = kind.read(source)[0], kind.read(chosen)[0]
    assert len(held.train) + len(held.test) == len(final.train)
    assert 1 <= len(held.test) < 20


def test_the_configuration_says_what_was_held_out(world: Path) -> None:
    first, second = (config.parse(held_out(document(world), share, 0)) for share in (0.1, 0.2))
    assert len({config.digest(one) for one in (first, second, config.parse(document(world)))}) == 3
    assert config.parse(config.resolved(first)) == first


def test_data_that_lie_elsewhere_are_refused(world: Path) -> None:
    values = document(world)
    values["data"] = {"kind": "sites", "test": "test.jsonl"}
    with pytest.raises(ConfigError, match="needs the whole data on this machine"):
        held_out(values, 0.1, 0)

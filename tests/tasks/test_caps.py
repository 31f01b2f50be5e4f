"""Caps on the number of rows, and the built-in questions on docstrings."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from fixtures.tiny import write_rows

from fedlora import config
from fedlora.config.experiment import digest, resolved
from fedlora.core.errors import ConfigError
from fedlora.tasks import DocstringQuestions, Files, Instruction, Sites, Validation
from fedlora.tasks.data.columns import Splits, split

ROWS = [{"prompt": f"number {number}", "answer": str(number)} for number in range(200)]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return str(tmp_path / "rows.jsonl")


def read(**settings: object) -> Splits:
    sides, _ = Instruction().read(Files(**settings))  # type: ignore[arg-type]
    return sides


def numbers(side: object) -> list[int]:
    return [int(answer) for answer in side["answer"]]  # type: ignore[index]


def test_a_cap_draws_from_all_rows_by_the_sources_seed_and_keeps_their_order(rows: str) -> None:
    every = read(train=rows)
    few = read(train=rows, max_train=20, max_test=5)
    train, test = numbers(few.train), numbers(few.test)
    assert (len(train), len(test)) == (20, 5)
    assert train == sorted(train)
    assert {*train} < {*numbers(every.train)}
    assert {*test} < {*numbers(every.test)}
    assert max(train) > 100  # not the first ones
    assert numbers(read(train=rows, max_train=20).train) == train
    assert numbers(read(train=rows, test=rows, max_train=20, seed=1).train) != numbers(
        read(train=rows, test=rows, max_train=20).train
    )
    assert numbers(read(train=rows, max_train=1000).train) == numbers(every.train)


def test_a_cap_on_one_side_leaves_the_other(rows: str) -> None:
    every = read(train=rows)
    assert numbers(read(train=rows, max_train=20).test) == numbers(every.test)
    assert numbers(read(train=rows, max_test=5).train) == numbers(every.train)


@pytest.mark.parametrize("own", [True, False])
def test_validation_rows_are_among_the_capped_training_rows(rows: str, own: bool) -> None:
    source = Files(train=rows, test=rows if own else None, max_train=50)
    final, _ = Instruction().read(source)
    held, _ = Instruction().read(Validation(source=source, share=0.3))
    assert sorted(numbers(held.train) + numbers(held.test)) == numbers(final.train)
    assert len(final.train) == 50


def test_caps_are_absent_at_their_default(rows: str) -> None:
    plain = {"data": {"kind": "files", "train": rows}, "method": {"kind": "lora"}}
    capped = {**plain, "data": {**plain["data"], "max_train": 10}}
    assert not {"max_train", "max_test"} & resolved(config.parse(plain))["data"].keys()
    assert digest(config.parse(plain)) != digest(config.parse(capped))
    # the digest of this configuration before there were caps
    assert digest(config.parse({"method": {"kind": "lora"}})) == "fc7cd8d7b8f1b642"


def test_rows_at_sites_are_not_capped_here(rows: str) -> None:
    with pytest.raises(ConfigError, match=r"max_train = 3 has no effect on rows that stay with sites"):
        Sites(test=rows, max_train=3)
    assert len(split(Sites(test=rows, max_test=3).raw(), "prompt").test) == 3


def test_questions_ask_for_the_package_of_a_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in "abc":
        functions = [
            f'def f{n}():\n    """Return item {n} of {module}\n    and no other.\n\n    More."""\n' for n in range(20)
        ]
        (tmp_path / f"{module}.py").write_text("".join(functions))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    (train, test), names = Instruction().read(DocstringQuestions(num_packages=2, max_words=6))
    assert names == []
    assert len(train) + len(test) == 40
    rows = [*train, *test]
    assert {"prompt": "Which package says: Return item 0 of a and", "answer": "a", "file": "a.py"} in rows
    assert {*train["answer"], *test["answer"]} == {"a", "b"}

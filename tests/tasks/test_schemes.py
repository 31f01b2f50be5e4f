"""Schemes of tags: told apart, and scored as entities."""

from __future__ import annotations

import pytest
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOBES

from fedlora.core.errors import DataError
from fedlora.tasks import Rows, TokenClassification
from fedlora.tasks.tags.schemes import entity_tag, scheme_of

IOBES_TAGS = [["B-x", "I-x", "E-x", "S-y", "O", "S-x"], ["O", "B-y", "E-y", "O", "O", "S-y"]]
FOUND = [["B-x", "I-x", "E-x", "S-x", "O", "S-x"], ["O", "B-y", "E-y", "O", "S-x", "O"]]
TO_BILOU = {"E": "L", "S": "U"}


def as_bilou(tags: list[list[str]]) -> list[list[str]]:
    return [[TO_BILOU.get(tag[0], tag[0]) + tag[1:] for tag in one] for one in tags]


def read(tags: list[list[str]]) -> list[list[str]]:
    return [[entity_tag(tag) for tag in one] for one in tags]


def test_entities_are_those_of_seqeval_in_its_strict_mode() -> None:
    assert f1_score(read(IOBES_TAGS), read(FOUND)) == f1_score(IOBES_TAGS, FOUND, mode="strict", scheme=IOBES)
    wanted, found = as_bilou(IOBES_TAGS), as_bilou(FOUND)
    assert f1_score(read(wanted), read(found)) == f1_score(wanted, found, mode="strict", scheme=BILOU)
    assert read(wanted) == read(IOBES_TAGS)


@pytest.mark.parametrize(
    ("tags", "scheme", "entities"),
    [
        (["B-x", "I-x", "O", "B-y"], "IOB2", [("x", 0, 1), ("y", 3, 3)]),
        (["I-x", "I-x", "B-x", "I-y"], "IOB1", [("x", 0, 1), ("x", 2, 2), ("y", 3, 3)]),
        (["I-x", "E-x", "E-x", "O"], "IOE", [("x", 0, 1), ("x", 2, 2)]),
        (["B-x", "E-x", "S-x", "O"], "BIOES", [("x", 0, 1), ("x", 2, 2)]),
        (["B-x", "L-x", "U-x", "O"], "BILOU", [("x", 0, 1), ("x", 2, 2)]),
        (["B-x", "M-x", "E-x", "S-x"], "BMES", [("x", 0, 2), ("x", 3, 3)]),
        (["B", "I", "O", "B"], "IOB2", [("_", 0, 1), ("_", 3, 3)]),
        (["S-x", "O", "O", "O"], "BIOES", [("x", 0, 0)]),
    ],
)
def test_schemes_are_told_apart(tags: list[str], scheme: str, entities: list[tuple[str, int, int]]) -> None:
    assert scheme_of({"O", *tags}, [tags]) == scheme
    assert get_entities([entity_tag(tag) for tag in tags]) == entities
    words = [f"w{number}" for number in range(len(tags))]
    (train, _), names = TokenClassification().read(
        Rows(train=[{"tokens": words, "tags": tags}] * 2, test=[{"tokens": words, "tags": tags}])
    )
    assert [names[tag] for tag in train["tags"][0]] == tags


def test_tags_of_two_schemes_are_refused() -> None:
    rows = [{"tokens": ["a"], "tags": [tag]} for tag in ("S-x", "U-x")]
    with pytest.raises(DataError, match="the tags 'S-x' and 'U-x', but no scheme has both"):
        TokenClassification().read(Rows(train=rows, test=rows))

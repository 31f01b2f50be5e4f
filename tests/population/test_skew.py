"""What counts as a class: labels, a column, clusters; on tables small enough to read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedlora.core.errors import DataError
from fedlora.population.clients import Clients, build_population, summarise
from fedlora.population.partitions import Dirichlet
from fedlora.population.skew import SKEWS, AnySkew, Clusters, Column, Label, Skew

CPU = torch.device("cpu")
SEA = ["the ship sails the sea", "a ship at sea", "sea and ship and sail", "the sail of a ship at sea"]
BREAD = ["bake bread with flour", "flour and yeast for bread", "bread of yeast", "bake flour and yeast"]


class Rows:
    """The part of a task that skews read."""

    def __init__(self, labels: list[int] | None = None, names: Any = (), points: Any = None, **columns: Any) -> None:
        self.labels = np.array(labels or [], dtype=np.int64)
        self.label_names = list(names)
        self.points = points
        self.columns = columns

    def column(self, name: str, split: str) -> Any:
        assert split == "train"
        return np.asarray(self.columns[name])

    def texts(self, split: str) -> list[str]:
        assert split == "train"
        return list(self.columns["text"])

    def embeddings(self, split: str, device: torch.device) -> Any:
        assert (split, device) == ("train", CPU)
        return np.asarray(self.points, dtype=np.float32)


def classes(skew: Skew, task: Any, seed: int = 0) -> tuple[list[int], list[str]]:
    found = skew.classes(task, seed, CPU)
    assert found.numbers.dtype == np.int64
    return found.numbers.tolist(), found.names


def test_labels_are_the_tasks_own() -> None:
    assert classes(Label(), Rows([1, 0, 1], ["no", "yes"])) == ([1, 0, 1], ["no", "yes"])
    assert classes(Label(), Rows([2, 0, 1], ["no"])) == ([2, 0, 1], ["no", "1", "2"])


def test_a_task_without_classes_has_none_even_if_its_outputs_have_names() -> None:
    assert classes(Label(), Rows([0, 0, 0], ["O", "B-person"])) == ([0, 0, 0], [])


@pytest.mark.parametrize(
    ("values", "numbers", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        ([10, 9, 10, 2], [2, 1, 2, 0], ["2", "9", "10"]),
        ([10.0, 9.5], [1, 0], ["9.5", "10.0"]),
        ([True, False], [1, 0], ["False", "True"]),
        (np.array([3, None, "x", None], dtype=object), [1, 2, 0, 2], ["'x'", "3", "None"]),
        (np.array([3, "x"], dtype=object), [1, 0], ["'x'", "3"]),
        ([1.0, np.nan, np.nan], [0, 1, 1], ["1.0", "nan"]),
        ([[2, 1], [1, 9], [2, 1]], [1, 0, 1], ["[1, 9]", "[2, 1]"]),
    ],
)
def test_a_columns_values_are_classes_in_order(values: Any, numbers: list[int], names: list[str]) -> None:
    assert classes(Column(name="c"), Rows(c=values)) == (numbers, names)


def test_texts_about_the_same_fall_together() -> None:
    # few words as they are, many reduced by the singular values
    for more in ("", " ".join(f"word{number}" for number in range(60))):
        texts = [f"{text} {more}" for pair in zip(SEA, BREAD, strict=True) for text in pair]
        numbers, names = classes(Clusters(num=2), Rows(text=texts))
        assert numbers == [0, 1] * 4
        assert names == ["cluster 0", "cluster 1"]


def test_embeddings_that_point_the_same_way_fall_together() -> None:
    points = [[0, 5], [3, 0.1], [0.1, 9], [1, 0], [-1, -1.1]]
    numbers, names = classes(Clusters(num=3, features="embeddings"), Rows(points=points))
    assert numbers == [0, 1, 0, 1, 2]
    assert names == ["cluster 0", "cluster 1", "cluster 2"]


def test_the_same_seed_makes_the_same_clusters() -> None:
    points = np.random.default_rng(0).normal(size=(200, 6))
    skew = Clusters(num=7, features="embeddings")
    assert classes(skew, Rows(points=points), 2**47) == classes(skew, Rows(points=points), 2**47)
    others = [classes(skew, Rows(points=points), seed) for seed in range(4)]
    assert any(other != others[0] for other in others)


@pytest.mark.parametrize(
    ("skew", "task", "text"),
    [
        (Clusters(num=3), Rows(text=["a ship", "some bread"]), "3 clusters were asked for, but only 2 of the 2 rows"),
        (Clusters(num=3), Rows(text=["ship", "bread"] * 4), "but only 2 of the 8 rows differ: set clients.skew.num"),
        (Clusters(num=2), Rows(text=["ship"] * 4), "but only 1 of the 4 rows differ"),
        (Clusters(num=2), Rows(text=["?", "!"]), "no words of two letters .* set clients.skew.features"),
    ],
)
def test_too_few_different_rows_are_refused(skew: Skew, task: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        skew.classes(task, 0, CPU)


def test_a_dirichlet_over_clusters_skews_what_clients_talk_about() -> None:
    draw = np.random.default_rng(0)
    words = [[f"topic{topic}word{number}" for number in range(20)] for topic in range(4)]
    texts = [" ".join(draw.choice(words[row % 4], 8)) for row in range(400)]
    found = Clusters(num=4).classes(Rows(text=texts), 0, CPU)  # type: ignore[arg-type]
    # the clusters are the topics
    assert len(set(zip(found.numbers.tolist(), (np.arange(400) % 4).tolist(), strict=True))) == 4
    clients = Clients(partition=Dirichlet(alpha=0.1, scheme="fednlp"), num=10, per_round=1)
    skewed = build_population(clients, found.numbers, None, 0).population
    assert summarise(skewed, np.arange(400) % 4, 4).top_class_share > 0.8


def test_the_table_and_the_union_agree() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnySkew)
    for kind, cls in SKEWS.items():
        needed = {"name": "title"} if kind == "column" else {}
        assert type(adapter.validate_python({"kind": kind, **needed})) is cls
    assert Clients().skew == Label()
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Clusters(num=1)

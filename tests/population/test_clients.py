"""Partitions on arrays small enough to check by hand, their invariants, and published statistics."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedlora.core.errors import ConfigError, DataError
from fedlora.population.clients import (
    Clients,
    Population,
    build_population,
    draw_cohort,
    hold_out,
    summarise,
)
from fedlora.population.partitions import (
    PARTITIONS,
    AnyPartition,
    Dirichlet,
    Iid,
    Natural,
    Partition,
    Pooled,
    Quantity,
    Shards,
)
from fedlora.runs.evaluation import over_clients

NEWS = Path(__file__).parents[3] / "shared" / "data" / "20news.train.jsonl.gz"
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
ALL: list[Partition] = [
    *(Iid(), Pooled(), Shards(), Quantity(beta=2, min_examples=1)),
    *(Dirichlet(alpha=1, scheme=s) for s in ("flasc", "fednlp")),
]


def build(partition: Any, num: int = 3, labels: Any = LABELS, column: Any = None, seed: int = 0, **more: Any) -> Any:
    clients = Clients(partition=partition, num=num, per_round=1, **more)
    return build_population(clients, labels, column, seed).population


def rows(population: Population) -> list[list[int]]:
    return [population.rows_of(client).tolist() for client in range(len(population))]


def test_iid_deals_every_row_in_equal_parts() -> None:
    population = build(Iid(), num=5)
    assert population.sizes().tolist() == [3, 3, 2, 2, 2]
    assert sorted(population.rows.tolist()) == list(range(12))
    assert population.names == ("0", "1", "2", "3", "4")


def test_pooled_is_one_client_in_order() -> None:
    assert rows(build(Pooled(), num=7)) == [list(range(12))]


def test_shards_of_one_class_each() -> None:
    population = build(Shards(shards_per_client=2), num=3)
    # 6 shards of 2 rows, two of each class: [0,3] [6,9] | [1,4] [7,10] | [2,5] [8,11]
    shards = {(0, 3), (6, 9), (1, 4), (7, 10), (2, 5), (8, 11)}
    dealt = [tuple(hand[i : i + 2]) for hand in rows(population) for i in (0, 2)]
    assert set(dealt) == shards
    assert len(dealt) == 6


def test_flasc_scheme_is_its_formula() -> None:
    labels = np.random.default_rng(1).integers(0, 4, 200)
    population = build(Dirichlet(alpha=0.5), num=8, labels=labels, seed=7)
    shares = np.random.default_rng(7).dirichlet([0.5] * 4, 8)
    expected: list[list[int]] = [[] for _ in range(8)]
    for label in range(4):
        mine = np.flatnonzero(labels == label).tolist()
        start = 0
        for client in range(8):
            count = round(shares[client, label] / shares[:, label].sum() * len(mine))
            expected[client] += mine[start : start + count]
            start += count
    assert rows(population) == expected
    assert population.dropped == 200 - sum(map(len, expected))


def test_fednlp_scheme_makes_equal_sizes_and_the_last_takes_the_rest() -> None:
    labels = np.repeat([0, 1, 2], [70, 20, 13])
    population = build(Dirichlet(alpha=0.5, scheme="fednlp"), num=10, labels=labels)
    assert population.sizes().tolist() == [10] * 9 + [13]
    assert population.dropped == 0


def test_hsu_scheme_keeps_the_minimum() -> None:
    labels = np.arange(2000) % 5
    population = build(Dirichlet(alpha=0.3, scheme="hsu", min_examples=15), num=20, labels=labels)
    assert population.sizes().min() >= 15
    assert population.dropped == 0
    with pytest.raises(DataError, match="in 1000 draws: use fewer clients"):
        build(Dirichlet(alpha=0.01, scheme="hsu", min_examples=16), num=120, labels=labels)
    with pytest.raises(DataError, match="which needs 2100"):
        build(Dirichlet(alpha=0.3, scheme="hsu", min_examples=21), num=100, labels=labels)


def test_a_minimum_makes_flasc_draw_anew_and_leaves_a_good_draw_alone() -> None:
    labels = np.arange(400) % 4
    first = build(Dirichlet(alpha=0.5), num=16, labels=labels)
    least = int(first.sizes().min())
    assert rows(build(Dirichlet(alpha=0.5, min_examples=least), num=16, labels=labels)) == rows(first)
    again = build(Dirichlet(alpha=0.5, min_examples=least + 1), num=16, labels=labels)
    assert again.sizes().min() > least
    with pytest.raises(DataError, match="min_examples = 26 of 400 rows, which needs 416: use fewer clients, a larger"):
        build(Dirichlet(alpha=0.5, min_examples=26), num=16, labels=labels)
    # sizes of fednlp are alike, so it has the minimum at once or never
    assert build(Dirichlet(scheme="fednlp", min_examples=25), num=16, labels=labels).sizes().min() == 25


def test_hsu_has_a_minimum_of_ten_unless_told() -> None:
    labels = np.arange(60) % 3
    assert (
        min(build(Dirichlet(alpha=5, scheme="hsu"), num=4, labels=labels, seed=s).sizes().min() for s in range(9)) >= 10
    )
    loose = Dirichlet(alpha=0.5, scheme="hsu", min_examples=1)
    assert min(build(loose, num=4, labels=labels, seed=s).sizes().min() for s in range(9)) < 10


def test_quantity_is_its_formula() -> None:
    population = build(Quantity(beta=0.5, min_examples=1), num=4, labels=np.zeros(100, int), seed=7)
    shares = np.random.default_rng(7).dirichlet([0.5] * 4)
    ends = [int(100 * sum(shares[: client + 1])) for client in range(3)]
    assert population.sizes().tolist() == np.diff([0, *ends, 100]).tolist()
    assert sorted(population.rows.tolist()) == list(range(100))
    assert population.rows.tolist() != list(range(100))


def test_quantity_ignores_labels_and_differs_in_size_as_beta_says() -> None:
    labels = np.arange(40_000) % 4
    for beta in (2.0, 8.0):
        partition = Quantity(beta=beta, min_examples=1)
        populations = [build(partition, num=40, labels=labels, seed=seed) for seed in range(20)]
        # the variance of a Dirichlet's shares, over their squared mean
        spread = np.mean([np.var(one.sizes()) / np.mean(one.sizes()) ** 2 for one in populations])
        assert spread == pytest.approx(39 / (40 * beta + 1), rel=0.15)
        assert all(summarise(one, labels, 4).effective_classes > 3.9 for one in populations)
    assert rows(build(partition, num=40, labels=labels[::-1])) == rows(build(partition, num=40, labels=labels))


def test_quantity_keeps_the_minimum_or_says_that_it_cannot() -> None:
    labels = np.zeros(400, int)
    assert build(Quantity(beta=1, min_examples=1), num=8, labels=labels).sizes().min() < 15
    assert build(Quantity(beta=1, min_examples=15), num=8, labels=labels).sizes().min() >= 15
    with pytest.raises(DataError, match="which needs 408: use fewer clients, a larger beta or a smaller min_examples"):
        build(Quantity(min_examples=51), num=8, labels=labels)
    with pytest.raises(DataError, match=r"at beta = 0\.01 in 1000 draws"):
        build(Quantity(beta=0.01, min_examples=49), num=8, labels=labels)


def test_natural_is_sorted_and_drops_small_clients() -> None:
    column = np.array(["zoe", "amy", "zoe", "bob", "amy", "zoe"])
    population = build(Natural(column="who", min_examples=2), labels=np.zeros(6, int), column=column)
    assert population.names == ("amy", "zoe")
    assert rows(population) == [[1, 4], [0, 2, 5]]
    assert population.dropped == 1
    numbers = build(Natural(column="who"), labels=np.zeros(4, int), column=[10, 9, 10, 2])
    assert numbers.names == ("2", "9", "10")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (None, "needs the values of column 'who'"),
        (np.array(["a", None, "b"], dtype=object), "has no value in 1 of 3 rows"),
        (np.array([1.0, np.nan, 2.0]), "has no value in 1 of 3 rows"),
        (["a", "b", "c"], "none of the 3 clients"),
        (["a", "b"], "has 2 rows and the labels 3"),
    ],
)
def test_natural_refuses(column: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        build(Natural(column="who", min_examples=2), labels=np.zeros(3, int), column=column)


@given(
    users=st.lists(st.integers(0, 6), min_size=2, max_size=60).filter(lambda users: len(set(users)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_test_users_are_in_no_training_client(users: list[int], share: float, seed: int) -> None:
    clients = Clients(partition=Natural(column="user"), test_clients=share)
    population, test_rows = build_population(clients, np.zeros(len(users), int), users, seed)
    assert test_rows is not None
    held_out = {users[row] for row in test_rows}
    assert held_out
    assert not held_out & {users[row] for row in population.rows}
    assert sorted([*test_rows.tolist(), *population.rows.tolist()]) == list(range(len(users)))
    assert population.dropped == 0


@given(
    labels=st.lists(st.integers(0, 4), min_size=6, max_size=80).filter(lambda labels: len(set(labels)) > 1),
    num=st.integers(1, 3),
    index=st.integers(0, len(ALL) - 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_rows_are_dealt_once_and_repeatably(labels: list[int], num: int, index: int, seed: int) -> None:
    population = build(ALL[index], num=num, labels=labels, seed=seed, allow_empty=True)
    assert len(set(population.rows.tolist())) == len(population.rows)
    assert len(population.rows) + population.dropped == len(labels)
    assert population.sizes().min() > 0
    assert rows(build(ALL[index], num=num, labels=labels, seed=seed, allow_empty=True)) == rows(population)
    if not isinstance(ALL[index], Dirichlet):
        assert population.dropped == 0


def test_empty_clients_raise_or_are_left_out() -> None:
    labels = np.repeat([0, 1], 20)
    tiny = Dirichlet(alpha=0.01)
    with pytest.raises(DataError, match=r"\d+ of 30 clients got no rows.*allow_empty"):
        build(tiny, num=30, labels=labels, seed=2)
    population = build(tiny, num=30, labels=labels, seed=2, allow_empty=True)
    assert population.empty > 0
    assert len(population) == 30 - population.empty
    assert summarise(population, labels, 2).num_empty == population.empty


@pytest.mark.parametrize(
    ("partition", "num", "labels", "text"),
    [
        (Iid(), 13, LABELS, "only 12 rows: use fewer"),
        (Iid(), 1, np.zeros(0, int), "non-empty"),
        (Iid(), 1, np.zeros((3, 2), int), "one per row"),
        (Shards(shards_per_client=5), 3, LABELS, "need 15 rows"),
        (Shards(), 2, np.full(9, 4), "all 9 rows have class 4"),
        (Dirichlet(), 2, np.full(9, 4), "all 9 rows have class 4.* set clients.skew to"),
        (Dirichlet(), 2, np.array([0, -1, 1]), "class numbers from 0"),
        (Dirichlet(), 2, np.array([0.5, 1.0]), "class numbers from 0"),
        (Dirichlet(alpha=1e-5), 1, np.array([0, 1]), "larger alpha"),
    ],
)
def test_data_that_cannot_be_dealt(partition: Any, num: int, labels: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        build(partition, num=num, labels=labels)


def test_configurations_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match=r"test_clients = 0\.2"):
        Clients(test_clients=0.2)
    with pytest.raises(ConfigError, match="exceeds the 5 clients"):
        Clients(num=5, per_round=6)
    with pytest.raises(ConfigError, match="exceeds the 1 client there"):
        Clients(partition=Pooled())
    with pytest.raises(ValidationError, match="greater than 0"):
        Dirichlet(alpha=0)


def test_the_table_and_the_union_agree() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyPartition)
    for kind, cls in PARTITIONS.items():
        needed = {"column": "user"} if kind == "natural" else {}
        assert type(adapter.validate_python({"kind": kind, **needed})) is cls
    assert Clients(partition=Natural(column="user")).column() == "user"
    assert Clients().column() is None


def test_cohort_is_drawn_without_replacement_in_order_of_the_draw() -> None:
    population = build(Iid(), num=12)
    cohort = draw_cohort(population, 5, seed=3)
    assert len(set(cohort)) == 5
    assert cohort == draw_cohort(population, 5, seed=3)
    assert all(type(client) is int for client in cohort)
    assert sorted(draw_cohort(population, 12, seed=1)) == list(range(12))
    assert any(draw_cohort(population, 5, seed=s) != tuple(sorted(draw_cohort(population, 5, seed=s))) for s in (1, 2))
    with pytest.raises(ConfigError, match="exceeds the 12 clients"):
        draw_cohort(population, 13, seed=0)


def test_cohorts_are_uniform() -> None:
    population = build(Iid(), num=6)
    drawn = np.bincount([c for seed in range(2000) for c in draw_cohort(population, 2, seed)], minlength=6)
    # 4000 draws over 6: mean 667, standard deviation about 21
    assert abs(drawn - 4000 / 6).max() < 100


def test_summary_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 0])
    population = Population(("a", "b", "c"), np.array([0, 1, 2, 4, 5, 6]), np.array([0, 3, 5, 6]), dropped=2)
    summary = summarise(population, labels, 3)
    assert (summary.min_size, summary.median_size, summary.max_size) == (1, 2.0, 3)
    assert (summary.num_clients, summary.num_examples, summary.dropped) == (3, 6, 2)
    assert summary.top_class_share == 1.0
    assert summary.effective_classes == 1.0
    assert summary.num_single_class == 3
    even = Population(("a",), np.array([0, 1, 4, 5]), np.array([0, 4]))
    assert summarise(even, labels, 3).effective_classes == pytest.approx(2.0)
    assert summarise(even, labels, 3).as_dict()["top_class_share"] == 0.5


def test_many_clients_are_flat_in_memory() -> None:
    population = build(Iid(), num=20_000, labels=np.zeros(50_000, int))
    assert population.rows.dtype == population.offsets.dtype == np.int64
    assert population.rows_of(19_999).base is not None
    with pytest.raises(ValueError, match="read-only"):
        population.rows_of(0)[0] = 1


# ---- what clients keep away from training


def test_a_client_keeps_a_share_of_its_rows_and_at_least_one_and_never_all() -> None:
    population = Population(
        tuple("abcde"), np.arange(20), np.array([0, 1, 3, 8, 18, 20]), dropped=3, empty=2
    )  # of 1, 2, 5, 10 and 2 rows
    train, held = hold_out(population, 0.3, seed=5)
    assert {client: len(kept) for client, kept in held.items()} == {1: 1, 2: 2, 3: 3, 4: 1}
    assert train.sizes().tolist() == [1, 1, 3, 7, 1]
    assert (train.names, train.dropped, train.empty, train.held_out) == (population.names, 3, 2, 7)
    for client in range(5):
        kept = held.get(client, np.zeros(0, int)).tolist()
        assert kept == sorted(kept)
        assert sorted([*kept, *train.rows_of(client).tolist()]) == population.rows_of(client).tolist()
    assert {client: len(kept) for client, kept in hold_out(population, 0.99, seed=5)[1].items()} == {
        1: 1,
        2: 4,
        3: 9,
        4: 1,
    }
    assert summarise(train, np.zeros(20, int), 1).held_out == 7


def test_nothing_is_kept_where_the_share_is_nought() -> None:
    population = build(Iid())
    assert hold_out(population, 0.0, seed=1) == (population, {})


def test_what_a_client_keeps_follows_from_the_seed_and_its_number_alone() -> None:
    one = Population(("a", "b"), np.arange(30), np.array([0, 10, 30]))
    other = Population(("a", "b"), np.arange(5, 35), np.array([0, 10, 30]))
    assert hold_out(one, 0.2, 3)[1][1].tolist() == hold_out(one, 0.2, 3)[1][1].tolist()
    assert (hold_out(other, 0.2, 3)[1][0] - 5).tolist() == hold_out(one, 0.2, 3)[1][0].tolist()
    assert hold_out(one, 0.2, 4)[1][1].tolist() != hold_out(one, 0.2, 3)[1][1].tolist()
    twins = hold_out(Population(("a", "b"), np.arange(40), np.array([0, 20, 40])), 0.2, 3)[1]
    assert (twins[1] - 20).tolist() != twins[0].tolist()


def test_every_row_is_kept_equally_often() -> None:
    population = Population(("a",), np.arange(10), np.array([0, 10]))
    counts = np.bincount([row for seed in range(1000) for row in hold_out(population, 0.3, seed)[1][0]], minlength=10)
    # 1000 draws with chance 0.3: mean 300, standard deviation 14.5
    assert abs(counts - 300).max() < 60


def test_a_metric_over_clients_by_hand() -> None:
    values = [0.9, 0.1, 0.5, 0.7]
    assert over_clients("f1", values, higher_is_better=True) == {
        "client_mean_f1": pytest.approx(0.55),
        "client_worst_tenth_f1": 0.1,
        "client_spread_f1": pytest.approx(np.sqrt((0.35**2 + 0.45**2 + 0.05**2 + 0.15**2) / 4)),
    }
    assert over_clients("loss", values, higher_is_better=False)["client_worst_tenth_loss"] == 0.9
    # of 29 clients, two are a tenth
    many = [float(number) for number in range(29)]
    assert over_clients("f1", many, higher_is_better=True)["client_worst_tenth_f1"] == 0.5
    assert over_clients("loss", many, higher_is_better=False)["client_worst_tenth_loss"] == 27.5
    assert over_clients("loss", [], higher_is_better=False) == {}


@pytest.fixture(scope="module")
def news() -> np.ndarray[Any, Any]:
    if not NEWS.exists():
        pytest.skip("needs the 20 Newsgroups rows of the folder shared/data beside the project")
    with gzip.open(NEWS, "rt", encoding="utf-8") as lines:
        return np.array([json.loads(line)["label"] for line in lines])


def test_flasc_statistics_on_20_newsgroups(news: np.ndarray[Any, Any]) -> None:
    # published partition: 9,051 rows, 350 clients, alpha 0.1: sizes 19 / 25 / 32, top share 0.50, 1.9 % dropped
    labels = np.random.default_rng(0).permutation(news)[:9051]
    summaries = [summarise(build(Dirichlet(), num=350, labels=labels, seed=seed), labels, 20) for seed in range(5)]
    for summary in summaries:
        assert 13 <= summary.min_size <= 22
        assert 24 <= summary.median_size <= 27
        assert 29 <= summary.max_size <= 40
        assert summary.top_class_share == pytest.approx(0.50, abs=0.04)
        assert 0.01 < summary.dropped / 9051 < 0.03


@pytest.mark.parametrize(
    ("scheme", "alpha", "top", "effective"),
    [
        ("fednlp", 0.1, 1.00, 1.0),
        ("fednlp", 1, 0.63, 2.6),
        ("fednlp", 10, 0.23, 10.2),
        ("fednlp", 100, 0.10, 18.2),
        ("flasc", 0.01, 0.97, 1.1),
        ("flasc", 0.1, 0.48, 4.1),
        ("flasc", 1, 0.17, 13.6),
        ("flasc", 5, 0.10, 18.3),
    ],
)
def test_alpha_means_what_it_means_in_each_code_base(
    news: np.ndarray[Any, Any], scheme: Any, alpha: float, top: float, effective: float
) -> None:
    # many copies of the histogram, so that rounding does not blur the shares
    labels = np.tile(news, 10)
    summary = summarise(build(Dirichlet(alpha=alpha, scheme=scheme), num=200, labels=labels), labels, 20)
    assert summary.top_class_share == pytest.approx(top, abs=0.08)
    assert summary.effective_classes == pytest.approx(effective, rel=0.15)

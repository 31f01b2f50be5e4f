"""Which values are tried: grids, balanced samples, ranges, and best values at their ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from fedlora.core.errors import ConfigError
from fedlora.study.space import at_ends, parse_vary, points


def test_words_become_lists_and_ranges() -> None:
    found = parse_vary(
        ["rank=1,2, 4", "server.lr=1e-3..1e-1", "local.dropout=true,false", "local.compute=bf16,float32"]
    )
    assert found == {
        "rank": [1, 2, 4],
        "server.lr": "1e-3..1e-1",
        "local.dropout": [True, False],
        "local.compute": ["bf16", "float32"],
    }
    assert parse_vary(["a=.01,+1.,7,007,x.5"]) == {"a": [0.01, 1.0, 7, 7, "x.5"]}
    assert parse_vary(["server=[1, 2]"]) == {"server": [[1, 2]]}


@pytest.mark.parametrize("wrong", ["rank", "rank=", "=1"])
def test_other_words_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        parse_vary([wrong])


def test_a_key_has_its_values_once() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_vary(["rank=1", "rank=2"])


@pytest.mark.parametrize("keys", [("rank", "method.rank"), ("method.server.lr", "server.lr"), ("server.lr", "server")])
def test_a_key_that_replaces_another_is_refused(keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"'{keys[1]}' replaces '{keys[0]}', which would vary in name only"):
        points({key: [1, 2] for key in keys}, 8, 0)
    assert len(points({"server": [{"kind": "sgd"}, {"kind": "adam"}], "server.lr": [0.1, 1.0]}, 8, 0)) == 4


def test_lists_with_few_combinations_are_a_grid() -> None:
    found = points({"a": [1, 2], "b": ["x", "y", "z"]}, 6, 0)
    assert [tuple(one.values()) for one in found] == [(a, b) for a in (1, 2) for b in "xyz"]
    assert points({}, 4, 0) == [{}]


def test_more_combinations_are_a_balanced_sample_without_repetitions() -> None:
    vary = {"a": [1, 2], "b": [1, 2, 3], "c": [1, 2, 3, 4]}
    found = points(vary, 8, 0)
    assert len({tuple(one.values()) for one in found}) == 8
    for key, values in vary.items():
        counts = Counter(one[key] for one in found)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert found == points(vary, 8, 0) != points(vary, 8, 1)


def test_a_range_is_cut_evenly_on_a_logarithmic_scale_with_both_ends() -> None:
    found = points({"a": "1e-4..1e-1", "b": [0.05, 0.5]}, 8, 3)
    values = sorted(one["a"] for one in found)
    assert (values[0], values[-1]) == (1e-4, 1e-1)
    np.testing.assert_allclose(np.diff(np.log(values)), np.log(1e3) / 7, rtol=0.02)
    assert Counter(one["b"] for one in found) == {0.05: 4, 0.5: 4}
    assert points({"a": "1e-4..1e-2"}, 1, 0) == [{"a": 1e-3}]
    assert points({"a": "0..1.0"}, 3, 0) == [{"a": 0}, {"a": 0.5}, {"a": 1.0}]


@pytest.mark.parametrize(("given", "num"), [("0.99..0.999", 16), (".99991..0.99993", 8), ("-0.01..0.001", 5)])
def test_the_values_of_a_narrow_range_differ(given: str, num: int) -> None:
    values = [one["a"] for one in points({"a": given}, num, 0)]
    assert len(set(values)) == num
    low, high = map(float, given.split(".."))
    assert (values[0], values[-1]) == (low, high)
    assert values == sorted(values)
    assert low < points({"a": given}, 1, 0)[0]["a"] < high


def test_a_range_of_few_numbers_has_each_of_them_once() -> None:
    values = [one["a"] for one in points({"a": "1.0..1.0000000000000004"}, 9, 0)]
    assert values == [1.0, 1.0000000000000002, 1.0000000000000004]


def test_whole_numbers_stay_whole() -> None:
    assert points({"rank": "1..64"}, 4, 0) == [{"rank": 1}, {"rank": 4}, {"rank": 16}, {"rank": 64}]
    assert points({"rank": "1..3"}, 8, 0) == [{"rank": 1}, {"rank": 2}, {"rank": 3}]


@pytest.mark.parametrize("given", ["0.1..0.01", "low..high", "0.1", [], [1, 1], 3])
def test_values_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError):
        points({"a": given}, 4, 0)


def test_a_best_value_at_an_end_is_named() -> None:
    vary = {"a": [1, 2, 3], "b": "1e-3..1e-1", "c": ["x", "y"], "d": [True, False], "e": [5]}
    assert at_ends(vary, {"a": 3, "b": 1e-2, "c": "x", "d": True, "e": 5}) == ["a"]
    assert at_ends(vary, {"a": 2, "b": 1e-3, "c": "x", "d": True, "e": 5}) == ["b"]

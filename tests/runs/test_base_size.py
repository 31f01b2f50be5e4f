"""Base updates that are a large share of the model are refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny import document, experiment, ledger, tiny_world

import fedlora
from fedlora import config
from fedlora.core.errors import ConfigError

world = pytest.fixture(scope="module")(tiny_world)


@pytest.mark.parametrize(("method", "cure"), [("flora", "rank of the adapters, or raise"), ("fedex", "truncate it")])
def test_a_large_base_update_is_refused_before_training(world: Path, tmp_path: Path, method: str, cure: str) -> None:
    chosen = experiment(world, method, "method.max_base_share=0.01")
    with pytest.raises(ConfigError, match=rf"where 1% is allowed: lower clients.per_round.*{cure}.*max_base_share to"):
        fedlora.run(chosen, tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.jsonl").exists() or ledger(tmp_path / "run") == []


def test_it_is_never_larger_than_the_matrices_that_it_edits(world: Path, tmp_path: Path) -> None:
    # nine clients of rank 16 make 144 x 64 entries for each of four matrices of 32 x 32, sent in the second round
    chosen = experiment(world, "flora", "method.rank=16", "clients.per_round=9", rounds=2)
    found = fedlora.run(chosen, tmp_path / "run").down_bytes["fold"]
    assert found == pytest.approx(9 * 4 * 32 * 32 * 4, rel=0.02)
    with pytest.raises(ConfigError, match="rank 144 with 9 clients of rank 16"):
        fedlora.run(experiment(world, "flora", "method.rank=16", "clients.per_round=9", "method.max_base_share=0.1"))


def test_the_default_is_absent_from_the_digest(world: Path) -> None:
    aggregator = config.resolved(experiment(world, "flora"))["phases"][0]["recipe"]["aggregator"]
    assert aggregator == {"kind": "stack", "weighting": "uniform"}
    assert "max_base_share" not in document(world, "flora")["method"]

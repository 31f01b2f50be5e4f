"""Evaluations as tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny import experiment, tiny_world

import fedlora
from fedlora.core.errors import ConfigError

world = pytest.fixture(scope="module")(tiny_world)


def test_a_table_has_a_row_per_evaluation_with_cumulative_bytes(world: Path, tmp_path: Path) -> None:
    found = fedlora.run(experiment(world, "lora", rounds=3), tmp_path / "runs" / "a")
    table = found.frame()
    assert [*table.columns[:4], *table.columns[-4:]] == [
        *("label", "seed", "round", "phase", "down_bytes", "up_bytes", "loss", "folder")
    ]
    assert table["round"].tolist() == [0, 2, 3]
    assert table["accuracy"].tolist() == [row.metrics["accuracy"] for row in found.rows if row.metrics]
    assert table["down_bytes"].iloc[1] == sum(sum(row.down_bytes.values()) for row in found.rows[:3])
    assert table["up_bytes"].iloc[-1] == sum(found.up_bytes.values())
    assert table["loss"].isna().tolist() == [True, False, False]
    fedlora.run(experiment(world, "lora", "seed=1", rounds=3), tmp_path / "runs" / "b", until=1)
    (tmp_path / "runs" / "other").mkdir()
    both = fedlora.load_results(str(tmp_path / "runs" / "*"))
    assert both.iloc[:3].equals(table)
    assert both[["seed", "round"]].to_numpy().tolist() == [[0, 0], [0, 2], [0, 3], [1, 0], [1, 1]]
    with pytest.raises(ConfigError, match="no run was found"):
        fedlora.load_results(str(tmp_path / "nothing*"))
    with pytest.raises(ConfigError, match="no run was found"):
        fedlora.load_results(tmp_path / "runs" / "other")


def test_clients_that_train_alone_have_a_table_each(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, "lora", "mode='local'", "num_local=2", rounds=2), tmp_path / "run")
    table = result.frame()
    assert table.equals(fedlora.load_results(tmp_path / "run"))
    assert table["folder"].nunique() == 2
    ends = table[table["round"] == 2]
    assert ends["test_loss"].mean() == pytest.approx(result.after["loss"])


def test_a_folder_may_have_the_name_of_a_pattern(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, rounds=1), tmp_path / "lr[0.1]")
    assert fedlora.load_results(result.folder).equals(result.frame())
    assert fedlora.load_results([result.folder]).equals(result.frame())
    with pytest.raises(ConfigError, match=r"there is no folder .*flasc"):
        fedlora.load_results([result.folder, tmp_path / "flasc"])

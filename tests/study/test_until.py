"""A run that stops at a round for now goes on to the same bits as one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.tiny import contents, experiment, ledger, tiny_world

from fedlora.runs.experiment import run

world = pytest.fixture(scope="module")(tiny_world)


@pytest.mark.parametrize("method", ["flasc", "slora"])
def test_stages_give_the_run_that_never_stopped(world: Path, tmp_path: Path, method: str) -> None:
    chosen = experiment(world, method, "evaluate.every=4", "checkpoint_every=3", rounds=5)
    whole = run(chosen, tmp_path / "whole")
    first = run(chosen, tmp_path / "stages", until=1)
    assert (first.rounds, first.adapter) == (1, None)
    assert first.after == first.rows[1].metrics != {}
    assert not (tmp_path / "stages" / "result.json").exists()
    assert run(chosen, tmp_path / "stages", until=3).rounds == 3
    again = run(chosen, tmp_path / "stages", until=1)
    assert (again.rounds, again.after, again.up_bytes) == (1, first.after, first.up_bytes)
    last = run(chosen, tmp_path / "stages")
    assert last.after == whole.after
    rows = ledger(tmp_path / "stages")
    assert rows[1]["metrics"]
    assert rows[3]["metrics"]
    for row in (rows[1], rows[3]):
        row["metrics"], row["warnings"] = {}, []
    assert rows == ledger(tmp_path / "whole")
    state = "checkpoints/round-000005/state.safetensors"
    assert contents(tmp_path / "stages")[state] == contents(tmp_path / "whole")[state]


def test_clients_that_train_alone_stop_too(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", "mode=local", "num_local=2", rounds=3)
    first = run(chosen, tmp_path / "stages", until=2)
    assert first.rounds == 2
    assert not (tmp_path / "stages" / "result.json").exists()
    assert run(chosen, tmp_path / "stages").after == run(chosen, tmp_path / "whole").after

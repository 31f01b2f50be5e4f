"""Configurations: from TOML and back, overrides, and the method that [method] stands for."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedlora import config
from fedlora.config import Experiment
from fedlora.config.template import template
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS, flasc
from fedlora.population.clients import Clients
from fedlora.population.partitions import PARTITIONS, Pooled
from fedlora.population.skew import SKEWS
from fedlora.privacy import PRIVACY
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.local import CLIENT_OPTIMIZERS, Local
from fedlora.server.aggregate import AGGREGATORS
from fedlora.server.optimizers import SERVER_OPTIMIZERS
from fedlora.tasks import SOURCES, TASKS, Files, Model
from fedlora.transport import PRECISIONS, SPARSIFIERS, Link
from fedlora.tuning import LORA_INITS, TUNINGS, LoRA

STATED: dict[str, dict[str, Any]] = {
    "natural": {"column": "user"},
    "files": {"train": "rows.csv", "columns": {"text_pair": "second", "label": "the label"}},
    "hub": {"path": "owner/name", "revision": "abc", "test_split": ""},
    "image_folder": {"path": "pictures"},
    "rows": {"train": "rows:0f"},
    "collated": {"collator": "code:0f"},
    "sites": {"test": "test.jsonl"},
    "validation": {"source": {"kind": "docstrings"}},
    "column": {"name": "user"},
    "peft": {"config": {"peft_type": "IA3", "target_modules": ["query"]}},
    "central_gaussian": {"clip_norm": 0.5, "noise_multiplier": 1.0},
    "top_k": {"density": 0.25},
    "random_k": {"density": 0.25},
    "threshold": {"value": 0.5},
    "rank_slice": {"rank": 2},
    "norm_bound": {"norm": 1.0},
}
"""The fields that have no default."""


def make(component: type, kind: str) -> Any:
    return component(**STATED.get(kind, {}))


def over(recipe: Recipe) -> Experiment:
    return Experiment(phases=(Phase(recipe=recipe, rounds=2),))


def all_experiments() -> dict[str, Experiment]:
    """One experiment per value of every slot."""
    found: dict[str, Experiment] = {}
    for kind, tuning in TUNINGS.items():
        found[f"tuning-{kind}"] = over(Recipe(tuning=make(tuning, kind)))
    for kind, init in LORA_INITS.items():
        found[f"init-{kind}"] = over(Recipe(tuning=LoRA(init=make(init, kind))))
    for kind, sparsifier in SPARSIFIERS.items():
        found[f"sparsify-{kind}"] = over(Recipe(up=Link(sparsify=make(sparsifier, kind))))
    for kind, precision in PRECISIONS.items():
        found[f"precision-{kind}"] = over(Recipe(down=Link(precision=make(precision, kind))))
    for kind, aggregator in AGGREGATORS.items():
        found[f"aggregator-{kind}"] = over(Recipe(aggregator=make(aggregator, kind)))
    for kind, server in SERVER_OPTIMIZERS.items():
        found[f"server-{kind}"] = over(Recipe(server=make(server, kind)))
    for kind, optimizer in CLIENT_OPTIMIZERS.items():
        found[f"client-{kind}"] = over(Recipe(local=Local(optimizer=make(optimizer, kind), max_steps=3)))
    for kind, privacy in PRIVACY.items():
        found[f"privacy-{kind}"] = over(Recipe(privacy=make(privacy, kind)))
    for kind, partition in PARTITIONS.items():
        num = 1 if partition is Pooled else 20
        clients = Clients(partition=make(partition, kind), num=num, per_round=1)
        found[f"partition-{kind}"] = Experiment(clients=clients)
    for kind, skew in SKEWS.items():
        found[f"skew-{kind}"] = Experiment(clients=Clients(skew=make(skew, kind)))
    for kind, source in SOURCES.items():
        found[f"data-{kind}"] = Experiment(data=make(source, kind))
    for kind, task in TASKS.items():
        found[f"task-{kind}"] = Experiment(task=make(task, kind), model=Model(path="bert", revision="main"))
    for kind in METHODS:
        found[f"method-{kind}"] = config.parse({"method": {"kind": kind, "rounds": 12}})
    return found


EXPERIMENTS = all_experiments()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_survives_toml(tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(EXPERIMENTS[name]), encoding="utf-8")
    assert config.load(file) == config.load(tmp_path) == EXPERIMENTS[name]


def test_every_experiment_has_a_digest_of_its_own() -> None:
    different = {config.to_toml(one): config.digest(one) for one in EXPERIMENTS.values()}
    assert len(set(different.values())) == len(different) > 30


def test_reading_is_in_the_digest_only_where_it_is_chosen() -> None:
    plain = Experiment(data=Files(train="a.csv"))
    assert config.resolved(plain)["data"].keys() == {"kind", "train", "test_fraction", "seed", "columns"}
    chosen = [{"delimiter": ";"}, {"encoding": "latin-1"}, {"max_unpacked_gb": 8.0}, {"format": "csv"}]
    chosen.append({"train": ["a.csv", "b.csv"]})
    others = [config.parse({"data": {"kind": "files", "train": "a.csv", **one}}) for one in chosen]
    assert len({config.digest(one) for one in [plain, *others]}) == 6
    for one in others:
        assert config.parse(tomllib.loads(config.to_toml(one))) == one


def test_a_byte_order_mark_before_toml_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert config.load(tmp_path / "run.toml").seed == 3


def test_no_label_puts_a_run_outside_its_folder() -> None:
    for label in ("lora", "lora r/8", "../../x", "..\\x"):
        folder = config.default_folder(config.parse({"label": label}))
        assert folder.parent == Path("runs")
        assert len(folder.parts) == 2


def test_the_digest_does_not_hear_how_often_is_saved() -> None:
    assert config.digest(Experiment()) == config.digest(Experiment(checkpoint_every=7))
    assert config.digest(Experiment()) != config.digest(Experiment(seed=1))


@pytest.mark.parametrize("method", METHODS)
def test_new_prints_a_configuration_of_the_method_with_its_defaults(method: str) -> None:
    text = template(method)
    experiment = config.parse(tomllib.loads(text))
    assert experiment == Experiment(label=method, phases=METHODS[method]())
    assert text.startswith("#:schema ./fedlora.schema.json\n")
    assert f"\n# {(inspect.getdoc(METHODS[method]) or '').split(chr(10))[0].replace('``', '')}" in text


def test_a_method_in_toml_is_the_method_in_python() -> None:
    document = tomllib.loads('[method]\nkind = "flasc"\nrank = 8\nlocal = { epochs = 2, batch_size = 4 }\n')
    experiment = config.parse(document)
    assert experiment.phases == flasc(rank=8, local=Local(epochs=2, batch_size=4))
    assert experiment.label == "flasc"


def test_rounds_are_those_of_all_phases() -> None:
    assert config.parse({"method": {"kind": "slora", "rounds": 12, "warm_rounds": 4}}).rounds == 12


# ---- overrides


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=7", {"seed": 7}),
        ("clients.num=3", {"clients": {"num": 3}}),
        ('label="a b"', {"label": "a b"}),
        ("label=plain words", {"label": "plain words"}),
        ("data.train=/a=b.csv", {"data": {"train": "/a=b.csv"}}),
        ("method.targets=['query', 'key']", {"method": {"targets": ["query", "key"]}}),
        ("clients.partition={kind='iid'}", {"clients": {"partition": {"kind": "iid"}}}),
        ("evaluate.dense=false", {"evaluate": {"dense": False}}),
        ("method.server.lr=1e-3", {"method": {"server": {"lr": 1e-3}}}),
    ],
)
def test_an_override_is_a_dotted_key_and_a_value_as_in_toml(assignment: str, expected: dict[str, Any]) -> None:
    document: dict[str, Any] = {}
    config.override(document, assignment)
    assert document == expected


def test_an_override_keeps_what_stands_beside_it() -> None:
    document = {"clients": {"num": 3, "per_round": 2}, "seed": 1}
    config.override(document, "clients.num=4")
    assert document == {"clients": {"num": 4, "per_round": 2}, "seed": 1}


def test_an_override_reaches_into_a_phase_by_number() -> None:
    document = config.resolved(config.parse({"method": {"kind": "slora"}}))
    config.override(document, "phases.1.rounds=3")
    assert [phase.rounds for phase in config.parse(document).phases] == [10, 3]


@pytest.mark.parametrize("key", ["local.optimizer.lr", "server.lr"])
def test_a_key_of_no_table_belongs_to_the_method(key: str) -> None:
    server = {"kind": "adam", "lr": 1.0}
    method = {"kind": "slora", "server": server, "local": {"optimizer": {"kind": "sgd"}}}
    document: dict[str, Any] = {"method": method}
    config.override(document, f"{key}=0.25")
    assert str(document["method"]).count("'lr': 0.25") == 1
    assert config.parse(document)
    phases = config.resolved(config.parse({"method": {"kind": "slora", "server": server}}))
    config.override(phases, f"{key}=0.25")
    assert str(phases).count("'lr': 0.25") == 2
    assert config.parse(phases)


def test_rounds_are_those_of_one_phase() -> None:
    document = config.resolved(config.parse({"method": {"kind": "lora"}}))
    config.override(document, "rounds=3")
    assert config.parse(document).rounds == 3
    config.override(shorthand := {"method": {"kind": "lora"}}, "rounds=4")
    assert config.parse(shorthand).rounds == 4
    with pytest.raises(ConfigError, match=r"name one, as in phases\.0\.rounds"):
        config.override(config.resolved(config.parse({"method": {"kind": "slora"}})), "rounds=3")


def test_a_slip_in_a_key_of_the_top_is_no_key_of_the_method() -> None:
    document: dict[str, Any] = {"method": {"kind": "lora"}}
    with pytest.raises(
        ConfigError, match=r"unknown key 'clinets\.num', did you mean 'clients\.num'; known here: label"
    ):
        config.override(document, "clinets.num=3")
    config.override(document, "loca.epochs=3")
    with pytest.raises(ConfigError, match=r"unknown key 'method\.loca', did you mean 'local'"):
        config.parse(document)


@pytest.mark.parametrize(
    ("assignment", "meant"),
    [
        ("metod.rank=4", "'method.rank'; known here: .*, phases, method, and"),
        ("metod={kind='lora'}", "'method';"),
        ("max_length=32", "'task.max_length';"),
        ("optimizer.lr=1.0", "'local.optimizer.lr';"),
        ("lr=1.0", "'server.lr' or 'server_head.lr' or 'local.optimizer.lr';"),
        ("seeed=1", "'seed';"),
    ],
)
def test_a_key_that_stands_elsewhere_or_is_a_slip_is_named_with_its_whole_path(assignment: str, meant: str) -> None:
    for document in ({}, {"method": {"kind": "lora"}}, config.resolved(config.parse({}))):
        before = copy.deepcopy(document)
        with pytest.raises(ConfigError, match=f"unknown key '.*', did you mean {meant}"):
            config.override(document, assignment)
        assert document == before


def test_a_key_of_another_method_waits_for_its_kind() -> None:
    document: dict[str, Any] = {"method": {"kind": "full"}}
    config.override(document, "warm_rounds=3")
    config.override(document, "method.kind=slora")
    assert config.parse(document).phases[0].rounds == 3


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("task.max_length=32", {"task": {"kind": "text_classification", "max_length": 32}}),
        ("data.num_classes=4", {"data": {"kind": "docstrings", "num_classes": 4}}),
        ("clients.partition.alpha=0.5", {"clients": {"partition": {"kind": "dirichlet", "alpha": 0.5}}}),
    ],
)
def test_an_override_needs_no_table_where_the_default_has_the_key(assignment: str, expected: dict[str, Any]) -> None:
    document: dict[str, Any] = {}
    config.override(document, assignment)
    assert document == expected
    config.parse(document)


def test_an_override_that_the_default_kind_lacks_asks_for_a_kind() -> None:
    config.override(document := {}, "data.train=x.csv")
    with pytest.raises(ConfigError, match="data needs a kind, one of: docstrings, docstring_questions, files"):
        config.parse(document)


def test_a_slip_in_method_is_one_in_a_file_too() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'metod', did you mean 'method'; known here: label.*, method"):
        config.parse({"metod": {"kind": "lora"}})


def test_later_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("seed = 1\n")
    assert config.load(tmp_path / "run.toml", ["seed=2", "seed=3"]).seed == 3
    assert config.load(str(tmp_path / "run.toml")).seed == 1


# ---- what is wrong, where, and what is known there


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            {"phases": [{"recipe": {"tuning": {"kind": "lora", "rnk": 2}}}]},
            "unknown key 'phases.0.recipe.tuning.rnk', did you mean 'rank'; "
            "known here: kind, rank, alpha, targets, init, dropout",
        ),
        ({"phases": [{"recipe": {"rank": 2}}]}, "unknown key 'phases.0.recipe.rank', did you mean 'tuning.rank' or"),
        (
            {"phases": [{"recipe": {"down": {"sparsify": {"kind": "top_k", "density": 2.0}}}}]},
            "phases.0.recipe.down.sparsify.density = 2.0: input should be less than or equal to 1",
        ),
        ({"phases": [{"recipe": {"tuning": {"rank": 2}}}]}, "phases.0.recipe.tuning needs a kind, one of: lora, full"),
        ({"method": {"rank": 2}}, "[method] needs a kind, one of: fedavg, lora"),
        (
            {"method": {"kind": "lora", "server_head": {"lr": 0.1}}},
            "method.server_head needs a kind, one of: sgd, adam",
        ),
        (
            {"method": {"kind": "lora", "server_head": {"kind": "adamw", "lrr": 0.1}}},
            "unknown key 'method.server_head.lrr', did you mean 'lr'",
        ),
        (
            {"method": {"kind": "lora", "up": {"head_precision": {"kind": "uniform", "bits": 3}}}},
            "method.up.head_precision.bits = 3",
        ),
        ({"method": {"kind": "fedavg", "tuning": {"kind": "loar"}}}, "did you mean 'lora'"),
        ({"model": {"path": 3}}, "model.path = 3: input should be a valid string"),
        ({"phases": []}, "phases = []"),
    ],
)
def test_a_mistake_is_named_with_its_place(document: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(document)
    assert expected in str(error.value)
    assert "; phases = [" not in str(error.value)


def test_not_a_number_is_no_setting() -> None:
    with pytest.raises(ConfigError, match="finite number"):
        config.parse({"method": {"kind": "lora", "alpha": float("nan")}})


def test_differences_are_dotted_keys_with_both_values() -> None:
    left = config.resolved(config.parse({"method": {"kind": "lora", "rank": 4}}))
    right = config.resolved(config.parse({"method": {"kind": "lora", "rank": 8}, "seed": 1}))
    assert config.differences(left, right) == ["phases.0.recipe.tuning.rank: 4 against 8", "seed: 0 against 1"]


def test_every_field_of_an_experiment_is_documented() -> None:
    text = inspect.getdoc(Experiment) or ""
    assert [f.name for f in dataclasses.fields(Experiment) if f"    {f.name}: " not in text] == []

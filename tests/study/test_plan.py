"""Study files: what each run's configuration is, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedlora import config
from fedlora.config.files import merged
from fedlora.config.places import located
from fedlora.core.errors import ConfigError
from fedlora.study import load_study, parse_study
from fedlora.study.runner import Runner, setting_names

EXAMPLE = Path(__file__).parents[2] / "examples" / "study.toml"


def study(**more: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "seeds": [0, 1],
        "base": {
            "clients": {"num": 20, "per_round": 5},
            "method": {"rounds": 6, "local": {"max_steps": 4}, "server": {"kind": "adamw", "lr": 5e-3}},
        },
        "methods": {"lora": {"kind": "lora", "rank": 4}, "ffa": {"kind": "ffa", "server": {"kind": "sgd", "lr": 1.0}}},
        "vary": {"clients.partition.alpha": [0.5, 0.1], "local.max_steps": [2, 3]},
        "tune": {"trials": 2, "vary": {"local.optimizer.lr": [1e-3, 1e-2], "server.lr": "1e-3..1e-1"}},
        **more,
    }


def test_every_method_gets_a_configuration_at_every_setting() -> None:
    values = study()
    values["base"]["method"]["local"]["optimizer"] = {"kind": "sgd", "lr": 0.5}
    values["base"]["clients"]["partition"] = {"kind": "dirichlet"}
    found = parse_study(values)
    assert found.labels == ["lora", "ffa", "head_only", "centralised_lora", "local_lora"]
    assert list(setting_names(found)) == [f"alpha={a},max_steps={s}" for a in (0.5, 0.1) for s in (2, 3)]
    settings = found.settings()
    experiments = {label: config.parse(found.document(label, settings[3], 7)) for label in found.labels}
    for label, experiment in experiments.items():
        assert (experiment.label, experiment.seed, experiment.rounds) == (label, 7, 6)
        assert experiment.clients.partition.alpha == 0.1  # type: ignore[union-attr]
        assert experiment.phases[0].recipe.local.max_steps == 3
        assert experiment.phases[0].recipe.local.optimizer.lr == 0.5  # type: ignore[attr-defined]
    recipes = {label: experiment.phases[0].recipe for label, experiment in experiments.items()}
    assert {label: recipe.server.kind for label, recipe in recipes.items()} == {  # type: ignore[attr-defined]
        "lora": "adamw",
        "ffa": "sgd",
        "head_only": "adamw",
        "centralised_lora": "adamw",
        "local_lora": "adamw",
    }
    assert recipes["head_only"].tuning.kind == "head_only"  # type: ignore[attr-defined]
    assert [experiment.mode for experiment in experiments.values()][2:] == ["federated", "centralised", "local"]
    assert found.varied("lora").keys() == {"local.optimizer.lr", "server.lr"}
    assert found.varied("local_lora").keys() == {"local.optimizer.lr"}
    assert found.base == values["base"]


def test_lines_can_be_of_several_methods() -> None:
    found = parse_study(study(lines={"head_only": False, "local_only": False, "centralised": ["ffa", "lora"]}))
    assert found.labels == ["lora", "ffa", "centralised_ffa", "centralised_lora"]


def test_lines_can_be_left_out_or_changed() -> None:
    lines = {"head_only": False, "local_only": False, "centralised": {"methods": ["ffa"], "set": {"rounds": 2}}}
    found = parse_study(study(lines=lines))
    assert found.labels == ["lora", "ffa", "centralised_ffa"]
    assert config.parse(found.document("centralised_ffa", {}, 0)).rounds == 2


def test_no_methods_are_no_line() -> None:
    found = parse_study(study(lines={"head_only": False, "local_only": [], "centralised": []}))
    assert found.labels == ["lora", "ffa"]


def test_lines_are_tuned_by_keys_of_the_task_and_the_model() -> None:
    vary = {"task.max_length": [32, 64], "model.train_head": [True, False], "server.lr": [0.1, 1.0], "down": [0.5, 1.0]}
    assert parse_study(study(tune={"vary": vary})).varied("centralised_lora").keys() == {
        "task.max_length",
        "model.train_head",
    }


def test_lines_are_tuned_by_shared_keys_in_either_spelling() -> None:
    found = parse_study(study(tune={"vary": {"method.local.optimizer.lr": [0.1, 0.5], "method.server.lr": [0.1, 1.0]}}))
    assert found.varied("centralised_lora") == {"method.local.optimizer.lr": [0.1, 0.5]}


@pytest.mark.parametrize(("beside", "extends"), [(True, False), (False, False), (True, True)])
def test_relative_paths_start_beside_the_file_or_else_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool, extends: bool
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here, there / "own"):
        folder.mkdir()
    place = there if beside else here
    (place / "train.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    values = study(vary={})
    values["base"]["data"] = {"kind": "files", "train": "train.jsonl", "test": "train.jsonl"}
    plain = config.digest(config.parse(parse_study(values).document("lora", {}, 0)))
    (there / "study.toml").write_text(tomli_w.dumps(values))
    (there / "own" / "study.toml").write_text('extends = "../study.toml"')
    found = load_study(there / "own" / "study.toml" if extends else there / "study.toml")
    experiment = config.parse(found.document("lora", {}, 0))
    assert Path(located(experiment.data.train, experiment.root)).resolve() == place / "train.jsonl"  # type: ignore
    assert extends or (experiment.root, config.digest(experiment)) == (str(place), plain)


def test_tables_of_another_kind_replace_and_others_merge() -> None:
    base = {"a": {"kind": "x", "p": 1}, "b": {"q": {"r": 1}}, "c": 1}
    assert merged(base, {"a": {"kind": "y"}}) == {**base, "a": {"kind": "y"}}
    assert merged(base, {"a": {"kind": "x", "s": 2}})["a"] == {"kind": "x", "p": 1, "s": 2}
    assert merged(base, {"a": {"p": 3}, "b": {"q": {"t": 2}}}) == {
        "a": {"kind": "x", "p": 3},
        "b": {"q": {"r": 1, "t": 2}},
        "c": 1,
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"sedes": [0]}, "unknown key 'sedes', did you mean 'seeds'"),
        ({"seeds": [1, 1]}, "has a seed twice"),
        ({"seeds": [0, -1]}, "seeds.1 = -1"),
        ({"methods": {}}, "methods = {}"),
        ({"methods": {"a/b": {"kind": "lora"}}}, "has to be usable as a folder name"),
        ({"report": {"reference": "nothing"}}, "report.reference = 'nothing' is not a method"),
        ({"tune": {"methods": {"nothing": {"vary": {}}}}}, "tune.methods.nothing: there is no such method"),
        ({"lines": {"centralised": {"methods": ["nothing"]}}}, "no method 'nothing' to be centralised"),
        ({"vary": {"a": []}}, "vary.a = "),
        ({"base": {"seed": 5}}, "base has the key 'seed', which a study sets for each run"),
        ({"vary": {"rank": [1, 2], "method.rank": [3, 4]}}, "'method.rank' replaces 'rank'"),
        ({"vary": {"seed": [1, 2]}}, "vary has the key 'seed', which a study sets for each run"),
        ({"tune": {"vary": {"label": ["a"]}}}, "tune.vary has the key 'label'"),
        ({"tune": {"methods": {"ffa": {"vary": {"seed": [1]}}}}}, "tune.methods.ffa.vary has the key 'seed'"),
        ({"lines": {"local_only": {"set": {"seed": 3}}}}, "lines.local_only.set has the key 'seed'"),
        ({"vary": {"method.rank": [2]}, "tune": {"vary": {"rank": [4]}}}, "'rank' in tune.vary replaces 'method.rank'"),
        ({"tune": {"vary": {"local": [{}]}}}, "'local' in tune.vary replaces 'local.max_steps'"),
        ({"methods": {"lora": {}, "centralised_lora": {}}}, "methods.centralised_lora has the label of a baseline"),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(study(**more))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"tune": {"vary": {"reference": ["zero"]}}},
            "method 'lora' at alpha=0.5,max_steps=2: unknown key 'method.reference'",
        ),
        ({"methods": {"lora": {"kind": "lora"}, "full": {"kind": "full", "rank": 4}}}, "method 'full' at alpha=0.5"),
        ({"gates": {"rules": ["lora >= nothing"]}}, "there is no method 'nothing'"),
        ({"report": {"link": "fast"}}, "is not understood"),
        ({"report": {"target": "much"}}, "report.target: there is no method 'much'"),
    ],
)
def test_what_a_method_does_not_accept_is_found_before_anything_runs(
    tmp_path: Path, more: dict[str, Any], expected: str
) -> None:
    values = study(lines={"head_only": False, "centralised": False, "local_only": False})
    values["base"]["clients"]["partition"] = {"kind": "dirichlet"}
    values["base"]["method"]["local"]["optimizer"] = {"kind": "sgd", "lr": 0.5}
    with pytest.raises(ConfigError) as caught:
        Runner(parse_study({**values, **more}), tmp_path / "study")
    assert expected in str(caught.value)
    assert not (tmp_path / "study").exists()


def test_the_file_that_the_documentation_shows_is_a_study(tmp_path: Path) -> None:
    text = (EXAMPLE.parents[1] / "docs" / "studies.md").read_text(encoding="utf-8")
    found = parse_study(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    assert found.labels[-3:] == ["head_only", "centralised_lora", "centralised_full"]
    left = Runner(found, tmp_path / "study").left()
    assert left["final"] == {"runs": 54, "rounds": 3 * 3 * (4 * 40 + 2 * 10)}


def test_the_example_is_a_study(tmp_path: Path) -> None:
    found = parse_study(tomllib.loads(EXAMPLE.read_text(encoding="utf-8")))
    left = Runner(found, tmp_path / "study").left()
    assert left["final"]["runs"] == len(found.labels) * len(found.seeds) * len(found.settings())
    assert left["tune"]["runs"] == len(found.labels) * len(found.settings())

"""Configurations in YAML, and files that extend others."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from fixtures.tiny import make_rows, save_model, write_rows
from typer.testing import CliRunner

from fedlora import config
from fedlora.cli.main import app
from fedlora.config.files import read
from fedlora.config.places import located
from fedlora.config.template import template
from fedlora.config.yaml_files import yaml_values
from fedlora.core.errors import ConfigError
from fedlora.federation.protocol.policies import SiteConfig
from fedlora.methods import METHODS
from fedlora.study.plan import load_study

BASE = """
seed = 4
data = { kind = "files", train = "rows.jsonl", test_fraction = 0.1 }
[clients]
num = 20
[method]
kind = "flasc"
rounds = 6
local = { batch_size = 4 }
"""


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def as_yaml(value: Any, indent: str = "") -> str:
    """TOML values in block style."""
    lines = []
    for key, one in value.items():
        if isinstance(one, dict) and one:
            lines.append(f"{indent}{key}:\n{as_yaml(one, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(one)}\n")
    return "".join(lines)


# ---- YAML


@pytest.mark.parametrize("ending", ["yaml", "yml", "YAML"])
def test_yaml_says_what_toml_says(ending: str, tmp_path: Path) -> None:
    for method in METHODS:
        values = tomllib.loads(template(method))
        file = written(tmp_path / f"run.{ending}", as_yaml(values))
        assert read(file).values == values
        assert config.digest(config.load(file)) == config.digest(config.parse(values))


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = (
        "a: no\nb: on\nc: 1e-3\nd: 012\ne: 12:30:00\nf: 2026-01-02\ng: true\nh: 0x1f\ni: 0o17\nj: -.inf\nk: .5\nl: 3.\n"
    )
    expected = {
        **{"a": "no", "b": "on", "c": 0.001, "d": 12, "e": "12:30:00", "f": "2026-01-02", "g": True, "h": 31},
        **{"i": 15, "j": -math.inf, "k": 0.5, "l": 3.0},
    }
    assert yaml_values(text) == expected
    assert {name: type(value) for name, value in yaml_values(text).items()} == {n: type(v) for n, v in expected.items()}
    assert math.isnan(yaml_values("a: .nan")["a"])
    assert yaml_values('a: "1"\nb: [1, {c: x}]\n') == {"a": "1", "b": [1, {"c": "x"}]}
    assert yaml_values("") == yaml_values("# nothing\n") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", r"the key 'c' is there twice: leave one of them out \(line 2, column 11\)"),
        ("a: &x {b: 1}\nc: *x\n", r"the alias \*x is not read: .*, or use extends \(line 2"),
        ("a: &x [*x]\n", "the alias"),
        ("1: a\n", "the key '1' is not text: put it in quotes"),
        ("a:\n", "the key 'a' has no value: give it one, or leave it out"),
        ("- a\n", "it holds a list, but keys with values were expected"),
        ("a: [1\n", r"expected ',' or ']'.* \(line 2"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("a: \x01\n", "special characters are not allowed"),
        ("a: " + "[" * 1500 + "\n", "lie too deep"),
    ],
)
def test_yaml_that_is_no_configuration_is_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError, match=rf"^{file} is not YAML that can be read: (?s:.*){message}") as caught:
        config.load(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match="is not YAML: it is no UTF-8 text"):
        config.load(tmp_path / "run.yaml")


def test_overrides_and_runs_read_yaml(tmp_path: Path) -> None:
    file = written(tmp_path / "run.yaml", "method: {kind: flasc, rank: 4}\n")
    experiment = config.load(file, ["local.optimizer.lr=1e-2", "method.rounds=3"])
    assert experiment.rounds == 3
    done = CliRunner().invoke(app, ["run", str(file), "-s", "ranks=3"])
    assert "method.ranks" in str(done.exception)


# ---- files that extend others


def test_a_file_extends_another_table_by_table(tmp_path: Path) -> None:
    base = written(tmp_path / "base.toml", BASE)
    text = "extends: base.toml\nclients: {per_round: 5}\nmethod: {rounds: 9, local: {epochs: 2}}\n"
    file = written(tmp_path / "run.yaml", text)
    whole = tomllib.loads(BASE)
    whole["clients"]["per_round"] = 5
    whole["method"] |= {"rounds": 9, "local": {"batch_size": 4, "epochs": 2}}
    assert read(file).values == whole
    assert config.digest(config.load(file)) == config.digest(config.parse(whole))
    assert read(file).origins["method.rounds"] == read(file).origins["clients.per_round"] == file
    assert read(file).origins["method.kind"] == base
    assert read(base).origins == {}


def test_a_table_of_another_kind_replaces_and_later_files_have_precedence(tmp_path: Path) -> None:
    written(tmp_path / "a.toml", 'seed = 1\n[method]\nkind = "flasc"\nrank = 4\n')
    written(tmp_path / "b.toml", 'seed = 2\nmode = "local"\n')
    file = written(
        tmp_path / "run.toml", 'extends = ["a.toml", "b.toml"]\nmode = "federated"\n[method]\nkind = "full"\n'
    )
    assert read(file).values == {"seed": 2, "mode": "federated", "method": {"kind": "full"}}
    # a file that two others extend is no circle
    written(tmp_path / "c.toml", 'extends = "a.toml"\nseed = 3\n')
    file = written(tmp_path / "again.toml", 'extends = ["a.toml", "c.toml"]\n')
    assert read(file).values["seed"] == 3
    assert set(read(file).origins.values()) == {tmp_path / "a.toml", tmp_path / "c.toml"}


def test_paths_of_a_base_lead_to_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(written(tmp_path / "shared" / "rows.jsonl", ""), make_rows(12, 0))
    (tmp_path / "shared" / "model").mkdir()
    written(tmp_path / "shared" / "base.toml", BASE + '[model]\npath = "model"\n')
    further = 'extends = "../base.toml"\ninit_from = "owner/name"\n[method]\ndown = 1.0\n'
    written(tmp_path / "shared" / "more" / "further.toml", further)
    file = written(tmp_path / "mine" / "run.toml", 'extends = "../shared/more/further.toml"\n')
    monkeypatch.chdir("/")
    experiment: Any = config.load(file)
    assert experiment.data.train == "../shared/rows.jsonl"
    assert experiment.model.path == "../shared/model"
    assert experiment.init_from == "owner/name"
    assert Path(located(experiment.data.train, experiment.root)).resolve() == tmp_path / "shared" / "rows.jsonl"
    # beside the base they stay as they are, and so does the digest
    plain: Any = config.load(written(tmp_path / "shared" / "run.toml", 'extends = "base.toml"\n'))
    assert config.digest(plain) == config.digest(config.load(tmp_path / "shared" / "base.toml"))
    assert plain.data.train == "rows.jsonl"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.toml": 'extends = "none.toml"'}, "run.toml extends 'none.toml', but there is no file .*none.toml"),
        ({"run.toml": 'extends = "run.toml"'}, "run.toml extends .*run.toml, which is a circle: remove"),
        (
            {"run.toml": 'extends = "a.toml"', "a.toml": 'extends = "./run.toml"'},
            "run.toml extends .*a.toml extends .*run.toml, which is a circle",
        ),
        ({"run.toml": "extends = 3"}, "run.toml: extends = 3, but the name of a file was expected"),
        ({"run.toml": 'extends = ["a.toml", 3]'}, "but the name of a file was expected, or a list"),
        ({"run.toml": 'extends = "a.yaml"', "a.yaml": "a: [1"}, "a.yaml is not YAML that can be read"),
    ],
)
def test_files_that_cannot_be_extended_are_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        written(tmp_path / name, text)
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("base", "own", "message", "place"),
    [
        ("[method]\nkind = 'flasc'\nranks = 3", "seed = 1", "unknown key 'method.ranks'", "base.toml"),
        ("[method]\nkind = 'flasc'", "[clients]\nnumber = 3", "unknown key 'clients.number'", "run.toml"),
        ("[clients]\nnum = 0", "seed = 1", "clients.num = 0: input should be greater", "base.toml"),
        ("[[phases]]\nrounds = 0", "seed = 1", "phases.0.rounds = 0: input should be", "base.toml"),
        ("sed = 1", "[evaluate]\nevery = 2", "unknown key 'sed'", "base.toml"),
    ],
)
def test_an_error_names_the_file_of_the_key(base: str, own: str, message: str, place: str, tmp_path: Path) -> None:
    written(tmp_path / "base.toml", base)
    file = written(tmp_path / "run.toml", f"extends = 'base.toml'\n{own}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(file)
    assert str(caught.value).endswith(f" is in {tmp_path / place})")


@pytest.mark.parametrize("override", ["rounds=0", "method.rounds=0", "method={kind='lora', rounds=0}"])
def test_a_mistake_of_an_override_is_in_no_file(override: str, tmp_path: Path) -> None:
    written(tmp_path / "base.toml", "[clients]\nnum = 20")
    file = written(tmp_path / "run.toml", "extends = 'base.toml'\n[method]\nkind = 'lora'\nrounds = 3\n")
    with pytest.raises(ConfigError, match=r"method\.rounds = 0: input should be greater than or equal to 1$"):
        config.load(file, [override])
    written(tmp_path / "base.toml", "[clients]\nnum = 0")
    with pytest.raises(ConfigError, match=r"clients\.num = 0: .* \(clients\.num is in .*base\.toml\)"):
        config.load(file, ["rounds=2"])


def test_show_says_where_values_are_from(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", make_rows(40, 0))
    written(tmp_path / "base.toml", BASE)
    file = written(tmp_path / "run.yaml", "extends: base.toml\nmethod: {rounds: 9}\nmodel: {path: bert}\n")
    save_model(tmp_path / "bert")
    done = CliRunner().invoke(app, ["show", str(file)], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"# {file}: method.rounds, model.path\n" in done.output
    assert f"# {tmp_path / 'base.toml'}: seed, data.kind" in done.output


def test_studies_and_sites_extend_files_too(tmp_path: Path) -> None:
    written(tmp_path / "base.yaml", "seeds: [0, 1]\nbase: {method: {rounds: 4}}\nmethods: {a: {kind: flasc}}\n")
    study = load_study(written(tmp_path / "study.toml", 'extends = "base.yaml"\nname = "mine"\nseeds = [7]\n'))
    assert (study.name, study.seeds, study.labels[0]) == ("mine", (7,), "a")
    with pytest.raises(ConfigError, match=r"seed = .*|unknown key 'sed'"):
        load_study(written(tmp_path / "wrong.toml", 'extends = "base.yaml"\nname = "mine"\nsed = [7]\n'))
    write_rows(written(tmp_path / "all" / "rows.jsonl", ""), make_rows(3, 0))
    written(tmp_path / "all" / "sites.toml", 'rows = "rows.jsonl"\ntier = "small"\n')
    site = SiteConfig.load(written(tmp_path / "one" / "site.yaml", "extends: ../all/sites.toml\nname: one\n"))
    assert site.rows
    assert Path(site.rows).resolve() == tmp_path / "all" / "rows.jsonl"
    assert (site.tier, site.state) == ("small", str(tmp_path / "one" / "state"))
    written(tmp_path / "all" / "sites.toml", 'rows = "rows.jsonl"\ntier = 3\n')
    with pytest.raises(ConfigError, match=r"\(tier is in .*sites\.toml\)"):
        SiteConfig.load(tmp_path / "one" / "site.yaml")

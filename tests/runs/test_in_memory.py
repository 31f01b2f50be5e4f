"""Rows and models that are handed over from Python: the same runs as from files, and what folders say without them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from fixtures.tiny import COLOURS, contents, document, ledger, make_rows, save_model, tiny_world
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification
from typer.testing import CliRunner

import fedlora
from fedlora import config
from fedlora.cli.main import app
from fedlora.config import Experiment
from fedlora.config.federated_data import prepare
from fedlora.config.files import read
from fedlora.core.errors import CheckpointError, ConfigError, DataError
from fedlora.population.partitions import Natural
from fedlora.study.tuning import tune
from fedlora.tasks.data.rows import CLIENT
from fedlora.tasks.models.loading import quiet_transformers
from fedlora.testing import tiny_model

world = pytest.fixture(scope="module")(tiny_world)
README = Path(__file__).parents[2] / "README.md"
TRAIN, TEST = make_rows(72, 0), [{**row, "user": "other"} for row in make_rows(24, 1)]


def categories(rows: list[dict[str, str]]) -> pandas.DataFrame:
    frame = pandas.DataFrame(rows, index=range(100, 100 + len(rows)))
    return frame.astype({"label": "category", "user": "category"})


FORMS: dict[str, Callable[[list[dict[str, str]]], Any]] = {
    "list": list,
    "Dataset": datasets.Dataset.from_list,
    "DataFrame": pandas.DataFrame,
    "categories": categories,
}


def loaded(world: Path, auto: Any = AutoModelForSequenceClassification) -> tuple[Any, Any]:
    """The tiny model and its tokenizer."""
    with quiet_transformers():
        return auto.from_pretrained(str(world / "bert")), AutoTokenizer.from_pretrained(str(world / "bert"))


def over(world: Path, data: Any, model: Any = None, method: str = "flasc", *overrides: str) -> Experiment:
    """Two rounds over the tiny world's rows, or over what is handed over in their place."""
    values = document(world, method, *overrides, rounds=2)
    if model is not None:
        values["model"] = model
    if data is not None:
        values["data"] = data
    return config.parse(values)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run from files."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    fedlora.run(over(world, None), folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_every_form_train_as_a_file_does(form: str, world: Path, reference: Path, tmp_path: Path) -> None:
    make = FORMS[form]
    experiment = over(world, fedlora.Rows(train=make(TRAIN), test=make(TEST)))
    result = fedlora.run(experiment, tmp_path / "run")
    assert ledger(result.folder) == ledger(reference)
    weights = "adapter/adapter_model.safetensors"
    assert (result.folder / weights).read_bytes() == (reference / weights).read_bytes()
    manifest = json.loads((result.folder / "manifest.json").read_text())
    told = json.loads((reference / "manifest.json").read_text())
    assert manifest["label_names"] == told["label_names"] == sorted(COLOURS)
    if form != "categories":  # whose users are declared text, and whose classes are declared
        assert manifest["data_fingerprint"] == told["data_fingerprint"]
    assert manifest["handed_over"]["data.train"]["fingerprint"] == experiment.data.train.fingerprint
    assert "handed_over" not in told
    kept = read(result.folder / "config.toml").values["data"]
    assert kept["kind"] == "rows"
    assert kept["train"] == experiment.data.train.fingerprint


def test_a_loaded_model_trains_as_its_folder_does_and_stays_as_it_is(
    world: Path, reference: Path, tmp_path: Path
) -> None:
    model, tokenizer = loaded(world)
    tokenizer("w1 w2", truncation=True, max_length=3, padding="max_length")
    before, called = copy.deepcopy(model.state_dict()), tokenizer.backend_tokenizer.to_str()
    experiment = over(world, None, fedlora.Model(object=model.train(), tokenizer=tokenizer))
    for name in ("one", "two"):
        result = fedlora.run(experiment, tmp_path / name)
        assert ledger(result.folder) == ledger(reference)
        weights = "adapter/adapter_model.safetensors"
        assert (result.folder / weights).read_bytes() == (reference / weights).read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert tokenizer.backend_tokenizer.to_str() == called
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_configuration_of_objects_is_written_and_read_by_their_fingerprints(world: Path) -> None:
    model, tokenizer = loaded(world)
    experiment = over(world, TRAIN, (model, tokenizer))
    again = over(world, copy.deepcopy(TRAIN), loaded(world))
    assert experiment == again
    assert config.digest(experiment) == config.digest(again)
    read = config.parse(config.resolved(experiment))
    assert read == experiment
    assert read.model.object.value is None
    assert config.resolved(read) == config.resolved(experiment)
    others = [
        over(world, TRAIN[1:], (model, tokenizer)),
        over(world, TRAIN, (tiny_model(seed=1), tokenizer)),
        over(world, TRAIN, (loaded(world, AutoModel)[0], tokenizer)),
    ]
    tokenizer.add_tokens(["w99"])
    others.append(over(world, TRAIN, (model, tokenizer)))
    assert len({config.digest(one) for one in [experiment, *others]}) == 5


def test_what_is_handed_over_as_it_is_becomes_rows_and_a_model(world: Path) -> None:
    split = datasets.DatasetDict(train=datasets.Dataset.from_list(TRAIN), test=datasets.Dataset.from_list(TEST))
    model, tokenizer = loaded(world)
    by_hand = fedlora.Experiment(
        data=fedlora.Rows(train=TRAIN, test=TEST), model=fedlora.Model(object=model, tokenizer=tokenizer)
    )
    # the tokenizer is found where the model says that it was loaded from
    assert fedlora.Experiment(data=split, model=model) == by_hand
    assert fedlora.Rows(train=split) == by_hand.data
    assert fedlora.Experiment(data=pandas.DataFrame(TRAIN)) == fedlora.Experiment(data=tuple(TRAIN))
    assert hash(by_hand.model) == hash(fedlora.Model(object=model, tokenizer=tokenizer))


def mapping(rows: list[dict[str, str]], make: Callable[[Any], Any]) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["user"], []).append({"text": row["text"], "label": row["label"]})
    return {name: make(own) for name, own in found.items()}


@pytest.mark.parametrize("form", ["list", "Dataset", "DataFrame"])
def test_rows_by_client_make_natural_clients_of_these_names(form: str, world: Path, tmp_path: Path) -> None:
    rows = fedlora.Rows(train=mapping(TRAIN, FORMS[form]), test=mapping(TEST, FORMS[form]))
    values = document(world, "flasc", rounds=2)
    del values["clients"]["partition"]
    experiment = config.parse({**values, "data": rows})
    assert experiment.clients.partition == Natural(column=CLIENT)
    assert config.parse(config.resolved(experiment)) == experiment
    result = fedlora.run(experiment, tmp_path / "run")
    column = "clients.partition={kind='natural', column='user'}"
    told = fedlora.run(over(world, None, None, "flasc", column), tmp_path / "told")
    # the same clients hold the same rows, in another order of the data set
    summary = [json.loads((one.folder / "manifest.json").read_text())["partition"] for one in (result, told)]
    assert summary[0] == summary[1]
    assert [row.cohort for row in result.rows] == [row.cohort for row in told.rows]
    assert result.after == pytest.approx(told.after, abs=1e-3)
    # another partition is taken where it is set
    assert over(world, rows).clients.partition.kind == "iid"


@pytest.mark.parametrize(("other", "common"), [("int32", "int64"), ("uint8", "int64"), ("float32", "float64")])
def test_numbers_of_clients_get_one_type(other: str, common: str, capfd: pytest.CaptureFixture[str]) -> None:
    frame = pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]})
    held = fedlora.Rows(train={"x": frame, "y": frame.astype({"label": other})}).train.value
    assert (held.features["label"].dtype, held["label"]) == (common, [0, 1, 0, 1])
    assert capfd.readouterr().err == ""


def test_rows_by_client_without_test_rows_are_held_out_by_content(world: Path, tmp_path: Path) -> None:
    values = document(world, "flasc", rounds=2)
    del values["clients"]["partition"]
    experiment = config.parse({**values, "data": mapping(TRAIN, list)})
    federated = prepare(experiment)
    assert federated.population.names == tuple(f"u{number}" for number in range(9))
    assert 0 < len(federated.test_rows) < len(TRAIN) / 2
    assert len(federated.test_rows) + len(federated.population.rows) == len(TRAIN)


def test_a_run_goes_on_with_the_same_objects_alone(world: Path, tmp_path: Path) -> None:
    def handed(rows: list[dict[str, str]] = TRAIN) -> Experiment:
        return over(world, fedlora.Rows(train=rows, test=TEST), loaded(world), "flasc", "evaluate.every=1")

    whole = fedlora.run(handed(), tmp_path / "whole")
    folder = tmp_path / "run"
    fedlora.run(handed(), folder, until=1)
    missing = "data.test were passed from Python, and the configuration keeps only a fingerprint: pass the same"
    with pytest.raises(ConfigError, match=f"model.object and model.tokenizer and data.train and {missing}"):
        fedlora.run(fedlora.load(folder), folder)
    with pytest.raises(CheckpointError, match=r"another configuration .data.train: 'rows:"):
        fedlora.run(handed(TRAIN[3:]), folder)
    changed = dataclasses.replace(handed(), model=fedlora.Model(object=tiny_model(seed=1), tokenizer=loaded(world)[1]))
    with pytest.raises(CheckpointError, match=r"another configuration .model.object: 'BertFor"):
        fedlora.run(changed, folder)
    own = handed()
    result = fedlora.run(dataclasses.replace(fedlora.load(folder), data=own.data, model=own.model), folder)
    assert ledger(folder) == ledger(whole.folder)
    assert contents(result.folder / "adapter") == contents(whole.folder / "adapter")


def test_a_finished_run_needs_its_model_again(world: Path, tmp_path: Path) -> None:
    tokenizer = loaded(world)[1]
    # of no folder
    pair = tiny_model(), tokenizer
    folder = fedlora.run(over(world, None, pair), tmp_path / "run").folder
    with pytest.raises(ConfigError, match=r"was passed from Python: pass the same again, by fedlora\."):
        fedlora.load_run(folder)
    with pytest.raises(ConfigError, match=r"the weights passed .BertFor\w+:\w+. are not those"):
        fedlora.load_run(folder, model=(tiny_model(seed=1), tokenizer))
    for words in (["run", str(folder)], ["predict", str(folder), "red"]):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, ConfigError)
        assert "passed from Python" in str(done.exception)
    trained = fedlora.load_run(folder, model=fedlora.Model(object=pair[0], tokenizer=tokenizer))
    (answer,) = trained.predict(["red w1 red"])
    assert (
        {one["label"] for one in answer["answer"]} == set(COLOURS)
        if "answer" in answer
        else set(COLOURS) <= set(answer)
    )
    after = json.loads((folder / "result.json").read_text())["after"]
    metrics = trained.evaluate(world / "test.jsonl").metrics
    assert metrics == pytest.approx({name: after[name] for name in metrics})
    trained.export(tmp_path / "merged", merge=True)
    assert BertForSequenceClassification.from_pretrained(tmp_path / "merged").config.id2label == dict(
        enumerate(sorted(COLOURS))
    )
    assert pair[0].config.id2label[0] == "LABEL_0"
    card = (folder / "adapter" / "README.md").read_text()
    assert "The base model was passed from Python: class and fingerprint `BertForSequenceClassification:" in card
    with pytest.raises(ConfigError, match="leave `model` out"):
        fedlora.load_run(fedlora.run(over(world, None), tmp_path / "plain").folder, model=pair)


def test_a_finished_run_finds_its_model_where_it_was_loaded_from(world: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(str(base))
    folder = fedlora.run(over(world, None, model), tmp_path / "run").folder
    card = (folder / "adapter" / "README.md").read_text()
    assert 'from_pretrained("bert"' in card
    assert str(base) not in card
    expected = fedlora.load_run(folder, model=model).predict(["red w1"])
    assert fedlora.load_run(folder).predict(["red w1"]) == expected
    tiny_model(seed=3).save_pretrained(str(base))
    with pytest.raises(ConfigError, match="is not a local folder with the same content: pass"):
        fedlora.load_run(folder)


def test_a_model_that_changed_since_is_not_trained(world: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(world)
    experiment = over(world, None, (model, tokenizer))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ConfigError, match="have changed since it was passed"):
        fedlora.run(experiment, tmp_path / "run")


def test_objects_do_not_reach_other_processes(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.train is in the memory of this process, which trials in processes"):
        tune(over(world, TRAIN), {"rank": [2, 4]}, tmp_path / "tune")
    with pytest.raises(ConfigError, match="others cannot load it"):
        over(world, None, loaded(world)).model.resolve()


class Own(BertForSequenceClassification):
    """A class that copies could not be made of."""


def test_models_that_cannot_be_copied_are_refused(world: Path) -> None:
    tokenizer = loaded(world)[1]
    tiny = tiny_model()
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["query"]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"object": torch.nn.Linear(2, 2), "tokenizer": tokenizer}, "is of type Linear, but a model of transformers"),
        ({"object": wrapped, "tokenizer": tokenizer}, r"call merge_and_unload\(\)"),
        ({"object": Own(tiny.config), "tokenizer": tokenizer}, r"is of type \S+Own, .* give model.path and"),
        ({"object": tiny}, "came without its tokenizer, and it does not record where it was loaded from; give"),
        (
            {"object": tiny, "tokenizer": 3},
            "model.tokenizer is of type int, but a tokenizer",
        ),
        ({"tokenizer": tokenizer}, "model.tokenizer goes with model.object, but there is none"),
        (
            {"object": tiny, "tokenizer": tokenizer, "path": "bert"},
            "model.path = 'bert' controls how a model is loaded",
        ),
        (
            {"object": tiny, "tokenizer": tokenizer, "load": "4bit"},
            "model.load = '4bit' controls how a model is loaded",
        ),
        ({"object": copy.deepcopy(tiny).to("meta"), "tokenizer": tokenizer}, "not in memory"),
    ]
    for arguments, said in cases:
        with pytest.raises(ConfigError, match=said):
            fedlora.Model(**arguments)


def test_rows_that_make_no_table_are_refused() -> None:
    row = {"text": "w1", "label": "red"}
    cases: list[tuple[Any, str]] = [
        ("train.csv", r"the training rows are 'train.csv', but .* fedlora.Files"),
        (3, "the training rows are of type int, but a datasets.Dataset, a pandas.DataFrame, a list of dicts"),
        ([], "the training rows are an empty list"),
        (None, "the training rows are of type NoneType, but a datasets.Dataset, a pandas.DataFrame"),
        (pandas.DataFrame([["w1", "red", "red"]], columns=["text", "label", "label"]), "have the column 'label' twice"),
        ([row, "w1"], "entry 1 of the training rows is of type str, but a list of dicts was expected"),
        ([row, {"text": 3}], "the training rows do not make a table"),
        ({"a": [row], "b": []}, "client 'b' has no training rows"),
        ({"train": [row], "test": [row]}, r"look like splits: use fedlora.Rows\(train=..., test=...\)"),
        ({1: [row], "1": [row]}, "2 clients to training rows .* names that differ as text"),
        (
            {"text": ["w1"], "label": ["red"]},
            r"entry 0 of the training rows of client 'text' is of type str, .*Dataset.from_dict",
        ),
        ({"a": [row], "b": pandas.DataFrame([{"text": 1}])}, "the clients' training rows do not make one table"),
        ([{**row, CLIENT: "a"}], "a reserved name of fedlora"),
        (datasets.DatasetDict(a=datasets.Dataset.from_list([row])), "has the splits a, but none called 'train'"),
    ]
    for given, said in cases:
        with pytest.raises(DataError, match=said):
            fedlora.Rows(train=given)
    with pytest.raises(DataError, match="the training rows are of type ndarray"):
        fedlora.Experiment(data=torch.zeros(2).numpy())
    with pytest.raises(ConfigError, match="data needs a kind, one of: docstrings, docstring_questions, files"):
        config.parse({"data": {"train": "rows.csv"}})


def test_a_categorical_label_keeps_its_order_and_a_gap_is_found() -> None:
    frame = pandas.DataFrame({"body": ["a", "b", "c"], "stars": [5, 1, 5], "site": ["x", "y", "x"]})
    kind = pandas.CategoricalDtype([5, 3, 1])
    rows = fedlora.Rows(
        train=frame.astype({"stars": kind, "site": "category"}), columns={"text": "body", "label": "stars"}
    )
    train = rows.load().train
    assert train.features["label"].names == ["5", "3", "1"]
    assert train["label"][:] == [0, 2, 0]
    assert train["site"][:] == ["x", "y", "x"]
    gap = fedlora.Rows(train=frame.assign(label=pandas.Categorical(["a", None, "b"]), text=frame["body"]))
    with pytest.raises(DataError, match=r"column 'label' has no value in 1 of 3 training rows .first: row 1"):
        fedlora.TextClassification().read(gap)


def test_rows_that_lack_a_key_have_a_gap() -> None:
    rows = fedlora.Rows(train=[{"text": "w1"}, {"text": "w2", "label": "red"}]).load().train
    assert rows["label"][:] == [None, "red"]


def test_the_readmes_ten_lines_lead_from_import_to_adapter(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [one for one in blocks if "tokenizer" in one]
    code = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 10
    rows = [{"text": row["text"], "label": row["label"], "author": row["user"]} for row in make_rows(200, 0)]
    pandas.DataFrame(rows).to_csv(tmp_path / "reviews.csv", index=False)
    monkeypatch.chdir(tmp_path)
    for old, new in (
        ('"sentence-transformers/all-MiniLM-L6-v2"', repr(str(world / "bert"))),
        ("rounds=10", "rounds=2"),
    ):
        assert old in block
        block = block.replace(old, new)
    space: dict[str, Any] = {}
    exec(block, space)
    assert (tmp_path / space["result"].adapter / "adapter_model.safetensors").exists()
    assert space["result"].rounds == 2


def test_rows_are_not_written_into_the_folder(world: Path, tmp_path: Path) -> None:
    folder = fedlora.run(over(world, TRAIN), tmp_path / "run").folder
    assert not [name for name, content in contents(folder).items() if TRAIN[0]["text"].encode() in content]

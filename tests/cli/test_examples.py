"""Every example is short, can be loaded, and runs for two rounds on rows made here."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from fixtures.tiny import COLOURS, ledger, make_rows, save_model, write_rows
from fixtures.tiny_language import save_chat_model
from typer.testing import CliRunner

from fedlora import config
from fedlora.cli.main import app
from fedlora.population.partitions import Natural
from fedlora.testing import tiny_model

FOLDER = Path(__file__).parents[2] / "examples"
# a study is no configuration; tests/study looks at it
FILES = sorted(path.name for path in FOLDER.glob("*.toml") if path.name != "study.toml")


class Example(NamedTuple):
    """What an example needs to be tried.

    Args:
        model: makes a tiny model in a folder.
        data: makes what the example reads in a folder, and says what is set beside that.
        predict: an input for the run's model.
    """

    model: Callable[[Path], Path]
    data: Callable[[Path], tuple[str, ...]]
    predict: str


def texts(file: str, **columns: str) -> Callable[[Path], tuple[str, ...]]:
    """A csv file of texts with colours as their classes; ``columns`` are its further ones, by the rows' own."""

    def make(folder: Path) -> tuple[str, ...]:
        rows = [{**row, **{new: row[old] for new, old in columns.items()}} for row in make_rows(400, 0)]
        datasets.Dataset.from_list(rows).to_csv(str(folder / file))
        return ()

    return make


def tagged(folder: Path) -> tuple[str, ...]:
    rows = []
    for row in make_rows(60, 0):
        words = row["text"].split()
        rows.append({"tokens": words, "tags": [f"B-{word}" if word in COLOURS else "O" for word in words]})
    write_rows(folder / "tagged.jsonl", rows)
    return ("clients.num=4", "clients.per_round=2")


def decoder(folder: Path) -> Path:
    save_model(folder, "llama")
    tiny_model("llama", head="CausalLM").save_pretrained(str(folder))
    return folder


def documents(folder: Path) -> tuple[str, ...]:
    rows = [{"text": row["text"], "file": row["user"]} for row in make_rows(400, 0)]
    write_rows(folder / "texts.jsonl", rows)
    return ("data={kind='files', train='texts.jsonl', test_fraction=0.01}", "task.max_new_tokens=4")


def sums(folder: Path) -> tuple[str, ...]:
    rows = [{"prompt": f"w{a} w{b}", "answer": f"#### {a + b}", "user": a} for a in range(10) for b in range(40)]
    write_rows(folder / "sums.jsonl", rows)
    return ("task.generate=2", "task.max_new_tokens=4")


def instructions(**columns: str) -> Callable[[Path], tuple[str, ...]]:
    """A file of prompts and answers under the names that the example gives them."""

    def make(folder: Path) -> tuple[str, ...]:
        names = {"prompt": "prompt", "answer": "answer", **columns}
        rows = [{names["prompt"]: f"w{a} w{b}", names["answer"]: f"w{a}"} for a in range(20) for b in range(20)]
        write_rows(folder / "rows.jsonl", rows)
        own = {use: name for use, name in columns.items() if use != name}
        files = "{kind='files', train='rows.jsonl', test_fraction=0.05, columns=" + _toml(own) + "}"
        few = ("clients.num=4", "method.local.max_steps=2", "method.local.batch_size=4")
        return (f"data={files}", "model.load=full", "task.max_length=24", "task.max_new_tokens=4", *few)

    return make


def _toml(values: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name}='{value}'" for name, value in values.items()) + "}"


def talker(family: str) -> Callable[[Path], Path]:
    """A tiny decoder with a chat template."""

    def make(folder: Path) -> Path:
        save_chat_model(folder)
        tiny_model(family, head="CausalLM").save_pretrained(str(folder))
        return folder

    return make


def questions(folder: Path) -> tuple[str, ...]:
    for side in ("train", "test"):
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(make_rows(40, len(side))):
            answers = {"text": [row["label"]], "answer_start": [row["text"].index(row["label"])]}
            title = f"{side} {number % 4}"
            rows.append({"title": title, "context": row["text"], "question": "w1 w2", "answers": answers})
        write_rows(folder / f"qa.{side}.jsonl", rows)
    return ()


def image_model(folder: Path) -> Path:
    tiny_model("mobilenet_v2").save_pretrained(str(folder))
    sizes = {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}
    own = {
        "image_processor_type": "MobileNetV2ImageProcessor",
        **sizes,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    return folder


def pictures(folder: Path) -> tuple[str, ...]:
    image = pytest.importorskip("PIL.Image")
    for colour in COLOURS:
        (folder / "pictures" / colour).mkdir(parents=True)
        for number in range(12):
            image.new("RGB", (20, 16 + number), colour).save(folder / "pictures" / colour / f"{number}.png")
    return ("task.size=16", "clients.num=4", "clients.per_round=2")


EXAMPLES: dict[str, Example] = {
    "causal_lm.toml": Example(decoder, documents, "w1 w2 red"),
    "flowertune.toml": Example(decoder, instructions(prompt="instruction", answer="output"), "w1 w2"),
    "image_classification.toml": Example(image_model, pictures, "pictures/red/3.png"),
    "instruction.toml": Example(decoder, sums, "w1 w2"),
    "natural_clients.toml": Example(save_model, texts("authors.csv", author="user"), "red w1"),
    "own_files.toml": Example(save_model, texts("data.csv"), "red w1"),
    "qwen.toml": Example(talker("qwen3"), instructions(), "w1 w2"),
    "question_answering.toml": Example(
        save_model, questions, json.dumps({"context": "w1 w2 red w3", "question": "w1 w2"})
    ),
    "tiers.toml": Example(save_model, texts("data.csv"), "red w1"),
    "token_classification.toml": Example(save_model, tagged, "w1 red w2"),
}


def test_every_example_is_tried() -> None:
    assert sorted(EXAMPLES) == FILES


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_short(name: str) -> None:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 30
    # a reader learns from the first lines what it is for, and how to start it
    assert lines[0].startswith("# ")
    assert any(line.startswith("#") and f"fedlora run examples/{name}" in line for line in lines)


@pytest.mark.parametrize("name", FILES)
def test_an_example_says_what_it_says_after_a_round_trip(name: str, tmp_path: Path) -> None:
    experiment = config.load(FOLDER / name)
    (tmp_path / "again.toml").write_text(config.to_toml(experiment), encoding="utf-8")
    assert config.load(tmp_path / "again.toml") == experiment


COMMAND = re.compile(r'^python -c "[^"]*"[^"\n]*$', re.MULTILINE)


def command_of(name: str) -> str | None:
    """The command in an example's first lines that makes a file to try it with."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line[4:] for line in lines if line.startswith("#   "))
    found = COMMAND.search(comment)
    return found and found.group()


@pytest.mark.parametrize("name", [name for name in FILES if "python -c" in (FOLDER / name).read_text()])
def test_an_examples_own_command_makes_what_it_reads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "image_classification.toml":
        pytest.importorskip("PIL")
    command = command_of(name)
    assert command is not None
    monkeypatch.chdir(tmp_path)
    # a library of eight modules, for the real one takes seconds to read
    for module in "abcdefgh":
        functions = [f'def f{n}():\n    """None or a list: {n} of {module}."""\n' for n in range(30)]
        (tmp_path / "library").mkdir(exist_ok=True)
        (tmp_path / "library" / f"{module}.py").write_text("".join(functions))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "library"))
    match shlex.split(command):
        case ["python", "-c", code]:
            exec(code, {})
        case ["python", "-c", code, ">", file]:
            with open(file, "w") as out, contextlib.redirect_stdout(out):
                exec(code, {})
        case words:
            raise AssertionError(words)
    experiment = config.load(FOLDER / name)
    rows = experiment.data.load()
    assert len(rows.train) >= 40
    assert rows.test is None or len(rows.test) >= 40
    if isinstance(experiment.clients.partition, Natural):
        assert experiment.clients.partition.column in rows.train.column_names


@pytest.mark.parametrize("name", FILES)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    example = EXAMPLES[name]
    model = example.model(tmp_path / "model")
    overrides = (f"model.path={model}", "method.rounds=2", "method.rank=4", *example.data(tmp_path))
    options = [word for one in overrides for word in ("-s", one)]

    def command(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--format", "json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    found = json.loads(command("run", str(FOLDER / name), "--out", "run", *options))
    assert [row["round"] for row in ledger(Path("run"))] == [0, 1, 2]
    assert found["main_metric"] in found["after"]
    assert found["after"]["loss"] != found["before"]["loss"]
    assert Path(found["adapter"]).is_dir()
    (said,) = json.loads(command("predict", "run", example.predict))
    assert said["input"] == example.predict
    assert said["answer"]

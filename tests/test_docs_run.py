"""Pages for newcomers and notebooks: what they tell a reader to do is done, with a tiny model and two rounds."""

from __future__ import annotations

import functools
import json
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pandas
import pytest
from fixtures.tiny import make_rows, save_model
from fixtures.tiny_language import save_chat_model
from test_docs_code import blocks, calls
from typer.testing import CliRunner

import fedlora
from fedlora.cli.main import app

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
PAGES = ["quickstart.md", *(f"howto/{name}.md" for name in ("own-csv", "own-model", "llm", "own-method", "privacy"))]
PAGES += ["howto/unequal-clients.md", "howto/plots.md"]
"""``howto/sites.md`` starts servers: ``tests/flower`` does what it says."""
CONFIGURED = ("show", "partition", "cost", "run")
"""Commands that take a configuration."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model(root / "bert")
    save_chat_model(root / "gpt2")
    return root


@pytest.fixture
def reader(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader with files of their own, where every experiment has the tiny model."""
    rows = pandas.DataFrame(make_rows(600, 0)).rename(columns={"text": "body", "label": "stars", "user": "author"})
    for name in ("reviews.csv", "more.csv"):
        rows.to_csv(tmp_path / name, index=False)
    tiny = functools.partial(fedlora.Experiment, model=fedlora.Model(path=str(models / "bert")))
    monkeypatch.setattr(fedlora, "Experiment", tiny)
    library = tmp_path / "library"
    library.mkdir()
    for package in ("asyncio", "distutils", "idlelib", "tkinter"):
        texts = [f'def f{row}():\n    """The {package} function {row}, described."""\n' for row in range(60)]
        (library / f"{package}.py").write_text("".join(texts))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run_python(text: str, models: Path, space: dict[str, Any]) -> None:
    """Runs a page's code, or stores it as the module that its first line names."""
    text = re.sub(r"rounds=\d+", "rounds=2", text).replace(
        "sentence-transformers/all-MiniLM-L6-v2", str(models / "bert")
    )
    text = text.replace("model=fedlora.Model(),", "")
    if named := re.match(r"# (\w+\.py)\n", text):
        Path(named[1]).write_text(text)
    else:
        exec(compile(text, "page", "exec"), space)


def run_call(words: list[str], models: Path) -> str:
    """Runs a call of ``fedlora`` in this process."""
    if words[0] in CONFIGURED:
        family = "gpt2" if words[1] == "llm.toml" else "bert"
        words = [*words, "-s", f"model.path={models / family}", "-s", "method.rounds=2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output)
    return done.output


@pytest.mark.parametrize("name", PAGES)
def test_a_reader_can_follow_a_page(name: str, reader: Path, models: Path) -> None:
    space: dict[str, Any] = {"fedlora": fedlora}
    if name == "howto/plots.md":  # its runs are those of the page before
        for label in ("lora", "flasc"):
            data, clients = fedlora.Rows(train=make_rows(60, 0)), fedlora.Clients(num=4, per_round=2)
            made = fedlora.Experiment(label=label, data=data, clients=clients, phases=fedlora.dense_lora(rounds=2))
            fedlora.run(made, f"runs/{label}")
    for language, text in blocks(DOCS / name):
        if language == "python":
            run_python(text, models, space)
        elif language == "toml" and (file := re.match(r"# (\w+\.toml)\n", text)):
            # the search for the multiplier of a target takes minutes; tests/privacy has it
            Path(file[1]).write_text(text.replace("target_epsilon = 8.0", "noise_multiplier = 1.0"))
        elif not language:
            for words in calls(text):
                if words[:1] != ["study"] and words[:2] != ["evaluate", "RUN"]:
                    run_call(words, models)


def test_the_example_of_a_part_passes_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = {page: [text for _, text in blocks(DOCS / page)] for page in ("howto/own-method.md", "parts.md")}
    (module,) = [text for text in texts["howto/own-method.md"] if text.startswith("# my_rules.py")]
    (check,) = [text for text in texts["parts.md"] if "check_aggregator" in text]
    (tmp_path / "my_rules.py").write_text(module)
    space: dict[str, Any] = {}
    exec(f"from my_rules import MajoritySign\n{check}\ntest_my_rule()", space)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, reader: Path, models: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    space: dict[str, Any] = {}
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 3
    for text in code:
        run_python(text, models, space)


def test_notebooks_have_no_outputs() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "compare"}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None

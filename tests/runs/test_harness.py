"""Evaluation by lm-evaluation-harness on a task of local files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from fixtures.tiny import save_model, write_rows
from fixtures.tiny_language import language_world
from typer.testing import CliRunner

import fedlora
from fedlora import config
from fedlora.cli.main import app
from fedlora.core.errors import ConfigError
from fedlora.runs.harness import harness

world = pytest.fixture(scope="module")(language_world)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of lm-eval and what it imports are not ours

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra eval is not installed"
)
TASK = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: ["w2", "w9"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [{"start": f"w0 w{number}", "answer": number % 2} for number in range(1, 7)]


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    experiment = config.parse(
        {
            "model": {"path": str(world / "llama")},
            "task": {"kind": "causal_lm", "block_size": 8},
            "data": {"kind": "files", "train": str(world / "texts.jsonl"), "test": str(world / "test.jsonl")},
            "clients": {"num": 2, "per_round": 2, "partition": {"kind": "iid"}},
            "method": {"kind": "lora", "rounds": 2, "rank": 4},
        }
    )
    fedlora.run(experiment, world / "run")
    write_rows(world / "questions.jsonl", QUESTIONS)
    (world / "tasks").mkdir()
    (world / "tasks" / "which.yaml").write_text(TASK.format(rows=world / "questions.jsonl"))
    return world / "run"


def by_hand(run: Path) -> float:
    """The share of questions whose answer has the higher log-likelihood, one at a time."""
    trained = fedlora.load_run(run)
    model, tokenizer = trained.workspace.model.eval(), trained.task.tokenizer  # type: ignore[attr-defined]
    right = 0
    for row in QUESTIONS:
        tokens = tokenizer(row["start"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        two, nine = tokenizer.convert_tokens_to_ids(["w2", "w9"])
        right += int(logits[nine] > logits[two]) == row["answer"]
    return right / len(QUESTIONS)


@needs_harness
def test_a_run_is_scored_on_a_task_of_local_files(run: Path) -> None:
    words = [
        "evaluate",
        str(run),
        "--harness",
        "which_*",
        "--tasks-from",
        str(run.parent / "tasks"),
        "--format",
        "json",
    ]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (score,) = json.loads(done.stdout[done.stdout.index("[") :])
    assert (score["task"], score["metric"], score["filter"]) == ("which_word", "acc", "none")
    assert score["value"] == pytest.approx(by_hand(run))
    (few,) = harness(fedlora.load_run(run), ["which_word"], run.parent / "tasks", limit=1)
    assert few.value in (0.0, 1.0)


@needs_harness
def test_an_unknown_task_and_folder_are_refused(run: Path) -> None:
    trained = fedlora.load_run(run)
    with pytest.raises(ConfigError, match=r"has no task 'nothing'"):
        harness(trained, ["nothing"], run.parent / "tasks")
    with pytest.raises(ConfigError, match=r"there is no folder .*correct --tasks-from"):
        harness(trained, ["which_word"], run.parent / "nowhere")


def test_the_harness_must_be_installed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = fedlora.load_run(run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[eval\]'"):
        harness(trained, ["which_word"])


def test_only_language_models_are_scored(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": f"w{n}", "label": "ab"[n % 2]} for n in range(20)])
    experiment = config.parse(
        {
            "model": {"path": str(save_model(tmp_path / "bert"))},
            "data": {"kind": "files", "train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")},
            "clients": {"num": 2, "per_round": 1, "partition": {"kind": "iid"}},
            "method": {"kind": "lora", "rounds": 1, "rank": 2},
        }
    )
    fedlora.run(experiment, tmp_path / "run")
    with pytest.raises(ConfigError, match="lm-eval evaluates causal language models"):
        harness(fedlora.load_run(tmp_path / "run"), ["which_word"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of the two"),
        (("--data", "rows.csv", "--harness", "which_word"), "give one of the two"),
        (("--data", "rows.csv", "--limit", "3"), "are for --harness"),
        (("--harness", "which_word", "-c", "text=body"), "are for --data; leave them out with --harness"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", "run", *options])
    assert isinstance(done.exception, ConfigError) or done.exit_code == 2
    assert message in str(done.exception) or message in " ".join(done.output.split())

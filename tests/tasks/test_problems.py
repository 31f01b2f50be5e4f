"""Several classes for a text, or a number: from rows to a federation, and to what others make of its model."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fixtures.tiny import COLOURS, contents, experiment, make_rows, tiny_world, write_rows
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedlora
from fedlora.config import Experiment
from fedlora.core.errors import DataError
from fedlora.runs.result import Result
from fedlora.show.compare import comparison, load_result
from fedlora.show.report import as_dict
from fedlora.tasks import Files, Model, TextClassification
from fedlora.tasks.scores import MAIN_METRIC, Problem
from fedlora.tasks.text import PreparedText

CPU = torch.device("cpu")
PROBLEMS: tuple[Problem, ...] = ("multi", "regression")
world = pytest.fixture(scope="module")(tiny_world)


def label_of(text: str, problem: Problem) -> Any:
    """All colours of a text, or how red it is."""
    if problem == "multi":
        return [colour for colour in COLOURS if colour in text.split()]
    return 0.5 * text.split().count("red") - 1.0


def rows_of(count: int, seed: int, problem: Problem) -> list[dict[str, Any]]:
    """The rows of the tiny world, every other one with the text of another behind its own."""
    rows = make_rows(count, seed)
    texts = [row["text"] + (f" {rows[number - 4]['text']}" if number % 2 else "") for number, row in enumerate(rows)]
    return [{"text": text, "label": label_of(text, problem)} for text in texts]


@pytest.fixture(scope="module", autouse=True)
def _rows(world: Path) -> None:
    for problem in PROBLEMS:
        write_rows(world / f"{problem}-train.jsonl", rows_of(72, 0, problem))
        # the last row is of no class
        last = {"text": "w1 w2", "label": label_of("w1 w2", problem)}
        write_rows(world / f"{problem}-test.jsonl", [*rows_of(24, 1, problem), last])


def prepare(world: Path, problem: Problem) -> PreparedText:
    files = Files(train=str(world / f"{problem}-train.jsonl"), test=str(world / f"{problem}-test.jsonl"))
    task = TextClassification(problem=problem, pooling="model").prepare(Model(path=str(world / "bert")), files)
    assert isinstance(task, PreparedText)
    return task


def settings(world: Path, problem: Problem) -> tuple[str, ...]:
    files = (f"data.{side}={world / f'{problem}-{side}.jsonl'}" for side in ("train", "test"))
    return (*files, f"task={{kind='text_classification', pooling='model', problem='{problem}'}}")


# ---- the task


def test_batches_carry_the_labels_of_the_problem(world: Path) -> None:
    rows = np.array([5, 0, 24])
    labels = prepare(world, "multi").batch(rows, CPU, "test")["labels"]
    wanted = [row["label"] for row in rows_of(24, 1, "multi")]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [
        [float(c in wanted[5]) for c in COLOURS],
        [float(c in wanted[0]) for c in COLOURS],
        [0] * 3,
    ]
    numbers = prepare(world, "regression").batch(rows, CPU, "test")["labels"]
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [*(rows_of(24, 1, "regression")[row]["label"] for row in (5, 0)), -1.0]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_is_that_of_transformers(world: Path, problem: Problem) -> None:
    # rows of different lengths, so that they go through the model in several groups
    task = prepare(world, problem)
    model, batch = task.load_model(0, "fp32", CPU)[0].eval(), task.batch(np.arange(24), CPU)
    with torch.no_grad():
        expected = model(**batch).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_evaluation_is_made_of_the_logits(world: Path, problem: Problem) -> None:
    task, rows = prepare(world, problem), np.array([20, 24, 3])
    assert (task.main_metric, task.higher_is_better) == MAIN_METRIC[problem]
    model = task.load_model(0, "fp32", CPU)[0].eval()
    with torch.no_grad():
        found = task.evaluate(model, rows, "test", CPU).metrics
        logits = torch.cat([task.logits(model, rows[[place]], "test", CPU) for place in range(3)])
    labels = task.batch(rows, CPU, "test")["labels"]
    if problem == "multi":
        assert found["accuracy"] == pytest.approx(float(((logits > 0) == (labels > 0)).all(1).float().mean()))
    else:
        assert found["rmse"] == pytest.approx(float((logits[:, 0] - labels).square().mean().sqrt()), abs=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_task_comes_back_without_its_data(world: Path, problem: Problem) -> None:
    whole = prepare(world, problem)
    settings = TextClassification(problem=problem, pooling="model")
    alone = settings.restore(Model(path=str(world / "bert")), whole.label_names)
    model = whole.load_model(0, "fp32", CPU)[0].eval()
    file = world / f"{problem}-test.jsonl"
    with torch.no_grad():
        expected = whole.evaluate(model, np.arange(25), "test", CPU)
        assert alone.with_rows(file, {}).evaluate(model, np.arange(25), "test", CPU) == expected
        logits = whole.logits(model, np.arange(25), "test", CPU)
        found = alone.predict(model, list(whole.data["test"]["text"]), CPU)
    if problem == "multi":
        assert alone.label_names == list(COLOURS)
        assert all(list(one.values()) == sorted(one.values(), reverse=True) for one in found)
        shares = torch.tensor([[one[name] for name in COLOURS] for one in found])
        torch.testing.assert_close(shares, logits.sigmoid(), atol=1e-5, rtol=0)
    else:
        assert [list(one) for one in found] == [["value"]] * 25
        torch.testing.assert_close(torch.tensor([one["value"] for one in found]), logits[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("problem", "label", "said"), [("multi", ["violet"], "such as 'violet'"), ("regression", "red", "finite numbers")]
)
def test_other_rows_of_another_kind_are_refused(
    world: Path, tmp_path: Path, problem: Problem, label: Any, said: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "w1", "label": label}])
    with pytest.raises(DataError, match=said):
        prepare(world, problem).with_rows(file, {})


def test_what_partitions_see_of_labels(world: Path) -> None:
    multi, number = prepare(world, "multi"), prepare(world, "regression")
    first = [COLOURS.index(row["label"][0]) for row in rows_of(72, 0, "multi")]
    assert multi.labels.tolist() == first
    assert (number.labels.tolist(), number.label_names) == ([0] * 72, [])


def test_numbers_have_no_classes_to_skew(world: Path, tmp_path: Path) -> None:
    skewed = experiment(
        world, "lora", *settings(world, "regression"), "clients.partition={kind='dirichlet', alpha=1.0}"
    )
    with pytest.raises(DataError, match="the task has no classes, which the 'dirichlet' partition skews"):
        fedlora.run(skewed, tmp_path / "run")


# ---- federations


def chosen(world: Path, problem: Problem, method: str) -> Experiment:
    return experiment(world, method, *settings(world, problem), "clients.per_round=9", rounds=2)


Ran = Callable[[Problem, str], Result]


@pytest.fixture(scope="module")
def ran(world: Path) -> Ran:
    """The finished run of two rounds of a problem and method, made when it is first asked for."""

    @functools.cache
    def run(problem: Problem, method: str) -> Result:
        return fedlora.run(chosen(world, problem, method), world / "runs" / f"{problem}-{method}")

    return run


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_federation_learns(ran: Ran, problem: Problem, method: str) -> None:
    result = ran(problem, method)
    assert result.main_metric == MAIN_METRIC[problem][0]
    assert result.after["loss"] < result.before["loss"]
    assert (result.rows[-1].metrics.keys() >= {"rmse", "pearson", "loss"}) == (problem == "regression")
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["label_names"] == (list(COLOURS) if problem == "multi" else [])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_run_evaluates_to_what_it_found(world: Path, ran: Ran, problem: Problem) -> None:
    result = ran(problem, "lora")
    found = fedlora.load_run(result.folder).evaluate(world / f"{problem}-test.jsonl").metrics
    assert found == pytest.approx(result.after, abs=1e-5)


def logits_of(model: nn.Module, folder: Path, texts: list[str]) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def ours(run: Path, texts: list[str], problem: Problem) -> Tensor:
    """What the run predicts, as logits."""
    found = fedlora.load_run(run).predict(texts)
    if problem == "regression":
        return torch.tensor([[one["value"]] for one in found])
    return torch.tensor([[one[name] for name in COLOURS] for one in found]).logit()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_others_read_the_exported_model_right(ran: Ran, tmp_path: Path, problem: Problem, method: str) -> None:
    run, texts = ran(problem, method).folder, [row["text"] for row in rows_of(4, 5, problem)]
    fedlora.load_run(run).export(tmp_path / "out", merge=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    kind = {"multi": "multi_label_classification", "regression": "regression"}[problem]
    assert (model.config.problem_type, model.config.num_labels) == (kind, 3 if problem == "multi" else 1)
    torch.testing.assert_close(logits_of(model, tmp_path / "out", texts), ours(run, texts, problem), atol=1e-4, rtol=0)
    # a pipeline takes the sigmoid of several classes, and a number as it is
    pipe: Any = transformers.pipeline("text-classification", model=str(tmp_path / "out"), device="cpu", top_k=None)
    for said, one in zip(pipe(texts), fedlora.load_run(run).predict(texts), strict=True):
        assert [entry["score"] for entry in said] == pytest.approx(list(one.values()), abs=1e-4)
        assert problem == "regression" or [entry["label"] for entry in said] == list(one)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_peft_on_the_original_base_says_what_the_run_says(world: Path, ran: Ran, problem: Problem) -> None:
    run, texts = ran(problem, "lora").folder, [row["text"] for row in rows_of(4, 5, problem)]
    num_labels = 3 if problem == "multi" else 1
    base = AutoModelForSequenceClassification.from_pretrained(
        world / "bert", num_labels=num_labels, ignore_mismatched_sizes=True
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(base, str(run / "adapter"))
    torch.testing.assert_close(logits_of(model, world / "bert", texts), ours(run, texts, problem), atol=1e-4, rtol=0)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_same_run_gives_the_same_bits(world: Path, ran: Ran, tmp_path: Path, problem: Problem) -> None:
    again = fedlora.run(chosen(world, problem, "lora"), tmp_path / "again")
    assert again.adapter is not None
    assert contents(again.adapter) == contents(ran(problem, "lora").folder / "adapter")


def test_centralised_and_local_training_know_numbers_too(world: Path, tmp_path: Path) -> None:
    for mode in ("centralised", "local"):
        alone = experiment(world, "full", *settings(world, "regression"), f"mode='{mode}'", "num_local=2", rounds=2)
        result = fedlora.run(alone, tmp_path / mode)
        assert result.main_metric == "rmse"
        assert result.after["rmse"] < result.before["rmse"]


def test_a_comparison_shows_the_main_metric_and_prefers_nobody(ran: Ran) -> None:
    results = [ran("regression", method) for method in ("full", "lora")]
    rows = comparison([load_result(result.folder) for result in results])
    assert rows == comparison([as_dict(result) for result in results])
    # in the order given, whichever way better is
    assert [row["label"] for row in rows] == ["full", "lora"]
    assert [row["label"] for row in comparison([as_dict(result) for result in results[::-1]])] == ["lora", "full"]
    for row, result in zip(rows, results, strict=True):
        assert (row["metric"], row["before"], row["after"]) == ("rmse", result.before["rmse"], result.after["rmse"])

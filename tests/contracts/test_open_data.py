"""The contract of tasks and data sources: fedlora's own, a class of one's own, and classes with a fault."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fixtures import strangers
from fixtures.tiny import COLOURS, make_rows, write_rows
from fixtures.tiny_language import PAIRS, TEMPLATE, TEXTS, save_language_model
from PIL import Image
from transformers import ViTImageProcessor

from fedlora.tasks import (
    SOURCES,
    TASKS,
    CausalLM,
    DocstringQuestions,
    Docstrings,
    Evaluation,
    Files,
    Hub,
    ImageClassification,
    ImageFolder,
    Instruction,
    Model,
    Prepared,
    QuestionAnswering,
    Rows,
    Source,
    Task,
    TextClassification,
    TokenClassification,
    Validation,
)
from fedlora.tasks.data.columns import Raw
from fedlora.testing import check_source, check_task, tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a language model, a model of images, and rows for every source."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        patch.setattr(os, "fsync", lambda handle: None)
        save_language_model(root / "llama")
        tiny_model("vit").save_pretrained(str(root / "vit"))
        size = {"height": 16, "width": 16}
        ViTImageProcessor(size=size).save_pretrained(str(root / "vit"))  # type: ignore[no-untyped-call]
        (root / "hub").mkdir()
        write_rows(root / "hub" / "train.jsonl", make_rows(48, 0))
        write_rows(root / "hub" / "test.jsonl", make_rows(12, 1))
        for number, colour in enumerate(((220, 40, 40), (40, 40, 220))):
            for side, count in (("train", 12), ("test", 3)):
                folder = root / "images" / side / f"c{number}"
                folder.mkdir(parents=True)
                for n in range(count):
                    noise = np.random.default_rng([number, n, count]).integers(-30, 30, (16, 16, 3))
                    Image.fromarray((np.asarray(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                        folder / f"{n}.png"
                    )
        yield root


def rows_of(kind: str) -> Rows:
    """Rows for a task on texts."""
    rows: list[dict[str, Any]]
    if kind == "text_classification":
        return Rows(train=make_rows(24, 0), test=make_rows(6, 1))
    if kind == "token_classification":
        texts = [row["text"].split() for row in make_rows(24, 0)]
        rows = [{"tokens": words, "tags": ["B-c" if w in COLOURS else "O" for w in words]} for words in texts]
    elif kind == "question_answering":
        found = [(row["text"], row["label"]) for row in make_rows(24, 0)]
        rows = [
            {"context": text, "question": "which", "answers": {"text": [c], "answer_start": [text.index(c)]}}
            for text, c in found
        ]
    elif kind == "causal_lm":
        rows = [{"text": text} for text in TEXTS]
    else:
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS]
    return Rows(train=rows, test=rows[:6])


OWN_TASKS: dict[str, tuple[Task, list[str]]] = {
    "text_classification": (TextClassification(), ["w1 red", '["w1", "blue"]']),
    "token_classification": (TokenClassification(), ["w1 red w2"]),
    "question_answering": (QuestionAnswering(), ['{"question": "which", "context": "w1 red"}']),
    "causal_lm": (CausalLM(max_new_tokens=4), ["w1 w2"]),
    "instruction": (Instruction(template=TEMPLATE, max_new_tokens=4), ["w1 w2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_TASKS)
def test_a_task_of_fedlora_on_texts_passes_the_check(world: Path, kind: str) -> None:
    task, inputs = OWN_TASKS[kind]
    model = Model(path=str(world / "llama")) if kind in ("causal_lm", "instruction") else None
    check_task(task, rows_of(kind), inputs, model)


@pytest.mark.slow
def test_the_task_of_images_passes_the_check_with_its_source(world: Path) -> None:
    source, model = ImageFolder(path=str(world / "images")), Model(path=str(world / "vit"))
    check_task(ImageClassification(), source, [str(world / "images" / "test" / "c0" / "0.png")], model)
    check_source(source, ImageClassification(), model)


def test_every_task_and_source_is_checked() -> None:
    # the folder of a run of `collated` lacks its functions; tests/runs/test_from_trainer.py looks at it
    assert set(OWN_TASKS) | {"image_classification", "collated"} == set(TASKS)
    # the training rows of `sites` lie elsewhere
    assert set(OWN_SOURCES) | {"docstring_questions", "image_folder", "sites"} == set(SOURCES)


OWN_SOURCES: dict[str, Any] = {
    "docstrings": lambda world: Docstrings(num_classes=2),
    "files": lambda world: Files(train=str(world / "hub" / "train.jsonl")),
    "hub": lambda world: Hub(path=str(world / "hub")),
    "rows": lambda world: rows_of("text_classification"),
    "validation": lambda world: Validation(source=rows_of("text_classification"), share=0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_SOURCES)
def test_a_source_of_fedlora_passes_the_check(world: Path, kind: str) -> None:
    check_source(OWN_SOURCES[kind](world), TextClassification(max_length=16), learns=kind != "docstrings")


@pytest.mark.slow
def test_the_source_of_questions_passes_the_check(world: Path) -> None:
    task = Instruction(template=TEMPLATE, max_length=16, max_new_tokens=4)
    source = DocstringQuestions(num_packages=2, max_words=5)
    check_source(source, task, Model(path=str(world / "llama")), learns=False)


def test_a_task_and_a_source_of_ones_own_pass_the_checks() -> None:
    check_task(strangers.Shouting(), strangers.Colours(), ["all is red"])
    check_source(strangers.Colours())


# ---- faults that the checks find


@dataclasses.dataclass(frozen=True)
class Wavering(Task):
    """A task that is another one each time, in one respect.

    Args:
        fault: the method that misbehaves.
    """

    fault: str

    def prepare(self, model: Model, source: Source) -> Prepared:
        return self._spoilt(TextClassification().prepare(model, source))

    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        names = label_names[::-1] if self.fault == "restore" else label_names
        return TextClassification().restore(model, names)

    def _spoilt(self, task: Any) -> Any:
        original = getattr(task, self.fault, None)

        def load_model(seed: int, compute: str, device: torch.device) -> Any:
            CALLS.append(1)
            return original(seed + len(CALLS), compute, device)  # type: ignore[misc]

        def evaluate(model: Any, rows: Any, split: Any, device: Any) -> Evaluation:
            return Evaluation({task.main_metric: float(rows[0])}, ())

        def predict(model: Any, inputs: list[str], device: Any) -> Any:
            return original(model, inputs[:-1], device)  # type: ignore[misc]

        spoilt = {"load_model": load_model, "evaluate": evaluate, "predict": predict}
        if self.fault in spoilt:
            setattr(task, self.fault, spoilt[self.fault])
        return task


CALLS: list[int] = []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load_model", "the same seed gave another model"),
        ("evaluate", "the order of rows changes metrics"),
        ("predict", "2 inputs have 1 predictions"),
        ("restore", "without data"),
    ],
)
def test_a_task_with_a_fault_is_found(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_task(Wavering(fault), strangers.Colours(), ["red", "blue"])


@dataclasses.dataclass(frozen=True)
class Shuffled(strangers.Colours):
    """The same rows in another order each time."""

    def load(self) -> Raw:
        CALLS.append(1)
        raw = super().load()
        return raw._replace(train=raw.train.shuffle(seed=len(CALLS)))


@dataclasses.dataclass(frozen=True)
class Empty(strangers.Colours):
    """No test rows."""

    def load(self) -> Raw:
        raw = super().load()
        return raw._replace(test=raw.train.select([]))


@pytest.mark.parametrize(
    ("source", "message"), [(Shuffled(), "the rows or their order are others"), (Empty(), "there are no test rows")]
)
def test_a_source_with_a_fault_is_found(source: Source, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_source(source)

"""The slot ``Task`` and its table."""

from __future__ import annotations

from fedlora.tasks.base import Evaluation, Model, Prepared, Task
from fedlora.tasks.sources import SOURCES, AnySource, Docstrings, Files, Hub, Source
from fedlora.tasks.text import TextClassification

TASKS: dict[str, type[Task]] = {"text_classification": TextClassification}
AnyTask = TextClassification

__all__ = [
    "SOURCES",
    "TASKS",
    "AnySource",
    "AnyTask",
    "Docstrings",
    "Evaluation",
    "Files",
    "Hub",
    "Model",
    "Prepared",
    "Source",
    "Task",
    "TextClassification",
]

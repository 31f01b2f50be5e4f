"""The slot ``Task`` and its table."""

from __future__ import annotations

from typing import Annotated

from fedlora.component import Field, by_kind
from fedlora.tasks.base import Evaluation, Model, Prepared, Task
from fedlora.tasks.images import ImageClassification
from fedlora.tasks.instruction import Instruction
from fedlora.tasks.language import CausalLM
from fedlora.tasks.questions import QuestionAnswering
from fedlora.tasks.sources import SOURCES, AnySource, Docstrings, Files, Hub, ImageFolder, Sites, Source, Validation
from fedlora.tasks.text import TextClassification
from fedlora.tasks.tokens import TokenClassification

AnyTask = Annotated[
    CausalLM | ImageClassification | Instruction | QuestionAnswering | TextClassification | TokenClassification,
    Field(discriminator="kind"),
]
"""Any task, told apart by ``kind``."""

TASKS: dict[str, type[Task]] = by_kind(AnyTask)
"""The tasks by ``kind``."""

__all__ = [
    "SOURCES",
    "TASKS",
    "AnySource",
    "AnyTask",
    "CausalLM",
    "Docstrings",
    "Evaluation",
    "Files",
    "Hub",
    "ImageClassification",
    "ImageFolder",
    "Instruction",
    "Model",
    "Prepared",
    "QuestionAnswering",
    "Sites",
    "Source",
    "Task",
    "TextClassification",
    "TokenClassification",
    "Validation",
]

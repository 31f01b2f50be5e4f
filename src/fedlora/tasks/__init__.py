"""Tasks: models, data, losses and metrics behind one slot.

Only tasks and tunings import ``transformers`` and ``datasets``; nothing here depends on federated training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedlora.core.component import by_kind
from fedlora.core.slots import Slot
from fedlora.tasks.base import Evaluation, Model, Prepared, Task
from fedlora.tasks.collated.task import Collated
from fedlora.tasks.data.columns import Source
from fedlora.tasks.data.rows import Rows
from fedlora.tasks.data.sources import (
    SOURCES,
    AnySource,
    DocstringQuestions,
    Docstrings,
    Files,
    Hub,
    ImageFolder,
    Sites,
    Validation,
)
from fedlora.tasks.images.images import ImageClassification
from fedlora.tasks.lm.instruction import Instruction
from fedlora.tasks.lm.language import CausalLM
from fedlora.tasks.qa.questions import QuestionAnswering
from fedlora.tasks.tags.tokens import TokenClassification
from fedlora.tasks.text import TextClassification

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[
        CausalLM
        | Collated
        | ImageClassification
        | Instruction
        | QuestionAnswering
        | TextClassification
        | TokenClassification,
        Slot("task", Task),
    ]
"""Any task, discriminated by ``kind``."""

TASKS: dict[str, type[Task]] = by_kind(AnyTask)
"""The tasks by ``kind``."""

__all__ = [
    "SOURCES",
    "TASKS",
    "AnySource",
    "AnyTask",
    "CausalLM",
    "Collated",
    "DocstringQuestions",
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
    "Rows",
    "Sites",
    "Source",
    "Task",
    "TextClassification",
    "TokenClassification",
    "Validation",
]

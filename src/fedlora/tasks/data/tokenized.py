"""The common base of tasks with tokenised examples."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.tasks.base import Batch, Data, Model, Positions, Prepared, Split, Task
from fedlora.tasks.data.columns import Source, Splits, rename, split
from fedlora.tasks.data.files import read_rows
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.models.encoded import Ragged, width_of
from fedlora.tasks.models.loading import config_of, load_tokenizer, save_tokenizer
from fedlora.tasks.models.objects import fingerprint_of_tokenizer
from fedlora.tasks.models.staged import staged, without_idle_mask
from fedlora.tasks.models.vocabulary import check_ids, unknown_notes


class TokenizedTask(Task):
    """A task with tokenised examples."""

    def read(self, source: Source) -> tuple[Splits, list[str]]:
        """Training and test rows, classes as numbers; and the classes' names, none for a task without classes.

        Raises:
            DataError: the data cannot be read, or are not of the form that the task needs.
        """
        raw = source.raw()
        train, *test = (self.known(rows, [], which) for rows, which in raw.sides)
        raw = raw._replace(train=train, test=test[0] if test else None)
        return split(raw, self.content(raw.train)), []

    def content(self, rows: Any) -> str:
        """The column by which rows are held out: equal ones fall on one side."""
        return "text"

    @abstractmethod
    def known(self, rows: Any, names: list[str], which: str) -> Any:
        """Checks every row of ``rows``, a ``datasets.Dataset``, and returns them with classes as indices into
        ``names``.

        Args:
            rows: with the task's columns.
            names: the model's classes.
            which: what the rows are, for messages.

        Raises:
            DataError: a row does not have the form that the task needs, or has another class.
        """

    @abstractmethod
    def over(self, model: Model, tokenizer: Any, names: list[str], data: Data) -> Prepared:
        """The task over rows as ``known`` gives them, by split."""

    def prepare(self, model: Model, source: Source) -> Prepared:
        splits, names = self.read(source)
        return self.over(model, load_tokenizer(model), names, {"train": splits.train, "test": splits.test})

    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        return self.over(model, load_tokenizer(model), label_names, {})


class PreparedTokenized(Prepared):
    """Tokenised rows, and the model they are for.

    Args:
        settings: the task.
        model: which model.
        tokenizer: its tokenizer.
        names: the classes' names; none without classes.
        data: a data set per split.
    """

    settings: TokenizedTask

    def __init__(self, settings: TokenizedTask, model: Model, tokenizer: Any, names: list[str], data: Data) -> None:
        super().__init__(model, names, data)
        self.settings = settings
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def sequences(self) -> list[Ragged]:
        """The encoded examples of each split."""

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, *unknown_notes(self.sequences, self.tokenizer, self._model.path))

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        return {**super().fingerprints, "tokenizer": fingerprint_of_tokenizer(self.tokenizer)}

    def longest(self) -> int:
        """Tokens of the longest example; 0 without any.

        Raises:
            ConfigError: the model's embedding has no row for a token of the data, or for the one to pad with.
        """
        for one in self.sequences:
            self.check_ids(one.values)
        self.check_ids(np.array([self.tokenizer.pad_token_id]))
        return max((one.longest() for one in self.sequences), default=0)

    def check_ids(self, ids: Any) -> None:
        """Refuses token ids that the model's embedding has no row for.

        Args:
            ids: an array or tensor of any shape.

        Raises:
            ConfigError: an id is too large.
        """
        if 0 not in ids.shape:
            check_ids(int(ids.max()), self._rows, self._model.path, self.tokenizer)

    @functools.cached_property
    def counts_mask(self) -> bool:
        """Whether the model counts its positions by the mask; without one it sums ones in floating point, which has no
        deterministic kernel on CUDA."""
        return bool(config_of(self._model).model_type == "opt")

    @functools.cached_property
    def _rows(self) -> int | None:
        """Rows of the model's embedding, where its configuration states them."""
        found = getattr(config_of(self._model).get_text_config(), "vocab_size", None)
        return found if isinstance(found, int) else None

    def contents(self, split: Split) -> list[str]:
        return self.texts(split)

    def inputs(
        self, tokens: Ragged, rows: Positions, limit: int, types: Ragged | None = None, pad_to: int | None = None
    ) -> Batch:
        """Sequences as a batch, padded to the longest, or to ``pad_to``.

        Args:
            tokens: the sequences.
            rows: which of them.
            limit: the most tokens that one has.
            types: the type of each token, where the model takes them.
            pad_to: the width of all batches.
        """
        lengths = tokens.lengths(rows)
        width = width_of(int(lengths.max()), limit, pad_to)
        mask = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
        batch = {"input_ids": tokens.padded(rows, width, self.tokenizer.pad_token_id), "attention_mask": mask}
        self.check_ids(batch["input_ids"])  # rows of a file, and inputs of predictions, are not checked in advance
        return batch | ({"token_type_ids": types.padded(rows, width, 0)} if types is not None else {})

    @abstractmethod
    def host_batch(self, rows: Positions, split: Split) -> Batch:
        """Examples as one batch in the host's memory, with a mask."""

    def for_device(self, batch: Batch) -> Batch:
        """A batch of ``host_batch`` as a device other than a CPU gets it: what costs it time is left out or done."""
        return batch if self.counts_mask else without_idle_mask(batch)

    def batch(self, rows: Positions, device: torch.device, split: Split = "train") -> Batch:
        batch = self.host_batch(rows, split)
        return batch if device.type == "cpu" else next(staged([self.for_device(batch)], device))

    def batches(self, parts: Sequence[Positions], device: torch.device) -> Iterator[Batch]:
        """See ``Prepared.batches``: the token rows of a turn reach a device in one copy."""
        found = (self.host_batch(part, "train") for part in parts)
        return found if device.type == "cpu" else staged(map(self.for_device, found), device)

    def with_rows(
        self, path: Path, columns: Mapping[str, str], split: Split = "test", reading: Reading | None = None
    ) -> Prepared:
        rows = rename(read_rows(str(path), reading or Reading(), split), columns, str(path))
        known = self.settings.known(rows, self._names, str(path))
        return self.settings.over(self._model, self.tokenizer, self._names, {split: known})

    def save_pretrained(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder)

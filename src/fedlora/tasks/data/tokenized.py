"""The common base of tasks with tokenised examples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.tasks.base import Batch, Data, Model, Positions, Prepared, Split, Task
from fedlora.tasks.data.columns import Source, Splits, rename, split
from fedlora.tasks.data.sources import read_rows
from fedlora.tasks.models.encoded import Ragged, width_of
from fedlora.tasks.models.loading import load_tokenizer, save_tokenizer


class TokenizedTask(Task):
    """A task with tokenised examples."""

    def read(self, source: Source) -> tuple[Splits, list[str]]:
        """Training and test rows, classes as numbers; and the classes' names, none for a task without classes.

        Raises:
            DataError: the data cannot be read, or are not of the form that the task needs.
        """
        raw = source.raw()
        for rows, which in raw.sides:
            self.known(rows, [], which)
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
        return batch | ({"token_type_ids": types.padded(rows, width, 0)} if types is not None else {})

    def with_rows(self, path: Path, columns: Mapping[str, str], split: Split = "test") -> Prepared:
        rows = rename(read_rows(str(path)), columns, str(path))
        known = self.settings.known(rows, self._names, str(path))
        return self.settings.over(self._model, self.tokenizer, self._names, {split: known})

    def save_pretrained(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder)

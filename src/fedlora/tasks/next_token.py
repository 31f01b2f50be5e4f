"""What the tasks that predict tokens one after the other share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.tasks import tokens_out
from fedlora.tasks.base import Batch, Evaluation, Model, Prepared, Rows, Split
from fedlora.tasks.loading import save_tokenizer
from fedlora.tasks.tokens_out import Examples


class PreparedNextToken(Prepared):
    """Rows as sequences of tokens, of which some are learnt, and the decoder that they are for.

    Args:
        model: which model.
        tokenizer: its tokenizer.
        data: a data set per split; rows that make no example are left out.
        examples: what each split's rows made.
        longest: tokens of a sequence at most.
        eval_batch_size: sequences in an evaluation batch.
        packing: whether the sequences of a training batch are joined up to ``longest`` tokens.
        lacking: what is wrong with a row that makes no example.
        cut_to: the setting that cuts rows, with its value; empty if none does.

    Raises:
        DataError: no row is left.
    """

    auto_class = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    higher_is_better = True
    main_metric = "accuracy"

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        data: Mapping[Split, Any],
        examples: Mapping[Split, Examples],
        longest: int,
        eval_batch_size: int,
        packing: bool,
        lacking: str,
        cut_to: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self.train_head = model.train_head
        self._examples = examples
        self._longest = longest
        self._eval_batch_size = eval_batch_size
        self._packing = packing
        self._data = {name: tokens_out.learnable(rows, examples[name], name, lacking) for name, rows in data.items()}
        self._notes = tuple(
            note
            for name, rows in data.items()
            for note in tokens_out.notes(len(rows), examples[name], name, lacking, cut_to)
        )

    @property
    def data(self) -> Mapping[Split, Any]:
        return self._data

    @property
    def labels(self) -> Rows:
        return np.zeros(len(self._data["train"]), dtype=np.int64)

    @property
    def label_names(self) -> list[str]:
        return []

    def load_model(self, seed: int, compute: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """See ``Prepared.load_model``; the head is what the checkpoint lacks, in general nothing.

        Raises:
            ConfigError: there is no such model, or it reads fewer tokens than a sequence has.
        """
        longest = max((examples.longest() for examples in self._examples.values()), default=0)
        return tokens_out.load_language_model(self.auto_class, self._model, seed, device, longest)

    def batch(self, rows: Rows, device: torch.device, split: Split = "train") -> Batch:
        pad = self.tokenizer.pad_token_id
        return tokens_out.batch_of(self._examples[split], rows, self._longest, pad, self._packing, device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return tokens_out.mean_loss(model, batch)

    def evaluate(self, model: nn.Module, rows: Rows, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: ``accuracy``, ``loss`` and ``perplexity`` of ``tokens_out.score``."""
        size, pad = self._eval_batch_size, self.tokenizer.pad_token_id
        found = tokens_out.score(model, self._examples[split], rows, size, self._longest, pad, device)
        return found._replace(warnings=found.warnings + self._notes)

    def save_pretrained(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder)

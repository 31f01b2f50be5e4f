"""What the tasks that predict tokens one after the other share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.tasks import tokens_out
from fedlora.tasks.base import Batch, Evaluation, Model, Rows, Split
from fedlora.tasks.embeddings import embed
from fedlora.tasks.tokenized import PreparedTokenized, TokenizedTask
from fedlora.tasks.tokens_out import Examples


class NextTokenTask(TokenizedTask):
    """A task that predicts tokens one after the other."""

    packing: bool
    eval_batch_size: int

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of a sequence at most."""

    @abstractmethod
    def encode(self, rows: Any, tokenizer: Any) -> Examples:
        """Rows as sequences, and which of their tokens are learnt."""


class PreparedNextToken(PreparedTokenized):
    """Rows as sequences of tokens, of which some are learnt, and the decoder that they are for.

    Args:
        settings: the task.
        model: which model.
        tokenizer: its tokenizer.
        names: none; tokens are no classes.
        data: a data set per split; rows that make no example are left out.
        lacking: what is wrong with a row that makes no example.
        cut_to: the setting that cuts rows, with its value; empty if none does.

    Raises:
        DataError: no row is left.
    """

    settings: NextTokenTask
    auto_class = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    higher_is_better = True
    main_metric = "accuracy"

    def __init__(
        self,
        settings: NextTokenTask,
        model: Model,
        tokenizer: Any,
        names: list[str],
        data: Mapping[Split, Any],
        lacking: str,
        cut_to: str = "",
    ) -> None:
        examples = {name: settings.encode(rows, tokenizer) for name, rows in data.items()}
        left = {name: tokens_out.learnable(rows, examples[name], name, lacking) for name, rows in data.items()}
        super().__init__(settings, model, tokenizer, names, left)
        self._examples, self._packing = examples, settings.packing
        self._notes = tuple(
            note
            for name, rows in data.items()
            for note in tokens_out.notes(len(rows), examples[name], name, lacking, cut_to)
        )

    def embeddings(self, split: Split, device: torch.device) -> NDArray[np.float32]:
        alone = copy.copy(self)
        alone._packing = False  # an example's state is of its own tokens
        return embed(alone, split, device)

    def load_model(self, seed: int, compute: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """See ``Prepared.load_model``; the head is what the checkpoint lacks, in general nothing.

        Raises:
            ConfigError: there is no such model, or it reads fewer tokens than a sequence has.
        """
        longest = max((examples.longest() for examples in self._examples.values()), default=0)
        return tokens_out.load_language_model(self.auto_class, self._model, seed, device, longest)

    def batch(self, rows: Rows, device: torch.device, split: Split = "train") -> Batch:
        limit, pad = self.settings.longest, self.tokenizer.pad_token_id
        return tokens_out.batch_of(self._examples[split], rows, limit, pad, self._packing, device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return tokens_out.mean_loss(model, batch)

    def evaluate(self, model: nn.Module, rows: Rows, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: ``accuracy``, ``loss`` and ``perplexity`` of ``tokens_out.score``."""
        size, limit, pad = self.settings.eval_batch_size, self.settings.longest, self.tokenizer.pad_token_id
        found = tokens_out.score(model, self._examples[split], rows, size, limit, pad, device)
        return found._replace(warnings=found.warnings + self._notes)

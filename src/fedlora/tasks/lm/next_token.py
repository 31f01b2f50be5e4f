"""The common base of tasks that predict the next token."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks.base import Batch, Compute, Data, Evaluation, Model, Positions, Split
from fedlora.tasks.data.tokenized import PreparedTokenized, TokenizedTask
from fedlora.tasks.lm import tokens_out
from fedlora.tasks.lm.tokens_out import Examples
from fedlora.tasks.models.embeddings import embed
from fedlora.tasks.models.encoded import Ragged, chunks
from fedlora.tasks.models.loading import load_pretrained
from fedlora.tasks.models.rounded import mixed
from fedlora.tasks.models.shares import Shares, shares_of
from fedlora.tasks.models.staged import LEARNT, staged


class NextTokenTask(TokenizedTask):
    """A task that predicts the next token."""

    packing: bool
    eval_batch_size: int

    @property
    @abstractmethod
    def longest(self) -> int:
        """The maximum number of tokens in a sequence."""

    @abstractmethod
    def encode(self, rows: Any, tokenizer: Any) -> Examples:
        """Encodes rows as sequences, and marks the tokens that are learnt."""


class PreparedNextToken(PreparedTokenized):
    """Rows as token sequences, with a mask of the learnt tokens, and the decoder that they are for.

    Args:
        names: empty; tokens are not classes.
        data: a data set per split; rows that give no example are left out.
        lacking: the reason why a row gives no example.
        cut_to: the setting that truncates rows, with its value; empty if none does.

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
        data: Data,
        lacking: str,
        cut_to: str = "",
    ) -> None:
        self._examples, self._packing = {}, settings.packing
        self._notes: tuple[str, ...] = ()
        left: dict[Split, Any] = {}
        for name, rows in data.items():
            found = self._examples[name] = settings.encode(rows, tokenizer)
            total, kept = len(rows), len(found.kept)
            if not kept:
                raise DataError(
                    f"all {total} {name} rows have {lacking}, so nothing can be learnt: correct the columns"
                )
            left[name] = rows if kept == total else rows.select(found.kept)
            if kept < total:
                self._notes += (f"{total - kept} of {total} {name} rows have {lacking} and are left out",)
            if found.num_cut:
                self._notes += (f"{found.num_cut} of {total} {name} rows were cut to {cut_to}",)
        super().__init__(settings, model, tokenizer, names, left)

    def embeddings(self, split: Split, device: torch.device) -> NDArray[np.float32]:
        alone = copy.copy(self)
        alone._packing = False  # an example's hidden state must come from its own tokens
        return embed(alone, split, device)

    @property
    def sequences(self) -> list[Ragged]:
        return [examples.tokens for examples in self._examples.values()]

    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """See ``Prepared.load_model``; the head is whatever the checkpoint lacks, usually nothing.

        Raises:
            ConfigError: the model does not exist, reads fewer tokens, or sees the tokens that it should predict.
        """
        longest = self.longest()
        loaded, head = load_pretrained(
            self.auto_class, self._model, seed, device, fresh_head=False, longest=longest, compute=compute
        )
        if not _is_causal(loaded, device):
            raise ConfigError(
                f"{self._model.path!r} sees the tokens that it is to predict, as encoders such as BERT do, so it would "
                "learn to copy: set model.path to a decoder, such as gpt2 or a Llama"
            )
        return loaded, head

    def host_batch(self, rows: Positions, split: Split) -> Batch:
        """See ``PreparedTokenized.host_batch``: all sequences of the examples, padded to the longest on the right.

        ``input_ids``, ``attention_mask`` and ``labels`` are ``(sequences, width)`` int64 each; a label is at its
        token's position, or ``IGNORED`` if the token is not learnt.
        """
        examples = self._examples[split]
        return self._padded(examples, examples.sequences(rows), self._packing)

    def for_device(self, batch: Batch) -> Batch:
        learnt = (batch["labels"][:, 1:] != tokens_out.IGNORED).flatten().nonzero().flatten()
        # padding is on the right, where no token that counts sees it
        kept = {name: value for name, value in batch.items() if name != "attention_mask" or self.counts_mask}
        return kept | {LEARNT: learnt}

    def _padded(self, examples: Examples, chosen: Positions, packing: bool) -> Batch:
        tokens, learnt, limit = examples.tokens, examples.learnt, self.settings.longest
        if packing:
            bins = tokens_out.pack(tokens.lengths(chosen), limit)
            places = [chosen[numbers] for numbers in bins]
            tokens, learnt = (tokens_out.joined(one, places) for one in (tokens, learnt))
            chosen = np.arange(len(bins))
        batch = self.inputs(tokens, chosen, limit)
        ids = batch["input_ids"]
        batch["labels"] = torch.where(learnt.padded(chosen, ids.shape[1], 0) == 1, ids, tokens_out.IGNORED)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return tokens_out.mean_loss(model, batch)

    def num_terms(self, batch: Batch) -> int:
        """See ``Prepared.num_terms``: the learnt tokens."""
        return len(batch[LEARNT]) if LEARNT in batch else int((batch["labels"][:, 1:] != tokens_out.IGNORED).sum())

    def shares(self, rows: Positions, device: torch.device) -> Shares | None:
        """See ``Prepared.shares``; None with packing, where examples share a row."""
        if self._packing:
            return None
        examples = self._examples["train"]
        chosen = examples.sequences(rows)
        return shares_of(
            np.diff(examples.offsets)[rows], examples.num_learnt(chosen), examples.tokens.lengths(chosen), device
        )

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: token accuracy of the greedy next token, the mean loss per learnt token, and
        ``perplexity = exp(loss)``."""
        examples, size = self._examples[split], self.settings.eval_batch_size
        chosen = examples.sequences(rows)
        chosen = chosen[np.argsort(examples.tokens.lengths(chosen), kind="stable")]
        total, correct, count = 0.0, 0, 0
        said: set[int] = set()
        wanted: set[int] = set()
        for part in chunks(chosen, size):
            batch = self._padded(examples, part, False)
            if device.type != "cpu":
                batch = next(staged([self.for_device(batch)], device))
            logits, targets = tokens_out.target_logits(model, batch)
            found = logits.argmax(-1)
            total += float(tokens_out.summed_cross_entropy(logits, targets))
            correct += int((found == targets).sum())
            count += len(targets)
            if len(said) < 2 or len(wanted) < 2:
                said |= set(found.tolist())
                wanted |= set(targets.tolist())
        loss = total / count
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
        same = len(said) == 1 < len(wanted)
        warnings = ("the model predicts the same token everywhere: it has learnt nothing useful",) if same else ()
        metrics = {"accuracy": correct / count, "loss": loss, "perplexity": perplexity}
        return Evaluation(metrics, warnings + self._notes)


def _is_causal(model: nn.Module, device: torch.device) -> bool:
    """Whether later tokens have no effect on earlier outputs."""
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=device)
    with torch.no_grad(), mixed(model, device):
        one, other = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :3].float()
    return torch.allclose(one, other, atol=1e-3, rtol=1e-2)

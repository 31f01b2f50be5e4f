"""Language modelling: the next token of plain texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from fedlora.component import STRICT
from fedlora.errors import DataError
from fedlora.tasks import generation
from fedlora.tasks.base import Model, Prepared, Split, Task
from fedlora.tasks.columns import Splits, check_rows, check_texts, fingerprint, rename, split, values_of
from fedlora.tasks.embeddings import embed
from fedlora.tasks.encoded import cached
from fedlora.tasks.loading import load_tokenizer, quiet_transformers
from fedlora.tasks.next_token import PreparedNextToken
from fedlora.tasks.sources import Source, read_rows
from fedlora.tasks.tokens_out import Examples


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CausalLM(Task):
    """The next token of a text: ``-log p(token | tokens before it)``, the mean over tokens.

    Column: ``text``. A text is cut into blocks; a block begins with the last token of the one before, so every token
    of a text but its first is predicted exactly once. ``block_size = 25`` is FLASC's setting for Reddit
    (arXiv 2406.05233), and its metric is token accuracy, the main one here.

    Args:
        block_size: tokens of a block at most.
        end_of_text: whether the tokenizer's end token, if it has one, is put after each text and learnt.
        packing: whether the sequences of a batch are joined into full blocks, which spares padding; attention then
            crosses from one text to the next. Evaluations never pack.
        eval_batch_size: blocks in an evaluation batch; they are sorted by length.
        max_new_tokens: tokens of a continuation at most, for predictions.
    """

    kind: Literal["causal_lm"] = "causal_lm"
    block_size: Annotated[int, Field(ge=2)] = 128
    end_of_text: bool = True
    packing: bool = False
    eval_batch_size: Annotated[int, Field(ge=1)] = 32
    max_new_tokens: Annotated[int, Field(ge=1)] = 64

    def prepare(self, model: Model, source: Source) -> Prepared:
        """See ``Task.prepare``: reads the data, tokenises once, keeps the tokens on disk.

        Raises:
            DataError: the data cannot be read.
            ConfigError: the model cannot be read.
        """
        splits = self.read(source)
        return PreparedLanguage(self, model, load_tokenizer(model), {"train": splits.train, "test": splits.test})

    def read(self, source: Source) -> Splits:
        """Training and test rows.

        Raises:
            DataError: the data cannot be read, or have no texts.
        """
        raw = source.load()
        for rows, which in ((raw.train, "training"), (raw.test, "test")):
            if rows is not None:
                check_rows(rows, ["text"], which)
                check_texts(rows, ["text"], which)
        return split(raw, "text")

    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        return PreparedLanguage(self, model, load_tokenizer(model), {})


class PreparedLanguage(PreparedNextToken):
    """Texts as blocks of tokens, and the model they are for.

    Args:
        settings: the task.
        model: which model.
        tokenizer: its tokenizer.
        data: a data set per split, with the column ``text`` and any others; texts of fewer than two tokens are left
            out.

    Raises:
        DataError: no text is left.
    """

    def __init__(self, settings: CausalLM, model: Model, tokenizer: Any, data: Mapping[Split, Any]) -> None:
        examples = {name: _encode(rows, tokenizer, settings) for name, rows in data.items()}
        super().__init__(
            model,
            tokenizer,
            data,
            examples,
            longest=settings.block_size,
            eval_batch_size=settings.eval_batch_size,
            packing=settings.packing,
            lacking="fewer than two tokens",
        )
        self.settings = settings

    def texts(self, split: Split) -> list[str]:
        return values_of(self._data[split], "text")

    def embeddings(self, split: Split, device: torch.device) -> NDArray[np.float32]:
        alone = dataclasses.replace(self.settings, packing=False)
        return embed(PreparedLanguage(alone, self._model, self.tokenizer, self._data), split, device)

    def with_rows(self, path: Path, columns: Mapping[str, str], split: Split = "test") -> Prepared:
        rows = rename(read_rows(str(path)), columns, str(path))
        check_rows(rows, ["text"], str(path))
        check_texts(rows, ["text"], str(path))
        return PreparedLanguage(self.settings, self._model, self.tokenizer, {split: rows})

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: ``{"continuation": text}``, the likeliest next token again and again."""
        prompts = [generation.without_end(tokens, self.tokenizer) for tokens in _tokenise(self.tokenizer, inputs)]
        empty = [text for text, tokens in zip(inputs, prompts, strict=True) if not tokens]
        if empty:
            raise DataError(f"the text {empty[0]!r} has no tokens to continue from: give one word at least")
        settings = self.settings
        found = generation.generate(
            model, self.tokenizer, prompts, settings.max_new_tokens, settings.eval_batch_size, device
        )
        return [{"continuation": self._after(prompt, new)} for prompt, new in zip(prompts, found, strict=True)]

    def _after(self, prompt: list[int], new: list[int]) -> str:
        # decoded alone, the first word would lose the space before it
        before, both = (str(self.tokenizer.decode(one, skip_special_tokens=True)) for one in (prompt, prompt + new))
        return both.removeprefix(before)


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    with quiet_transformers():  # texts may be longer than the model reads: they are cut later
        return [list(tokens) for tokens in tokenizer(texts)["input_ids"]]


def _encode(rows: Any, tokenizer: Any, settings: CausalLM) -> Examples:
    end = tokenizer.eos_token_id if settings.end_of_text else None

    def blocks(tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        tokens = tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
        step = settings.block_size - 1
        parts = [tokens[first : first + step + 1] for first in range(0, max(1, len(tokens) - 1), step)]
        return [(part, [1] * len(part)) for part in parts]

    def make() -> dict[str, NDArray[Any]]:
        return Examples.of([blocks(tokens) for tokens in _tokenise(tokenizer, values_of(rows, "text"))]).arrays()

    key = {"task": "causal_lm", "block_size": settings.block_size, "end": end}
    return Examples.read(cached(tokenizer, fingerprint(rows, ["text"]), key, make))

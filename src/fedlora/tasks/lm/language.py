"""Language modelling: the next token of plain texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora.core.component import MODEL_CONFIG, Count, Field, dataclass
from fedlora.core.errors import DataError
from fedlora.tasks.base import Data, Model, Prepared, Split
from fedlora.tasks.data.columns import check_rows, check_texts, fingerprint, values_of
from fedlora.tasks.lm import generation
from fedlora.tasks.lm.next_token import NextTokenTask, PreparedNextToken
from fedlora.tasks.lm.tokens_out import Examples
from fedlora.tasks.models.encoded import cached
from fedlora.tasks.models.loading import quiet_transformers


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class CausalLM(NextTokenTask):
    """Predicts the next token of a text: ``-log p(token | tokens before it)``, averaged over tokens.

    Column: ``text``. A text is cut into blocks that overlap by one token, so every token of a text except the first
    is predicted exactly once. ``block_size = 25`` is FLASC's setting for Reddit (arXiv 2406.05233), and its
    metric is token accuracy, the main one here.

    Args:
        block_size: maximum number of tokens in a block.
        end_of_text: whether the tokenizer's end token, if it has one, is appended to each text and learnt.
        packing: whether the sequences of a batch are joined into full blocks, which saves padding; attention then
            crosses text boundaries. Evaluations never pack.
        eval_batch_size: blocks per evaluation batch; they are sorted by length.
        max_new_tokens: maximum number of tokens in a continuation, for predictions.
    """

    kind: Literal["causal_lm"] = "causal_lm"
    block_size: Annotated[int, Field(ge=2)] = 128
    end_of_text: bool = True
    packing: bool = False
    eval_batch_size: Count = 32
    max_new_tokens: Count = 64

    @property
    def longest(self) -> int:
        return self.block_size

    def known(self, rows: Any, names: list[str], which: str) -> Any:
        check_rows(rows, ["text"], which)
        check_texts(rows, ["text"], which)
        return rows

    def over(self, model: Model, tokenizer: Any, names: list[str], data: Data) -> Prepared:
        return PreparedLanguage(self, model, tokenizer, names, data, lacking="fewer than two tokens")

    def encode(self, rows: Any, tokenizer: Any) -> Examples:
        end = tokenizer.eos_token_id if self.end_of_text else None

        def blocks(tokens: list[int]) -> list[tuple[list[int], list[int]]]:
            tokens = tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
            step = self.block_size - 1
            parts = [tokens[first : first + step + 1] for first in range(0, max(1, len(tokens) - 1), step)]
            return [(part, [1] * len(part)) for part in parts]

        def make() -> dict[str, NDArray[Any]]:
            return Examples.of([blocks(tokens) for tokens in _tokenise(tokenizer, values_of(rows, "text"))]).arrays()

        key = {"task": "causal_lm", "block_size": self.block_size, "end": end}
        return Examples.read(cached(tokenizer, fingerprint(rows, ["text"]), key, make))


class PreparedLanguage(PreparedNextToken):
    """Texts as blocks of tokens, and the model they are for; texts of fewer than two tokens are left out."""

    settings: CausalLM

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"text"})

    def texts(self, split: Split) -> list[str]:
        return values_of(self._data[split], "text")

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: ``{"continuation": text}``, generated greedily."""
        prompts = [generation.without_end(tokens, self.tokenizer) for tokens in _tokenise(self.tokenizer, inputs)]
        empty = [text for text, tokens in zip(inputs, prompts, strict=True) if not tokens]
        if empty:
            raise DataError(f"the text {empty[0]!r} has no tokens to continue from: give one word at least")
        settings = self.settings
        self.check_ids(np.array([token for prompt in prompts for token in prompt]))
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

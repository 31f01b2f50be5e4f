"""Instruction tuning: the answer to a prompt, or the assistant's turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora.core.component import MODEL_CONFIG, Count, Field, Whole, dataclass
from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks.base import Data, Evaluation, Model, Positions, Prepared, Split
from fedlora.tasks.data.columns import check_rows, check_texts, fingerprint, values_of
from fedlora.tasks.lm import generation
from fedlora.tasks.lm.answers import check_pattern, extract
from fedlora.tasks.lm.chat import Learn, Message, check_chat, encode_chat, read_messages, render, up_to_last_answer
from fedlora.tasks.lm.next_token import NextTokenTask, PreparedNextToken
from fedlora.tasks.lm.tokens_out import Examples
from fedlora.tasks.models.encoded import cached
from fedlora.tasks.models.loading import quiet_transformers


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Instruction(NextTokenTask):
    """Predicts the answer to a prompt: ``-log p(token | tokens before it)``, averaged over answer tokens only.

    Columns: ``prompt`` and ``answer``; or with ``template = "chat"`` also ``messages``, lists of
    ``{"role": ..., "content": ...}``. The end token after an answer is learnt with it.

    Args:
        template: the text before an answer, containing ``{prompt}``; or ``chat`` for the tokenizer's chat template.
            Prompt and answer are tokenised separately, so that training and generation see the same prompt tokens; a
            template should end in a line break rather than a space, which many tokenizers join to a word.
        learn: for ``messages``, whether ``all`` of the assistant's turns are learnt or only the ``last``.
        max_length: maximum number of tokens in an example. Longer ones lose prompt tokens from the left (a leading
            beginning-of-text token stays), and then, if necessary, the end of the answer.
        packing: whether the examples of a batch are joined up to ``max_length``, which saves padding; attention then
            crosses example boundaries. Evaluations never pack.
        eval_batch_size: examples per evaluation batch; they are sorted by length.
        generate: number of evenly spaced test examples for which an evaluation generates answers; the main metric is
            then ``exact_match``, otherwise the token ``accuracy``.
        max_new_tokens: maximum number of tokens in a generated answer.
        answer_pattern: what must match: ``exact`` (the whole answer), ``gsm8k`` (the final number), or a regular
            expression with one group.

    Raises:
        ConfigError: ``template`` has no ``{prompt}``, or ``answer_pattern`` is invalid.
    """

    kind: Literal["instruction"] = "instruction"
    template: str = "Question: {prompt}\nAnswer:\n"
    learn: Learn = "all"
    max_length: Annotated[int, Field(ge=2)] = 512
    packing: bool = False
    eval_batch_size: Count = 16
    generate: Whole = 0
    max_new_tokens: Count = 256
    answer_pattern: str = "exact"

    def __post_init__(self) -> None:
        if not self.chat and "{prompt}" not in self.template:
            raise ConfigError(
                f"task.template = {self.template!r} has no place for the prompt: put {{prompt}} into it, or use chat"
            )
        check_pattern(self.answer_pattern)

    @property
    def chat(self) -> bool:
        """Whether the tokenizer's chat template is used."""
        return self.template == "chat"

    @property
    def longest(self) -> int:
        return self.max_length

    def content(self, rows: Any) -> str:
        return self.columns(rows)[0]

    def known(self, rows: Any, names: list[str], which: str) -> Any:
        """See ``TokenizedTask.known``.

        Raises:
            DataError: a column is missing, has gaps, or holds anything but text.
            ConfigError: there are conversations, but ``template`` is not ``chat``.
        """
        if not self.chat and "messages" in rows.column_names and "prompt" not in rows.column_names:
            raise ConfigError(
                f"the {which} rows have conversations in 'messages', which the tokenizer's chat template writes: set "
                'task.template = "chat"'
            )
        columns = self.columns(rows)
        check_rows(rows, columns, which)
        if columns != ["messages"]:
            check_texts(rows, columns, which)
        return rows

    def columns(self, rows: Any) -> list[str]:
        """The columns of ``rows`` that are read."""
        return ["messages"] if self.chat and "messages" in rows.column_names else ["prompt", "answer"]

    def over(self, model: Model, tokenizer: Any, names: list[str], data: Data) -> Prepared:
        return PreparedInstruction(self, model, tokenizer, names, data)

    def encode(self, rows: Any, tokenizer: Any) -> Examples:
        bos, size = tokenizer.bos_token_id, self.max_length

        def make() -> dict[str, NDArray[Any]]:
            if self.chat:
                found = encode_chat(tokenizer, _conversations(rows, self), self.learn)
            else:
                found = _pairs(rows, tokenizer, self.template)
            num_cut = sum(len(tokens) > size for tokens, _ in found)
            return Examples.of([[cut(tokens, learnt, size, bos)] for tokens, learnt in found], num_cut).arrays()

        key = {
            "task": "instruction",
            "template": self.template,
            "learn": self.learn,
            "max_length": size,
            "ends": [bos, tokenizer.eos_token_id],
            "chat": repr(tokenizer.chat_template) if self.chat else None,
        }
        return Examples.read(cached(tokenizer, fingerprint(rows, self.columns(rows)), key, make))


class PreparedInstruction(PreparedNextToken):
    """Prompts and answers as tokens, and the model they are for.

    Args:
        names: empty; answers are not classes.
        data: a data set per split, with the columns that the task reads and any others; rows without an answer are
            left out.

    Raises:
        DataError: no row has an answer, or no answer in the test rows matches ``answer_pattern``.
        ConfigError: a chat template is needed but the tokenizer has none.
    """

    settings: Instruction

    def __init__(self, settings: Instruction, model: Model, tokenizer: Any, names: list[str], data: Data) -> None:
        if settings.chat:
            check_chat(tokenizer, model.path)
        cut_to = f"max_length = {settings.max_length} tokens"
        super().__init__(settings, model, tokenizer, names, data, lacking="no answer to learn", cut_to=cut_to)
        self.main_metric = "exact_match" if settings.generate else "accuracy"
        if settings.generate and "test" in data:
            self._check_answers()

    def texts(self, split: Split) -> list[str]:
        """See ``Prepared.texts``: the prompts, or all turns of conversations."""
        rows = self._data[split]
        if self.settings.columns(rows) == ["prompt", "answer"]:
            return values_of(rows, "prompt")
        return ["\n".join(message["content"] for message in one) for one in _conversations(rows, self.settings)]

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: next-token metrics over answers, and ``exact_match`` if requested."""
        found = super().evaluate(model, rows, split, device)
        if not (wanted := min(self.settings.generate, len(rows))):
            return found
        places = np.linspace(0, len(rows) - 1, wanted).round().astype(np.int64)
        matches = self._exact_match(model, rows[places], split, device)
        return found._replace(metrics={"exact_match": matches, **found.metrics})

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: ``{"answer": text}``.

        An input is a prompt, or with ``template = "chat"`` also JSON with ``messages``.
        """
        prompts = []
        for number, text in enumerate(inputs):
            messages = _given_messages(text, f"input {number}") if self.settings.chat else None
            prompts.append(self._prompt_tokens(text if messages is None else messages, f"input {number}"))
        return [{"answer": answer} for answer in self._answer(model, prompts, device)]

    def inputs_of(self, rows: Any, which: str) -> list[str]:
        """See ``Prepared.inputs_of``: the column ``prompt``, or conversations in ``messages``."""
        (name, *_) = self.settings.columns(rows)
        check_rows(rows, [name], which)
        if name == "messages":
            return [json.dumps({"messages": value}) for value in values_of(rows, name)]
        check_texts(rows, [name], which)
        return values_of(rows, name)

    def _prompt_tokens(self, prompt: str | Sequence[Message], where: str) -> list[int]:
        if self.settings.chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = render(self.tokenizer, messages, where, answer_next=True)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            (tokens,) = _template_tokens(self.tokenizer, self.settings.template, [str(prompt)])
        return generation.cut_left(tokens, self.settings.max_length, self.tokenizer.bos_token_id)

    def _answer(self, model: nn.Module, prompts: list[list[int]], device: torch.device) -> list[str]:
        found = generation.generate(
            model, self.tokenizer, prompts, self.settings.max_new_tokens, self.settings.eval_batch_size, device
        )
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]

    def _exact_match(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> float:
        chosen, pattern = self._data[split].select(rows), self.settings.answer_pattern
        prompts, wanted = self._asked(chosen)
        tokens = [self._prompt_tokens(prompt, f"{split} row {row}") for prompt, row in zip(prompts, rows, strict=True)]
        matches = [
            answer is not None and answer == extract(pattern, reference)
            for answer, reference in zip(
                (extract(pattern, text) for text in self._answer(model, tokens, device)), wanted, strict=True
            )
        ]
        return float(np.mean(matches))

    def _asked(self, rows: Any) -> tuple[list[Any], list[str]]:
        """The prompts of ``rows``, as text or messages, and the expected answers."""
        if self.settings.columns(rows) == ["prompt", "answer"]:
            return values_of(rows, "prompt"), values_of(rows, "answer")
        conversations = _conversations(rows, self.settings)
        return [one[:-1] for one in conversations], [one[-1]["content"] for one in conversations]

    def _check_answers(self) -> None:
        pattern, (_, wanted) = self.settings.answer_pattern, self._asked(self._data["test"])
        blind = sum(extract(pattern, answer) is None for answer in wanted)
        if blind == len(wanted):
            raise DataError(
                f"task.answer_pattern = {pattern!r} finds nothing in any of the {blind} test answers, so no answer "
                "could ever match: give a pattern that fits them"
            )
        if blind:
            self._notes += (
                f"answer_pattern finds nothing in {blind} of {len(wanted)} test answers, which count as wrong",
            )


def _given_messages(text: str, where: str) -> list[Message] | None:
    """The conversation given as JSON in an input, or None if the input is a prompt."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return read_messages(value["messages"], where) if isinstance(value, dict) and "messages" in value else None


def _conversations(rows: Any, settings: Instruction) -> list[list[Message]]:
    if settings.columns(rows) == ["messages"]:
        found = enumerate(values_of(rows, "messages"))
        return [up_to_last_answer(read_messages(value, f"row {number}")) for number, value in found]
    pairs = zip(values_of(rows, "prompt"), values_of(rows, "answer"), strict=True)
    return [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in pairs]


def _template_tokens(tokenizer: Any, template: str, prompts: list[str]) -> list[list[int]]:
    with quiet_transformers():
        found = tokenizer([template.replace("{prompt}", prompt) for prompt in prompts])["input_ids"]
    return [generation.without_end(tokens, tokenizer) for tokens in found]


def _pairs(rows: Any, tokenizer: Any, template: str) -> list[tuple[list[int], list[int]]]:
    answers = values_of(rows, "answer")
    with quiet_transformers():
        encoded = tokenizer(answers, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    result = []
    for asked, text, tokens in zip(
        _template_tokens(tokenizer, template, values_of(rows, "prompt")), answers, encoded, strict=True
    ):
        answer = [*tokens, *end]
        result.append((asked + answer, [0] * len(asked) + [int(bool(text.strip()))] * len(answer)))
    return result


def cut(tokens: list[int], learnt: list[int], size: int, bos: int | None) -> tuple[list[int], list[int]]:
    """Truncates an example to ``size`` tokens, first from the left of what precedes the last answer.

    Args:
        tokens: the example.
        learnt: ones where a token is learnt.
        size: number of tokens to keep; one token before the last answer always stays, as does a leading ``bos``.
        bos: the beginning-of-text token.

    >>> cut([1, 5, 6, 7, 8], [0, 0, 0, 1, 1], 4, bos=1)
    ([1, 6, 7, 8], [0, 0, 1, 1])
    >>> cut([5, 6, 7, 8], [0, 0, 1, 1], 2, bos=1)
    ([6, 7], [0, 1])
    """
    last = max((place for place, one in enumerate(learnt) if one), default=0)
    first = last
    while first and learnt[first - 1]:
        first -= 1
    head = int(tokens[:1] == [bos])
    drop = max(0, min(len(tokens) - size, first - max(head, 1)))
    kept, marks = (one[:head] + one[head + drop :][: size - head] for one in (tokens, learnt))
    return kept, marks

"""Instruction tuning: the answer to a prompt, or the assistant's turns of a conversation."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora.core.component import MODEL_CONFIG, Count, Field, Whole, dataclass
from fedlora.core.errors import DataError
from fedlora.tasks.base import Data, Evaluation, Model, Positions, Prepared, Split
from fedlora.tasks.data.columns import check_rows, check_texts, fingerprint, values_of
from fedlora.tasks.lm import generation
from fedlora.tasks.lm.answers import check_pattern, extract
from fedlora.tasks.lm.chat import (
    Conversation,
    Learn,
    chat_notes,
    check_chat,
    clock_notes,
    encode_chat,
    render,
    up_to_last_answer,
)
from fedlora.tasks.lm.forms import check_asked, standard
from fedlora.tasks.lm.next_token import NextTokenTask, PreparedNextToken
from fedlora.tasks.lm.template import columns_of, filled
from fedlora.tasks.lm.tokens_out import Examples
from fedlora.tasks.lm.turns import parsed, read_messages, read_tools
from fedlora.tasks.models.encoded import cached
from fedlora.tasks.models.loading import quiet_transformers


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Instruction(NextTokenTask):
    """Predicts the answer to a prompt: ``-log p(token | tokens before it)``, averaged over answer tokens only.

    Columns: ``prompt`` and ``answer``; or with ``template = "chat"`` also ``messages``, lists of
    ``{"role": ..., "content": ...}``, and optionally ``tools``. Those of Alpaca, ShareGPT and TRL are read as these,
    see ``forms.standard``. The end token after an answer is learnt with it.

    Args:
        template: the text before an answer, containing ``{prompt}`` or other columns in braces, ``{{`` and ``}}`` for
            braces that are text; or ``chat`` for the tokenizer's chat template.
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
        ConfigError: ``template`` names no column or has other braces, or ``answer_pattern`` is invalid.
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
        if not self.chat:
            columns_of(self.template)
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

    @property
    def asks(self) -> list[str]:
        """The columns that a prompt is made of."""
        return ["prompt"] if self.chat else columns_of(self.template)

    def known(self, rows: Any, names: list[str], which: str) -> Any:
        """See ``TokenizedTask.known``.

        Raises:
            DataError: a column is missing, has gaps, or holds anything but text; or a row is no conversation.
            ConfigError: there are conversations, but ``template`` is not ``chat``.
        """
        rows = self.asked(rows, which)
        if self.columns(rows)[0] == "messages":
            _conversations(rows, self, f" of the {which} rows")
        else:
            check_rows(rows, ["answer"], which)
            check_texts(rows, ["answer"], which)
        return rows

    def asked(self, rows: Any, which: str) -> Any:
        """Rows with the columns that prompts or conversations are made of, which are checked.

        Raises:
            DataError, ConfigError: as for ``known``.
        """
        rows = standard(rows, self.asks)
        if self.columns(rows)[0] == "messages":
            check_rows(rows, ["messages"], which)
        else:
            check_asked(rows, self.asks, which)
        return rows

    def columns(self, rows: Any) -> list[str]:
        """The columns of ``rows`` that are read."""
        if self.chat and "messages" in rows.column_names:
            return [name for name in ("messages", "tools") if name in rows.column_names]
        return [*self.asks, "answer"]

    def over(self, model: Model, tokenizer: Any, names: list[str], data: Data) -> Prepared:
        return PreparedInstruction(self, model, tokenizer, names, data)

    def encode(self, rows: Any, tokenizer: Any) -> Examples:
        bos, size = tokenizer.bos_token_id, self.max_length

        def make() -> dict[str, NDArray[Any]]:
            if self.chat:
                found = encode_chat(tokenizer, _conversations(rows, self), self.learn)
            else:
                found = _pairs(rows, tokenizer, self)
            num_cut = sum(len(tokens) > size for tokens, _ in found)
            return Examples.of([[cut(tokens, learnt, size, bos)] for tokens, learnt in found], num_cut).arrays()

        key = {
            "task": "instruction",
            "form": 3,  # what the cache holds of older versions learns turns of weight 0, or has the day it was made on
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
        lacking = "no answer to train on" + (" (blank, or marked with weight 0)" if settings.chat else "")
        super().__init__(settings, model, tokenizer, names, data, lacking=lacking, cut_to=cut_to)
        self.main_metric = "exact_match" if settings.generate else "accuracy"
        if settings.generate and "test" in data:
            self._check_answers()

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(name for rows in self.data.values() for name in self.settings.columns(rows))

    @property
    def notes(self) -> tuple[str, ...]:
        """See ``Prepared.notes``: values that a template lacks, and what a chat template has no place for."""
        found: list[str] = []
        conversations: list[Conversation] = []
        for split, rows in self.data.items():
            if self.settings.columns(rows)[0] == "messages":
                conversations += _conversations(rows, self.settings)
                continue
            for name in self.settings.asks:
                count = sum(value is None for value in values_of(rows, name))
                if count:
                    found.append(
                        f"column '{name}' has no value in {count} of {len(rows)} {split} rows, where the template's "
                        f"{{{name}}} is left empty"
                    )
        found += clock_notes(self.tokenizer) if self.settings.chat else []
        return (*found, *(chat_notes(self.tokenizer, conversations) if conversations else ()))

    def texts(self, split: Split) -> list[str]:
        """See ``Prepared.texts``: the prompts, or all turns of conversations."""
        rows, settings = self._data[split], self.settings
        if settings.columns(rows)[0] == "messages":
            conversations = _conversations(rows, settings)
            return ["\n".join(message["content"] for message in one.messages) for one in conversations]
        return values_of(rows, "prompt") if settings.asks == ["prompt"] else _prompts(rows, settings)

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
        prompts = [self._given(text, f"input {number}") for number, text in enumerate(inputs)]
        return [{"answer": answer} for answer in self._answer(model, prompts, device)]

    def inputs_of(self, rows: Any, which: str) -> list[str]:
        """See ``Prepared.inputs_of``: prompts, or JSON with ``messages`` or with the columns of the template."""
        rows = self.settings.asked(rows, which)
        names = [name for name in self.settings.columns(rows) if name != "answer"]
        if names == ["prompt"]:
            return values_of(rows, "prompt")
        columns = [values_of(rows, name) for name in names]
        return [json.dumps(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

    def _given(self, text: str, where: str) -> list[int]:
        """The tokens of the prompt that an input is."""
        settings = self.settings
        value = _object(text)
        if settings.chat and value is not None and "messages" in value:
            given = Conversation(read_messages(value["messages"], where), read_tools(value.get("tools")))
            return self._prompt_tokens(given, where)
        if settings.chat or settings.asks == ["prompt"]:
            return self._prompt_tokens(
                _asking(text) if settings.chat else filled(settings.template, {"prompt": text}), where
            )
        if value is None and len(settings.asks) == 1:
            value = {settings.asks[0]: text}
        lacking = settings.asks if value is None else [name for name in settings.asks if name not in value]
        if value is None or lacking:
            raise DataError(
                f"{where} lacks {', '.join(lacking)} of the template: give JSON such as "
                f"{json.dumps(dict.fromkeys(settings.asks, '...'))}"
            )
        row = {name: _shown(value[name]) for name in settings.asks}
        return self._prompt_tokens(filled(settings.template, row), where)

    def _prompt_tokens(self, prompt: str | Conversation, where: str) -> list[int]:
        """The tokens of a prompt: a filled template, or a conversation that the assistant is to go on with."""
        if isinstance(prompt, str):
            (tokens,) = _template_tokens(self.tokenizer, [prompt])
        else:
            text = render(self.tokenizer, prompt, where, answer_next=True)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return generation.cut_left(tokens, self.settings.max_length, self.tokenizer.bos_token_id)

    def _answer(self, model: nn.Module, prompts: list[list[int]], device: torch.device) -> list[str]:
        self.check_ids(np.array([token for prompt in prompts for token in prompt]))
        found = generation.generate(
            model, self.tokenizer, prompts, self.settings.max_new_tokens, self.settings.eval_batch_size, device
        )
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]

    def _exact_match(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> float:
        chosen, pattern = self._data[split].select(rows), self.settings.answer_pattern
        prompts, wanted = self._prompts_and_answers(chosen)
        tokens = [self._prompt_tokens(prompt, f"{split} row {row}") for prompt, row in zip(prompts, rows, strict=True)]
        matches = [
            answer is not None and answer == extract(pattern, reference)
            for answer, reference in zip(
                (extract(pattern, text) for text in self._answer(model, tokens, device)), wanted, strict=True
            )
        ]
        return float(np.mean(matches))

    def _prompts_and_answers(self, rows: Any) -> tuple[list[Any], list[str]]:
        """The prompts of ``rows``, as text or conversations, and the expected answers."""
        if not self.settings.chat:
            return _prompts(rows, self.settings), values_of(rows, "answer")
        found = _conversations(rows, self.settings)
        asked = [one._replace(messages=one.messages[:-1]) for one in found]
        return asked, [one.messages[-1]["content"] for one in found]

    def _check_answers(self) -> None:
        pattern, (_, wanted) = self.settings.answer_pattern, self._prompts_and_answers(self._data["test"])
        blind = sum(extract(pattern, answer) is None for answer in wanted)
        if blind == len(wanted):
            raise DataError(
                f"task.answer_pattern = {pattern!r} finds nothing in any of the {blind} test answers, so no "
                "answer can match: give a pattern that fits them"
            )
        if blind:
            self._notes += (
                f"answer_pattern finds nothing in {blind} of {len(wanted)} test answers, which count as wrong",
            )


def _object(text: str) -> dict[str, Any] | None:
    """The object given as JSON in an input, or None if the input is a prompt."""
    value = parsed(text)
    return value if isinstance(value, dict) else None


def _asking(prompt: str) -> Conversation:
    return Conversation([{"role": "user", "content": prompt}])


def _conversations(rows: Any, settings: Instruction, whose: str = "") -> list[Conversation]:
    if settings.columns(rows)[0] != "messages":
        pairs = zip(values_of(rows, "prompt"), values_of(rows, "answer"), strict=True)
        return [Conversation([*_asking(one).messages, {"role": "assistant", "content": two}]) for one, two in pairs]
    values = values_of(rows, "messages")
    tools = values_of(rows, "tools") if "tools" in rows.column_names else [None] * len(values)
    found = enumerate(zip(values, tools, strict=True))
    return [
        Conversation(up_to_last_answer(read_messages(value, f"row {number}{whose}")), read_tools(tool))
        for number, (value, tool) in found
    ]


def _prompts(rows: Any, settings: Instruction) -> list[str]:
    """The template filled from each row."""
    columns = [map(_shown, values_of(rows, name)) for name in settings.asks]
    return [filled(settings.template, dict(zip(settings.asks, row, strict=True))) for row in zip(*columns, strict=True)]


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _template_tokens(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    with quiet_transformers():
        found = tokenizer(prompts)["input_ids"]
    return [generation.without_end(tokens, tokenizer) for tokens in found]


def _pairs(rows: Any, tokenizer: Any, settings: Instruction) -> list[tuple[list[int], list[int]]]:
    answers = values_of(rows, "answer")
    with quiet_transformers():
        encoded = tokenizer(answers, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    result = []
    for asked, text, tokens in zip(
        _template_tokens(tokenizer, _prompts(rows, settings)), answers, encoded, strict=True
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

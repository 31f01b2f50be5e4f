"""Conversations rendered by a tokenizer's chat template, with the assistant's tokens marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks.models.loading import quiet_transformers

Message = dict[str, Any]
Learn = Literal["all", "last"]
"""Which of the assistant's turns are used for training."""


def check_chat(tokenizer: Any, path: str) -> None:
    """Refuses a tokenizer that cannot write conversations.

    Args:
        tokenizer: the tokenizer.
        path: its model's path, for the message.

    Raises:
        ConfigError: it has no chat template, or does not report the positions of tokens in the text.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f'the tokenizer of {path!r} has no chat template, which task.template = "chat" needs: name a model that '
            "was tuned for conversations, or give columns 'prompt' and 'answer' and a template with {prompt}"
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f'the tokenizer of {path!r} does not map its tokens to characters of a text, which task.template = "chat" '
            "needs: name a model with a tokenizer.json"
        )


def read_messages(value: Any, where: str) -> list[Message]:
    """Reads a conversation; entries of a turn that are None are left out.

    Args:
        value: a list of ``{"role": ..., "content": ...}``; each of them, or all together, may be JSON text.
        where: its origin, for messages.

    Raises:
        DataError: the value is anything else.
    """
    found = _parsed(value)
    messages = [_parsed(one) for one in found] if isinstance(found, list) else []
    good = bool(messages) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not good:
        raise DataError(
            f'{where} is not a conversation: \'messages\' should be a list of {{"role": ..., "content": ...}}, '
            "both text"
        )
    return [{name: entry for name, entry in one.items() if entry is not None} for one in messages]


def up_to_last_answer(messages: Sequence[Message]) -> list[Message]:
    """A conversation up to the assistant's last turn; all of it if there is none."""
    turns = _answers(messages)
    return list(messages[: turns[-1] + 1] if turns else messages)


def render(tokenizer: Any, messages: Sequence[Message], where: str, answer_next: bool) -> str:
    """A conversation as text.

    Args:
        tokenizer: has a chat template.
        messages: the conversation.
        where: whose it is, for messages.
        answer_next: whether the text ends where the assistant is to begin.

    Raises:
        DataError: the template refuses the conversation.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next)
    except TemplateError as error:
        raise DataError(
            f"the model's chat template refuses {where} ({error}): give the turns that it requires"
        ) from error
    return text


def encode_chat(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], learn: Learn
) -> list[tuple[list[int], list[int]]]:
    """Conversations as tokens, with a mask of the learnt ones: from the start of an assistant's turn to its end.

    If the template has no end token in the last turn, one is appended and learnt. Blank turns are not learnt.

    Args:
        tokenizer: has a chat template.
        conversations: each ends in an assistant's turn, unless it has none.
        learn: all turns of the assistant, or the last one.

    Returns:
        For each conversation, its tokens and a mask of ones and zeros of the same length.

    Raises:
        DataError: the template refuses a conversation, or renders its beginning differently once it is continued.
    """
    texts, spans = [], []
    for number, messages in enumerate(conversations):
        text, found = _spans(tokenizer, messages, learn, f"row {number}")
        texts.append(text)
        spans.append(found)
    with quiet_transformers():
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    result = []
    for tokens, places, found in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        learnt = [int(any(first < end and last > start for start, end in found)) for first, last in places]
        tail = (
            tokens[-1:]
            if not found
            else [t for t, (_, last) in zip(tokens, places, strict=True) if last > found[-1][0]]
        )
        end = tokenizer.eos_token_id
        if found and end is not None and end not in tail:
            tokens, learnt = [*tokens, end], [*learnt, 1]
        result.append((list(tokens), learnt))
    return result


def _spans(tokenizer: Any, messages: Sequence[Message], learn: Learn, where: str) -> tuple[str, list[tuple[int, int]]]:
    text = render(tokenizer, messages, where, answer_next=False)
    turns = _answers(messages)
    spans = []
    for turn in turns[-1:] if learn == "last" else turns:
        if not messages[turn]["content"].strip():
            continue
        before = render(tokenizer, messages[:turn], where, answer_next=True) if turn else ""
        after = render(tokenizer, messages[: turn + 1], where, answer_next=False) if turn < len(messages) - 1 else text
        if not (text.startswith(before) and text.startswith(after)):
            mend = 'set task.learn = "last"' if turn < turns[-1] else "use columns 'prompt' and 'answer' and a template"
            raise DataError(
                f"the model's chat template renders the start of {where} differently once turn {turn} is added, "
                f"so its answer cannot be located: {mend}"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _answers(messages: Sequence[Message]) -> list[int]:
    return [number for number, one in enumerate(messages) if one["role"] == "assistant"]


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value

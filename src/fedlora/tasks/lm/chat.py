"""Conversations rendered by a tokenizer's chat template, with the assistant's tokens marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

from jinja2.exceptions import TemplateError

from fedlora.core.errors import ConfigError, DataError, first_line
from fedlora.tasks.lm.tools import fitted, has_place, names_role, with_text_arguments
from fedlora.tasks.lm.turns import LEARNT, Message
from fedlora.tasks.models.loading import quiet_transformers

Learn = Literal["all", "last"]
"""Which of the assistant's turns are used for training."""
DAY = datetime(2024, 7, 26)
"""What a chat template that reads the clock takes for now; Llama's write this day where there is no clock."""
_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")


def check_chat(tokenizer: Any, path: str) -> None:
    """Refuses a tokenizer that cannot write conversations.

    Args:
        tokenizer: the tokenizer.
        path: its model's path, for the message.

    Raises:
        ConfigError: it has no chat template, or one that reads the clock in a form that it computes, or does not report
            the positions of tokens in the text.
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
    templates = tokenizer.chat_template
    named = templates.values() if isinstance(templates, dict) else [templates]
    if any("strftime_now(" in _dated(template) for template in named):
        raise ConfigError(
            f"the chat template of {path!r} reads the clock in a form that it computes, so that a run would have other "
            "tokens on another day: write the form into the template as text, or the day"
        )


class Conversation(NamedTuple):
    """A conversation.

    Args:
        messages: from ``read_messages``.
        tools: the tools that the assistant may call, as ``transformers`` describes them; None if not given.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None


_READ = {"role", "content", "tool_calls", "tool_call_id", "id", LEARNT}


def chat_notes(tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    """Sentences about what a chat template has no place for, and how it is written instead."""
    template, total = tokenizer.chat_template, len(conversations)
    calls = sum(any("tool_calls" in turn for turn in one.messages) for one in conversations)
    tools = sum(any(turn["role"] == "tool" for turn in one.messages) for one in conversations)
    given = sum(bool(one.tools) for one in conversations)
    notes = []
    if calls and not has_place(template):
        notes.append(
            f"{calls} of {total} rows call tools, for which the chat template has no place: calls are written as text, "
            "<tool_call> around JSON"
        )
    if tools and not names_role(template, "tool"):
        notes.append(
            f"{tools} of {total} rows have answers of tools, for which the chat template has no place: they are "
            "written as turns of the user, <tool_response> around the text"
        )
    if given and "tools" not in str(template).replace("tool_calls", ""):
        notes.append(
            f"{given} of {total} rows describe tools, which the chat template leaves out: put them into the turn of "
            "the system"
        )
    turns = [turn for one in conversations for turn in one.messages if turn["role"] != "tool"]  # those have names
    if unread := {key for turn in turns for key in turn.keys() - _READ if key not in str(template)}:
        notes.append(f"turns have {', '.join(map(repr, sorted(unread)))}, which the chat template leaves out")
    marks = [token for token in tokenizer.all_special_tokens if len(token) > 2]
    marked = sum(any(mark in turn["content"] for turn in one.messages for mark in marks) for one in conversations)
    if marked:
        notes.append(
            f"{marked} of {total} rows have special tokens of the tokenizer in the text of a turn, which the model "
            "reads as such: remove them if they are text"
        )
    return notes


def clock_notes(tokenizer: Any) -> list[str]:
    """A sentence if a chat template writes the day, which would give other tokens on every one."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return []
    return [f"the chat template writes the day: {DAY:%Y-%m-%d} is written on every day, so that runs can be repeated"]


def _dated(template: str) -> str:
    """A chat template with ``DAY`` in place of what the clock says."""
    return _CLOCK.sub(lambda found: repr(DAY.strftime(found["form"])), template)


def up_to_last_answer(messages: Sequence[Message]) -> list[Message]:
    """A conversation up to the assistant's last turn that is learnt; all of it if there is none."""
    turns = _answers(messages)
    return list(messages[: turns[-1] + 1] if turns else messages)


def render(tokenizer: Any, conversation: Conversation, where: str, answer_next: bool) -> str:
    """A conversation as text.

    Args:
        tokenizer: has a chat template.
        conversation: the conversation.
        where: whose it is, for messages.
        answer_next: whether the text ends where the assistant is to begin.

    Raises:
        DataError: the template refuses the conversation.
    """
    own = [{key: value for key, value in one.items() if key != LEARNT} for one in conversation.messages]
    messages = fitted(tokenizer.chat_template, own)

    def applied(given: list[Message]) -> str:
        template = _dated(tokenizer.get_chat_template(tools=conversation.tools))
        text: str = tokenizer.apply_chat_template(
            given, tools=conversation.tools, chat_template=template, tokenize=False, add_generation_prompt=answer_next
        )
        return text

    try:
        try:
            return applied(messages)
        except TypeError:
            return applied(with_text_arguments(messages))
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(dict.fromkeys(one["role"] for one in messages))
        raise DataError(
            f"the model's chat template refuses {where} ({first_line(error)}), which has the roles {roles}: give the "
            "turns that it asks for"
        ) from error


def encode_chat(
    tokenizer: Any, conversations: Sequence[Conversation], learn: Learn
) -> list[tuple[list[int], list[int]]]:
    """Conversations as tokens, with a mask of the learnt ones: from the start of an assistant's turn to its end.

    If the template has no end token in the last turn, one is appended and learnt. Blank turns are not learnt, nor those
    that are marked so.

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
    for number, conversation in enumerate(conversations):
        text, found = _spans(tokenizer, conversation, learn, f"row {number}")
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


def _spans(tokenizer: Any, conversation: Conversation, learn: Learn, where: str) -> tuple[str, list[tuple[int, int]]]:
    messages = conversation.messages
    text = render(tokenizer, conversation, where, answer_next=False)
    turns = _answers(messages)

    def part(count: int, answer_next: bool) -> str:
        return render(tokenizer, conversation._replace(messages=messages[:count]), where, answer_next)

    spans = []
    for turn in turns[-1:] if learn == "last" else turns:
        if not messages[turn]["content"].strip() and "tool_calls" not in messages[turn]:
            continue
        before = part(turn, answer_next=True) if turn else ""
        after = part(turn + 1, answer_next=False) if turn < len(messages) - 1 else text
        if not (text.startswith(before) and text.startswith(after)):
            mend = 'set task.learn = "last"' if turn < turns[-1] else "use columns 'prompt' and 'answer' and a template"
            raise DataError(
                f"the model's chat template renders the start of {where} differently once turn {turn} is added, "
                f"so its answer cannot be located: {mend}"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _answers(messages: Sequence[Message]) -> list[int]:
    """The assistant's turns that are learnt."""
    return [number for number, one in enumerate(messages) if one["role"] == "assistant" and LEARNT not in one]

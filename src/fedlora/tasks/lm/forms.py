"""Columns of instruction data under the names that are read: those of Alpaca, ShareGPT and TRL."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from fedlora.core.errors import ConfigError, DataError, shown
from fedlora.tasks.data.columns import check_rows, check_texts, values_of
from fedlora.tasks.lm.turns import parsed

_ANSWERS = ("completion", "output", "response")
_BESIDE = ("input", "context")


def standard(rows: Any, wanted: Collection[str]) -> Any:
    """Rows with the columns ``messages``, or ``prompt`` and ``answer``, made of those of known forms.

    ``conversations`` becomes ``messages``, with a column ``system`` as its first turn. ``prompt`` and ``completion`` as
    lists of messages become one conversation of which the completion is learnt. ``completion``, ``output`` or
    ``response`` becomes ``answer``; ``instruction``, with ``input`` or ``context`` on a line below where a row has it,
    becomes ``prompt``. Columns that are there under their own names, or that a template names, stay.

    Args:
        rows: a ``datasets.Dataset``.
        wanted: the columns that are read by name.
    """
    names = {*rows.column_names}
    free = names - {*wanted}
    if "conversations" in free and "messages" not in names:
        return _with_system(rows)
    answer = next((name for name in _ANSWERS if name in free), None)
    if answer and "answer" not in names:
        rows = rows.rename_column(answer, "answer")
    if "prompt" in names and "messages" not in names and _is_chat(rows, "prompt"):
        return _joined(rows)
    if "instruction" in free and "prompt" in {*wanted} - names:
        rows = _with_prompt(rows, next((name for name in _BESIDE if name in free), None))
    return rows


def check_asked(rows: Any, asks: Sequence[str], which: str) -> None:
    """Refuses rows without the columns that prompts are made of.

    The column ``prompt``, or else the first one, has no gaps; others may have some.

    Args:
        rows: from ``standard``.
        asks: the columns.
        which: what the rows are, for messages.

    Raises:
        DataError: a column is missing, has gaps, or holds lists.
        ConfigError: the rows are conversations.
    """
    if "messages" in rows.column_names and "prompt" in asks and "prompt" not in rows.column_names:
        raise ConfigError(
            f"the {which} rows have conversations in 'messages', which the tokenizer's chat template writes: set "
            'task.template = "chat"'
        )
    for name in asks:
        if name not in (*rows.column_names, "prompt"):
            raise DataError(
                f"task.template has {{{name}}}, but the {which} rows have no such column, only "
                f"{', '.join(rows.column_names)}: correct it, or write {{{{{name}}}}} for braces that are text"
            )
    check_rows(rows, ["prompt" if "prompt" in asks else asks[0]], which)
    for name in asks:
        wrong = next((one for one in values_of(rows, name) if isinstance(one, list | dict)), None)
        if wrong is not None:
            raise DataError(
                f"column '{name}' of the {which} rows holds {shown(wrong)}, but a template takes text or numbers: name "
                "another column"
            )
    check_texts(rows, ["prompt"] if "prompt" in asks else [], which)


def _with_prompt(rows: Any, beside: str | None) -> Any:
    asked = values_of(rows, "instruction")
    others = values_of(rows, beside) if beside else [None] * len(asked)
    prompts = [
        one if one is None or other is None or not str(other).strip() else f"{one}\n{other}"
        for one, other in zip(asked, others, strict=True)
    ]
    return rows.add_column("prompt", prompts).remove_columns([name for name in ("instruction", beside) if name])


def _with_system(rows: Any) -> Any:
    """``conversations`` as ``messages``, the column ``system`` as the first turn of each that has none."""
    if "system" not in rows.column_names:
        return rows.rename_column("conversations", "messages")
    found = []
    for value, system in zip(values_of(rows, "conversations"), values_of(rows, "system"), strict=True):
        turns = parsed(value)
        has = not isinstance(turns, list) or any("system" in (_role(one) or "") for one in turns[:1])
        first = [] if has or not isinstance(system, str) or not system.strip() else [_system(system)]
        found.append(json.dumps([*first, *turns] if first else turns))
    return rows.add_column("messages", found).remove_columns(["conversations", "system"])


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _role(turn: Any) -> str | None:
    turn = parsed(turn)
    return str(turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None


def _is_chat(rows: Any, name: str) -> bool:
    """Whether a column holds lists of messages."""
    first = next((value for value in values_of(rows, name) if value is not None), None)
    turns = parsed(first)
    return isinstance(turns, list) and bool(turns) and _role(turns[0]) not in (None, "None")


def _joined(rows: Any) -> Any:
    """Prompts and answers that are messages as one conversation of each row."""
    answers = values_of(rows, "answer") if "answer" in rows.column_names else [[]] * len(rows)
    found = []
    for row, (asked, answered) in enumerate(zip(values_of(rows, "prompt"), answers, strict=True)):
        turns, last = parsed(asked), parsed(answered)
        last = [{"role": "assistant", "content": last}] if isinstance(last, str) else last
        if not isinstance(turns, list) or not isinstance(last, list):
            raise DataError(
                f"row {row} has a prompt and an answer of which one is not a list of messages, as in other rows: "
                "use one form in all rows"
            )
        found.append(json.dumps([*({**parsed(one), "weight": 0} for one in turns), *last]))
    left = [name for name in ("prompt", "answer") if name in rows.column_names]
    return rows.add_column("messages", found).remove_columns(left)

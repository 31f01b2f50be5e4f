"""Turns of conversations in the forms that data have: OpenAI's messages, ShareGPT's, and parts of content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedlora.core.errors import DataError, shown

Message = dict[str, Any]
LEARNT = "fedlora: learnt"
"""The entry of an assistant's turn that is not learnt; its value is False."""

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""What roles stand for: ShareGPT's and OpenAI's names, and those of templates."""

_NAMES = (("role", "content"), ("from", "value"))
_FORM = 'a list of {"role": ..., "content": ...} or of {"from": ..., "value": ...}'
_PARTS = ("text", "input_text", "output_text")


def read_messages(value: Any, where: str) -> list[Message]:
    """Reads a conversation; entries that are None are left out.

    Args:
        value: a list of ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``; each of them, or all
            together, may be JSON text.
        where: its origin, for messages.

    Returns:
        Messages with ``role`` and ``content`` as text; ``tool_calls`` in the form of ``transformers``, arguments as
        objects; ``LEARNT`` where the assistant's turn has ``weight`` 0 or ``train`` false.

    Raises:
        DataError: the value is anything else.
    """
    found = parsed(value)
    if isinstance(found, dict) and found and all(isinstance(one, list) for one in found.values()):
        # a table of turns, as `datasets` has lists of objects
        found = [dict(zip(found, one, strict=True)) for one in zip(*found.values(), strict=False)]
    turns = [parsed(one) for one in found] if isinstance(found, list) else []
    if not turns or not all(isinstance(one, dict) for one in turns):
        raise DataError(
            f"{where} is not a conversation: 'messages' should be {_FORM}, but it is {shown(found)}: correct the row"
        )
    named = [(one, _entries(one, f"turn {number} of {where}")) for number, one in enumerate(turns)]
    unknown = [one for one in dict.fromkeys(one[names[0]] for one, names in named) if one not in ROLES]
    if unknown:
        raise DataError(
            f"{where} has the roles {', '.join(dict.fromkeys(one[names[0]] for one, names in named))}, but "
            f"{', '.join(unknown)} is none that is read ({', '.join(ROLES)}): rename it in the data"
        )
    return [_turn(_without_none(one), names, f"turn {number} of {where}") for number, (one, names) in enumerate(named)]


def read_tools(value: Any) -> list[Any] | None:
    """The tools that a row describes, as a list or JSON text; None if it has none."""
    found = _without_none(parsed(value))
    return [parsed(one) for one in found] if isinstance(found, list) and found else None


def parsed(value: Any) -> Any:
    """JSON text as its value; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _entries(turn: Mapping[str, Any], where: str) -> tuple[str, str]:
    """What the entries with a turn's role and its content are called."""
    for names in _NAMES:
        if isinstance(turn.get(names[0]), str):
            return names
    raise DataError(
        f"{where} has no role as text, only {', '.join(turn) or 'nothing'}: a conversation should be {_FORM}, so "
        "correct or remove the row"
    )


def _turn(turn: Mapping[str, Any], names: tuple[str, str], where: str) -> Message:
    role, content = (turn.get(name) for name in names)
    rest = {key: one for key, one in turn.items() if key not in (*names, "weight", "train", "function_call")}
    role = ROLES[str(role)]
    calls = turn.get("tool_calls")
    if "function_call" in turn:
        calls = [turn["function_call"]]
    elif role == "function_call":
        calls, content = parsed(_text(content, where)), None
        calls = calls if isinstance(calls, list) else [calls]
    is_answer = role in ("assistant", "function_call")
    if calls and is_answer:
        rest["tool_calls"] = [_call(one, where) for one in calls]
        content = "" if content is None else content
    elif "tool_calls" in rest:
        del rest["tool_calls"]
    if content is None:
        raise DataError(f"{where} ({role}) has no content and calls no tool: give it one, or remove the row")
    message = {"role": "assistant" if is_answer else role, "content": _text(content, where), **rest}
    return {**message, LEARNT: False} if is_answer and not _is_learnt(turn, where) else message


def _text(content: Any, where: str) -> str:
    """Content as text: as it is, or joined from its parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise DataError(
            f"{where} has the content {shown(content)}, but it should be text or a list of parts with text: correct it"
        )
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind in _PARTS and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            return str(part["refusal"])
        part = {"type": kind}
    raise DataError(f"{where} has the part {shown(part)}, but only text is read: remove the row, or its other parts")


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``."""
    call = parsed(call)
    own = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("name"), str):
        raise DataError(
            f"{where} calls a tool by {shown(call)}, but a call should be an object with name and arguments: correct it"
        )
    arguments = parsed(own.get("arguments", own.get("parameters", {})))
    beside = {key: one for key, one in call.items() if key in ("id", "index")}
    return {**beside, "type": "function", "function": {"name": own["name"], "arguments": arguments}}


def _is_learnt(turn: Mapping[str, Any], where: str) -> bool:
    for name in ("weight", "train"):
        mark = turn.get(name, 1)
        if mark not in (0, 1):
            raise DataError(
                f"{where} has {name} {shown(mark)}, but a turn is learnt (1) or not (0): use one of the two"
            )
        if not mark:
            return False
    return True


def _without_none(value: Any) -> Any:
    """A value without the entries that are None: a table has the keys of all rows in each."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value

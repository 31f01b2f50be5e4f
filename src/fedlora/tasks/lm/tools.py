"""Roles and tools in conversations: by the chat template, or as text where it has no place for them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fedlora.tasks.lm.turns import Message


def fitted(template: object, messages: Sequence[Message]) -> list[Message]:
    """Messages with the roles and entries that a chat template has a place for.

    A ``developer`` is a ``system`` where the template does not name it. Without ``tool_calls`` in the template, calls
    are text at the end of the turn, ``<tool_call>`` around a JSON object each; without ``tool``, what tools return is
    ``<tool_response>`` in a turn of the user, consecutive ones in the same turn.

    Args:
        template: the chat template's source.
        messages: from ``read_messages``.
    """
    developer = "developer" if names_role(template, "developer") else "system"
    has_calls, has_tool = has_place(template), names_role(template, "tool")
    result: list[Message] = []
    follows = False
    for one in messages:
        message = dict(one)
        if message["role"] == "developer":
            message["role"] = developer
        if "tool_calls" in message and not has_calls:
            calls = "\n".join(_tagged("tool_call", json.dumps(call["function"])) for call in message.pop("tool_calls"))
            message["content"] = "\n".join(filter(None, (message["content"], calls)))
        is_tool = message["role"] == "tool" and not has_tool
        if is_tool:
            response = _tagged("tool_response", message["content"])
            if follows:
                result[-1]["content"] += f"\n{response}"
                continue
            message = {"role": "user", "content": response}
        follows = is_tool
        result.append(message)
    return result


def has_place(template: object) -> bool:
    """Whether a chat template writes the calls of tools."""
    return "tool_calls" in str(template)


def names_role(template: object, role: str) -> bool:
    """Whether a chat template names a role."""
    return re.search(rf"""['"]{role}['"]""", str(template)) is not None


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Messages with the arguments of calls as JSON text, for templates that join them to text."""
    return [_with_text(one) if "tool_calls" in one else one for one in messages]


def _with_text(message: Message) -> Message:
    calls: list[dict[str, Any]] = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": json.dumps(function["arguments"])}})
    return {**message, "tool_calls": calls}


def _tagged(name: str, text: str) -> str:
    return f"<{name}>\n{text}\n</{name}>"

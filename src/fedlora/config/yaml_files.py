"""YAML as configurations are written in it: the values of TOML, read by the rules of YAML 1.2."""

from __future__ import annotations

import functools
import re
from typing import Any

from fedlora.core.errors import ConfigError
from fedlora.core.later import yaml

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""What is no text in YAML 1.2 (core schema, 10.3.2), and the characters that it begins with."""


def yaml_values(text: str) -> dict[str, Any]:
    """The content of a YAML document.

    ``no`` and ``on`` are texts, ``1e-3`` is a number and ``012`` is twelve, as in YAML 1.2 and unlike what most readers
    of YAML 1.1 do.

    Args:
        text: the document.

    Raises:
        ConfigError: it is not YAML, or has what TOML has not: a key twice, keys that are no text, values that are
            absent, or aliases. The message is the end of a sentence on the file.
    """
    try:
        values = yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{error.problem or error.context}{place}") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(error).split("\n")[0]) from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"it holds a {type(values).__name__}, but keys with values were expected")
    return values or {}


@functools.cache
def _loader() -> Any:
    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                event = self.peek_event()
                _refuse(f"the alias *{event.anchor} is not read: write the value again, or use extends", event)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name, value in node.value:
                key = self.construct_object(name, deep=True)
                if not isinstance(key, str):
                    _refuse(f"the key {name.value!r} is not text: put it in quotes", name)
                if key in found:
                    _refuse(f"the key {key!r} is there twice: leave one of them out", name)
                found[key] = self.construct_object(value, deep=True)
                if found[key] is None:
                    _refuse(f"the key {key!r} has no value: give it one, or leave it out", value)
            return found

        def construct_yaml_map(self, node: Any) -> Any:
            yield self.construct_mapping(node)

        def construct_yaml_int(self, node: Any) -> int:
            text = str(node.value)
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

        def construct_yaml_float(self, node: Any) -> float:
            return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))

    for kind, (pattern, begins) in _SCALARS.items():
        tag = f"tag:yaml.org,2002:{kind}"
        Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), [*begins, *([""] if kind == "null" else [])])
    for kind in ("map", "int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", getattr(Loader, f"construct_yaml_{kind}"))
    return Loader


def _refuse(problem: str, place: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)

"""The settings of a slot's values: types, permitted values, defaults, and a description of each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from fedlora.config.json_schema import Generator
from fedlora.core.docs import arguments
from fedlora.methods.arguments import argument_text

_ABSENT = (dataclasses.MISSING, inspect.Parameter.empty)
_BOUNDS = {
    "minimum": "{} or more",
    "exclusiveMinimum": "above {}",
    "maximum": "{} at most",
    "exclusiveMaximum": "below {}",
}
_NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "object": "table"}


@dataclass(frozen=True)
class Setting:
    """A setting of a component, or an argument of a method.

    Args:
        name: its key.
        type: its type, in words.
        required: whether it has no default.
        default: as a TOML or JSON value; None if it is absent or the setting is required.
        text: its description.
    """

    name: str
    type: str
    required: bool
    default: Any
    text: str

    @property
    def default_text(self) -> str:
        """The default as TOML, with tables reduced to the keys that differ from their own defaults."""
        return "required" if self.required else "" if self.default is None else _toml(self.default)


def settings_of(name: str, value: Any) -> list[Setting]:
    """The settings of a component or method; empty for values without TOML settings, such as an engine.

    Args:
        name: its name in its slot.
        value: its class or function.
    """
    if dataclasses.is_dataclass(value):
        defaults = {
            field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for field in dataclasses.fields(value)
        }
        texts = arguments(value)
    elif inspect.isfunction(value):
        defaults = {key: parameter.default for key, parameter in inspect.signature(value).parameters.items()}
        texts = {key: argument_text(name, key) for key in defaults}
    else:
        return []
    schema = TypeAdapter(value).json_schema(schema_generator=Generator)
    words = functools.partial(type_text, definitions=schema.get("$defs", {}))
    return [
        Setting(
            name=key,
            type=words(schema["properties"][key]),
            required=any(default is one for one in _ABSENT),
            default=None if any(default is one for one in _ABSENT) else _short(default),
            text=texts.get(key, ""),
        )
        for key, default in defaults.items()
        if key != "kind"
    ]


def type_text(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A type in words, such as ``integer, 1 or more``, from its JSON Schema.

    Args:
        schema: the schema produced by ``Generator``.
        definitions: the definitions it references.
    """
    words = functools.partial(type_text, definitions=definitions)
    if "$ref" in schema:
        keys = [*definitions[schema["$ref"].rsplit("/", 1)[-1]].get("properties", {})]
        return f"table of {', '.join(keys[:6] + ['...'] * (len(keys) > 6))}"
    if "oneOf" in schema:
        kinds = [definitions[one["$ref"].rsplit("/", 1)[-1]]["properties"]["kind"]["const"] for one in schema["oneOf"]]
        return f"table with kind {_either(kinds)}"
    if "anyOf" in schema:
        forms = [words(one) for one in schema["anyOf"]]
        # every slot accepts user-defined classes, which need not be repeated each time
        return _either(dict.fromkeys(form for form in forms if form != "table" or len(forms) == 1))
    if "enum" in schema or "const" in schema:
        return _either(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {words(schema.get('items', {}))}"
    bounds = [form.format(f"{schema[key]:g}") for key, form in _BOUNDS.items() if key in schema]
    return ", ".join([_NAMES.get(schema.get("type", ""), "any value"), " and ".join(bounds)]).rstrip(", ")


def _either(words: Any) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else str(last)


def _short(value: Any) -> Any:
    """A value in TOML form; components are reduced to their kind and the settings that differ from their defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
        return {name: _short(own) for name, (own, default) in parts.items() if name == "kind" or own != default}
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {_toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)

"""The JSON Schema of configurations, which editors use for completion and validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from fedlora.config.experiment import Experiment
from fedlora.core.docs import arguments, first_sentence
from fedlora.methods import METHODS
from fedlora.methods.arguments import argument_text
from fedlora.recipe import Recipe

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The draft with the widest support among TOML editors; nothing here needs a newer one."""
_ANY_CLASS: dict[str, Any] = {
    "type": "object",
    "required": ["kind"],
    "properties": {"kind": {"type": "string", "pattern": "^[\\w.]+:[\\w.]+$"}},
    "description": "A class of your own, as package.module:Class.",
}
_EXTENDS: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "A file that this one extends, relative to it; or several, of which later ones have precedence.",
}
_PREFIX = "#/$defs/"
_PARTIAL = ".partial"
"""Suffix of the definitions of tables that override a method's own settings key by key."""


class Generator(GenerateJsonSchema):
    """Pydantic's schema generator, without constructs that TOML lacks, and with descriptions from docstrings."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Adds the descriptions of the class and of each field from the docstring."""
        result = super().dataclass_schema(schema)
        texts = arguments(schema["cls"])
        for name, field in result.get("properties", {}).items():
            if name in texts:
                field["description"] = texts[name]
        return {**result, "description": first_sentence(schema["cls"])}

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        """A table that names its kind, or a user-defined class."""
        known = super().tagged_union_schema(schema)
        return {"anyOf": [{"type": "object", "required": ["kind"], "oneOf": known["oneOf"]}, _ANY_CLASS]}

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """TOML has no null: optional values are omitted instead."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """The default, unless the default is to be absent."""
        result = super().default_schema(schema)
        return {key: _without_null(value) for key, value in result.items() if key != "default" or value is not None}

    def handle_invalid_for_json_schema(self, schema: core_schema.CoreSchema, error_info: str) -> JsonSchemaValue:
        """A type that exists only in Python accepts any value."""
        return {}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No titles: field names serve as titles."""
        return False

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Defaults that exist only in Python are omitted silently."""


def json_schema() -> dict[str, Any]:
    """The schema of a whole configuration: ``[method]`` with the keys of each method, or ``[[phases]]``."""
    # name in the schema -> the type described; pydantic shares the definitions among them
    of: dict[str, Any] = {"": Experiment, "recipe": Recipe, **METHODS}
    schemas, shared = TypeAdapter.json_schemas(
        [(name, "validation", TypeAdapter(one)) for name, one in of.items()], schema_generator=Generator
    )
    plain: dict[str, Any] = dict(shared["$defs"])
    found = {name: _looked_up(schema, plain) for (name, _), schema in schemas.items()}
    partial = {name + _PARTIAL: _partial(schema) for name, schema in plain.items()}
    methods = {f"method.{kind}": _method(kind, found[kind], found["recipe"]) for kind in METHODS}
    root = found[""]
    table = {
        "type": "object",
        "required": ["kind"],
        "oneOf": [{"$ref": _PREFIX + name} for name in methods],
        "description": "A method by name, its arguments, and any key of a recipe.",
    }
    whole = {
        "$schema": DIALECT,
        **root,
        "title": "fedlora configuration",
        "properties": {"extends": _EXTENDS, **root["properties"], "method": table},
        "not": {"required": ["method", "phases"]},
    }
    return {**whole, "$defs": _used(whole, plain | partial | methods)}


def _method(kind: str, own: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a method: the keys of a recipe, overridden by the method's own arguments."""
    properties: dict[str, Any] = {"kind": {"const": kind}, "preset": {"const": "paper"}}
    for name in [*own["properties"], *recipe["properties"]]:
        forms = [_partial(part["properties"][name]) for part in (own, recipe) if name in part["properties"]]
        defaults = {key: form.pop(key) for form in reversed(forms) for key in ("default", "description") if key in form}
        if name not in own["properties"]:
            defaults.pop("default", None)  # the default is the method's, set inside its function
        distinct = [form for number, form in enumerate(forms) if form not in forms[:number]]
        form = distinct[0] if len(distinct) == 1 else {"anyOf": distinct}
        properties[name] = {**form, **defaults, "description": argument_text(kind, name)}
    return {
        "type": "object",
        "description": first_sentence(METHODS[kind]),
        "properties": properties,
        "required": ["kind"],
        "additionalProperties": False,
    }


def _partial(schema: Any) -> Any:
    """A schema in which every key is optional, including ``kind``: a table without it overrides the existing value."""
    if isinstance(schema, list):
        return [_partial(one) for one in schema]
    if not isinstance(schema, Mapping) or schema == _ANY_CLASS:
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            result[key] = {name: _partial(one) for name, one in value.items()}
        elif key == "$ref":
            result[key] = value + _PARTIAL
        elif key == "oneOf":
            result["anyOf"] = _partial(value)
        elif key in ("items", "anyOf", "additionalProperties"):
            result[key] = _partial(value)
        elif key != "required":
            result[key] = value
    return result


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_null(one) for one in value]
    return value


def _looked_up(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return dict(definitions[reference.removeprefix(_PREFIX)] if reference else schema)


def _used(whole: Any, definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions that a schema references, directly or indirectly, sorted by name."""
    names: set[str] = set()
    left = [whole]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, Mapping):
            name = str(one.get("$ref", "")).removeprefix(_PREFIX)
            if name in definitions and name not in names:
                names.add(name)
                left.append(definitions[name])
            left += one.values()
    return {name: definitions[name] for name in sorted(names)}

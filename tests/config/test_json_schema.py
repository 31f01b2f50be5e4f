"""The JSON Schema of configurations agrees with what is read."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora import config
from fedlora.config.explain import fields_of
from fedlora.config.json_schema import json_schema
from fedlora.config.template import template
from fedlora.core.docs import arguments, first_sentence
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS
from fedlora.methods.arguments import argument_text
from fedlora.recipe import Recipe
from fedlora.show.describe import SLOTS

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def inner(value: Any) -> Iterator[dict[str, Any]]:
    """Every table in a schema."""
    if isinstance(value, dict):
        yield value
        for one in value.values():
            yield from inner(one)
    elif isinstance(value, list):
        for one in value:
            yield from inner(one)


def test_every_reference_is_defined_and_every_definition_is_used(schema: dict[str, Any]) -> None:
    named = {one["$ref"] for one in inner(schema) if isinstance(one.get("$ref"), str)}
    assert named == {f"#/$defs/{name}" for name in schema["$defs"]}
    assert all(" " not in name for name in named)
    # neither a value nor a type: TOML has none
    assert [word for word in (": null", ", null", '"null"') if word in json.dumps(schema)] == []


def test_the_top_has_every_key_and_the_method_every_argument(schema: dict[str, Any]) -> None:
    assert [*schema["properties"]] == ["extends", *fields_of(config.Experiment), "method"]
    forms = {name for one in schema["properties"]["method"]["oneOf"] for name in one.values()}
    assert forms == {f"#/$defs/method.{kind}" for kind in METHODS}
    for kind, function in METHODS.items():
        keys = schema["$defs"][f"method.{kind}"]["properties"]
        assert keys.keys() == {"kind", "preset", *inspect.signature(function).parameters, *fields_of(Recipe)}
        assert all(keys[name]["description"] for name in keys if name not in ("kind", "preset"))


def test_every_value_of_a_slot_is_known_by_its_kind(schema: dict[str, Any]) -> None:
    known = {
        one["properties"]["kind"].get("const")
        for one in schema["$defs"].values()
        if "kind" in one.get("properties", {})
    }
    values = {kind for slot, table in SLOTS.items() if slot not in ("engine", "track") for kind in table}
    assert known >= values


def test_every_argument_of_a_method_has_a_sentence() -> None:
    silent = [
        f"{kind}.{name}"
        for kind, function in METHODS.items()
        for name in inspect.signature(function).parameters
        if not argument_text(kind, name)
    ]
    assert silent == []


def test_arguments_are_read_from_docstrings() -> None:
    class Base:
        """A base.

        Args:
            a: first,
                 and on.
            b: replaced.
        """

    class Derived(Base):
        """One ``sentence``
        of two lines.

        Args:
            b: *second*: with a colon.

        Raises:
            Error: c: no argument.
        """

    assert first_sentence(Derived) == "One sentence of two lines."
    assert arguments(Derived) == {"a": "first, and on.", "b": "*second*: with a colon."}
    assert arguments(len) == {}


# ---- what it lets through

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda value, kind: isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)),
    "const": lambda value, only: bool(value == only),
    "enum": lambda value, all_: value in all_,
    "minimum": lambda value, limit: bool(value >= limit),
    "maximum": lambda value, limit: bool(value <= limit),
    "exclusiveMinimum": lambda value, limit: bool(value > limit),
    "exclusiveMaximum": lambda value, limit: bool(value < limit),
    "minItems": lambda value, least: len(value) >= least,
    "maxItems": lambda value, most: len(value) <= most,
    "minLength": lambda value, least: len(value) >= least,
    "pattern": lambda value, pattern: re.search(pattern, value) is not None,
    "required": lambda value, names: {*names} <= value.keys(),
}
REMARKS = {"$schema", "$defs", "title", "description", "default", "properties", "additionalProperties"}


def valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value is valid by the part of JSON Schema that is used here."""
    for word, rule in sorted(schema.items(), key=lambda pair: pair[0] != "type"):
        match word:
            case "$ref":
                good = valid(value, root["$defs"][rule.removeprefix("#/$defs/")], root)
            case "anyOf":
                good = any(valid(value, one, root) for one in rule)
            case "oneOf":
                good = sum(valid(value, one, root) for one in rule) == 1
            case "not":
                good = not valid(value, rule, root)
            case "items":
                good = all(valid(one, rule, root) for one in value)
            case _:
                assert word in CHECKS or word in REMARKS, word
                good = word in REMARKS or CHECKS[word](value, rule)
        if not good:
            return False
    named, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    parts = {name: named.get(name, {} if others is True else others) for name in value} if named or not others else {}
    return all(part is not False and valid(value[name], part, root) for name, part in parts.items())


GOOD = [
    "",
    "seed = 3",
    '[method]\nkind = "flasc"\nlocal = { epochs = 2 }\nserver = { lr = 0.1 }\ndown = { reference = "init" }\nup = 0.5',
    '[method]\nkind = "federa"\nup = { sparsify = { kind = "top_k", density = 0.25 } }\npreset = "paper"',
    '[[phases]]\nrounds = 3\nrecipe = { tuning = { kind = "lora", rank = 4 } }',
    '[task]\nkind = "my_package.tasks:Mine"\nanything = 3',
]
BAD = [
    "sed = 3",
    "seed = -1",
    '[method]\nkind = "flask"',
    "[method]\nrank = 3",
    '[method]\nkind = "lora"\nrnk = 3',
    '[method]\nkind = "lora"\nserver = { lrr = 0.1 }',
    '[method]\nkind = "full"\nrank = 3',
    '[data]\nkind = "files"',
    '[data]\npath = "x"',
    "[[phases]]\nrounds = 3\nrecipe = { tuning = { rank = 4 } }",
    '[[phases]]\nrounds = 3\n[method]\nkind = "lora"',
    "phases = []",
]


@pytest.mark.parametrize("kind", METHODS)
def test_templates_and_resolved_configurations_are_valid(schema: dict[str, Any], kind: str) -> None:
    document = tomllib.loads(template(kind))
    assert valid(document, schema, schema)
    resolved = json.loads(json.dumps(config.resolved(config.parse(document))))
    assert valid(resolved, schema, schema)


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name != "study.toml"], ids=lambda path: path.name)
def test_examples_are_valid(schema: dict[str, Any], path: Path) -> None:
    assert valid(tomllib.loads(path.read_text()), schema, schema)


@pytest.mark.parametrize("text", GOOD)
def test_what_may_be_written_is_valid(schema: dict[str, Any], text: str) -> None:
    assert valid(tomllib.loads(text), schema, schema)


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused_is_not_valid(schema: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse(tomllib.loads(text))
    assert not valid(tomllib.loads(text), schema, schema)

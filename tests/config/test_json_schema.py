"""The JSON Schema of configurations agrees with what is read."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Iterator
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
    assert [*schema["properties"]] == [*fields_of(config.Experiment), "method"]
    forms = {name for one in schema["properties"]["method"]["oneOf"] for name in one.values()}
    assert forms == {f"#/$defs/method.{kind}" for kind in METHODS}
    for kind, function in METHODS.items():
        keys = schema["$defs"][f"method.{kind}"]["properties"]
        assert keys.keys() == {"kind", "preset", *inspect.signature(function).parameters, *fields_of(Recipe)}
        assert all(keys[name]["description"] for name in keys if name not in ("kind", "preset"))


def test_every_value_of_a_slot_is_known_by_its_kind(schema: dict[str, Any]) -> None:
    known = {
        one["properties"]["kind"]["const"] for one in schema["$defs"].values() if "kind" in one.get("properties", {})
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


# ---- with a validator, where there is one

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


def validator(schema: dict[str, Any]) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("kind", METHODS)
def test_templates_and_resolved_configurations_are_valid(schema: dict[str, Any], kind: str) -> None:
    check = validator(schema)
    document = tomllib.loads(template(kind))
    assert list(check.iter_errors(document)) == []
    resolved = json.loads(json.dumps(config.resolved(config.parse(document))))
    assert list(check.iter_errors(resolved)) == []


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name != "study.toml"], ids=lambda path: path.name)
def test_examples_are_valid(schema: dict[str, Any], path: Path) -> None:
    assert list(validator(schema).iter_errors(tomllib.loads(path.read_text()))) == []


@pytest.mark.parametrize("text", GOOD)
def test_what_may_be_written_is_valid(schema: dict[str, Any], text: str) -> None:
    assert validator(schema).is_valid(tomllib.loads(text))


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused_is_not_valid(schema: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse(tomllib.loads(text))
    assert not validator(schema).is_valid(tomllib.loads(text))

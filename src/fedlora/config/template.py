"""The configuration template printed by ``fedlora new``."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import tomli_w

from fedlora.config.experiment import Experiment, parse, resolved
from fedlora.config.method_table import build_method, plain_values
from fedlora.core.docs import first_sentence
from fedlora.methods import METHODS
from fedlora.recipe import Phase, Recipe

_KEPT = ("model", "task", "data", "clients", "evaluate")
_NOTES = {
    "model": "a hub id, a local folder, or the embedded all-MiniLM-L6-v2",
    "task": "`fedlora list task` and docs/tasks.md",
    "data": "`fedlora list data`: docstrings, files (csv, tsv, json, jsonl, parquet, each also .gz), hub",
    "clients": "`fedlora list partition`; preview it with `fedlora partition run.toml`",
    "evaluate": "set num_examples to evaluate on a fixed subset between rounds",
}


def template(method: str) -> str:
    """A configuration of ``method`` with its arguments at their defaults, as TOML with comments.

    Raises:
        ConfigError: there is no such method.
    """
    phases = build_method({"kind": method})
    values = resolved(parse({"method": {"kind": method}}))
    lines = [
        "#:schema ./fedlora.schema.json",
        "# editors complete and check this file by the schema, once: fedlora schema > fedlora.schema.json",
        f"# {first_sentence(METHODS[method])}",
        "# fedlora run run.toml      trains, and resumes a stopped run",
        "# fedlora cost run.toml     estimates its communication",
        "",
        tomli_w.dumps({"label": method, "seed": Experiment().seed}),
    ]
    for table in _KEPT:
        lines += [f"# {_NOTES[table]}", tomli_w.dumps({table: values[table]})]
    table_of_method = {"kind": method, **_arguments(method, phases), **_slots(method, phases[-1].recipe)}
    lines += [
        "# the method: its own arguments, and the slots of its recipe (`fedlora list` lists the values of each)",
        tomli_w.dumps({"method": table_of_method}),
    ]
    return "\n".join(lines)


def _arguments(method: str, phases: tuple[Phase, ...]) -> dict[str, Any]:
    """The method's arguments; those derived from other arguments with their derived values."""
    follows = {"warm_rounds": phases[0].rounds}
    parameters = inspect.signature(METHODS[method]).parameters
    values = {name: plain_values(parameter.default) for name, parameter in parameters.items()}
    values |= {name: follows[name] for name, value in values.items() if value is None and name in follows}
    return {name: value for name, value in values.items() if value is not None}


def _slots(method: str, recipe: Recipe) -> dict[str, Any]:
    """The slots not determined by an argument of the method; tuning and links are covered by its own arguments."""
    own = inspect.signature(METHODS[method]).parameters
    untouched = Recipe()
    return {
        field.name: plain_values(value)
        for field in dataclasses.fields(Recipe)
        if field.name not in (*own, "tuning", "down", "up")
        and (value := getattr(recipe, field.name)) is not None
        and value == getattr(untouched, field.name)
    }

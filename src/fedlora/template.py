"""The configuration that ``fedlora new`` prints."""

from __future__ import annotations

import inspect
from typing import Any

import tomli_w
from pydantic import TypeAdapter

from fedlora.config import Experiment, build_method, parse, resolved
from fedlora.methods import METHODS

_KEPT = ("model", "task", "data", "clients", "evaluate")
_NOTES = {
    "model": "a hub id, a local folder, or the embedded all-MiniLM-L6-v2",
    "task": "`fedlora list task` and docs/tasks.md",
    "data": "`fedlora list data`: docstrings, files (csv, tsv, json, jsonl, parquet, each also .gz), hub",
    "clients": "`fedlora list partition`; see what it makes with `fedlora partition run.toml`",
    "evaluate": "set num_examples to evaluate on a fixed subset between rounds",
}


def template(method: str) -> str:
    """A configuration of ``method`` with its arguments at their defaults, as TOML with comments.

    Raises:
        ConfigError: there is no such method.
    """
    build_method(method, {})
    text = (inspect.getdoc(METHODS[method]) or "").split("\n")[0].replace("``", "")
    values = resolved(parse({"method": {"kind": method}}))
    lines = [
        f"# {text}",
        "# fedlora run run.toml      trains it and goes on if it was stopped",
        "# fedlora cost run.toml     tells its bytes before",
        "",
        tomli_w.dumps({"label": method, "seed": Experiment().seed}),
    ]
    for table in _KEPT:
        lines += [f"# {_NOTES[table]}", tomli_w.dumps({table: values[table]})]
    lines += ["# the method and its arguments", tomli_w.dumps({"method": {"kind": method, **_arguments(method)}})]
    return "\n".join(lines)


def _arguments(method: str) -> dict[str, Any]:
    arguments = {}
    for name, parameter in inspect.signature(METHODS[method]).parameters.items():
        value = TypeAdapter(Any).dump_python(parameter.default, mode="json", exclude_none=True)
        if value is not None:
            arguments[name] = value
    return arguments

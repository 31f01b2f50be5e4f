"""Reading configurations from files, with ``-s key.key=value`` overrides."""

from __future__ import annotations

import copy
import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.experiment import Experiment, parse
from fedlora.config.files import Document, naming, read
from fedlora.config.keys import TOP, check_key
from fedlora.config.places import carried, root_of
from fedlora.core.errors import ConfigError

_DEFAULT = Experiment()


def load(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment from a file.

    Args:
        path: a TOML file; a YAML file, by its ending ``.yaml`` or ``.yml``; or a run folder with a ``config.toml``. The
            key ``extends`` names files that the file extends, see ``config.files.read``.
        overrides: ``key.key=value`` each; the value is parsed as TOML, or taken as plain text if that fails.

    Raises:
        ConfigError: there is no such file, it is not valid, or it names something that does not exist.
    """
    document = read_configuration(path, overrides)
    with naming(document):
        return parse(document.values)


def document_of(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a file, or of a run folder's, with overrides applied; arguments as for ``load``.

    Raises:
        ConfigError: there is no such file, it is not valid, or an override is malformed.
    """
    return read_configuration(path, overrides).values


def read_configuration(path: Path | str, overrides: Sequence[str] = ()) -> Document:
    """``document_of``, with the files that its keys are from, except those that overrides set."""
    file = Path(path)
    file = file / "config.toml" if file.is_dir() else file
    if not file.exists():
        raise ConfigError(f"there is no file {file}; `fedlora new flasc > run.toml` writes one to start from")
    found = read(file, carried)
    document = found.values
    if "root" not in document and (root := root_of(document, file.parent)):
        document["root"] = root
    for assignment in overrides:
        override(document, assignment)
    given = {full for one in overrides for full in _routed(document, one.partition("=")[0].strip())}
    kept = {
        key: file for key, file in found.origins.items() if not any(f"{key}.".startswith(f"{one}.") for one in given)
    }
    return Document(document, kept)


def override(document: dict[str, Any], assignment: str) -> None:
    """Sets one value of a TOML document in place; keys as for ``assign``.

    Args:
        document: the parsed document, as from ``tomllib``.
        assignment: ``key.key=value``.

    Raises:
        ConfigError: it is not of that form, or an intermediate key is not a table.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"-s {assignment!r} is not of the form key.key=value")
    assign(document, path.strip(), toml_value(text))


def toml_value(text: str) -> Any:
    """A value parsed as TOML, or as plain text if that fails."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def assign(document: dict[str, Any], path: str, value: Any) -> None:
    """Sets one value of a TOML document in place.

    A key whose first part is not a key of ``Experiment`` belongs to the method: ``local.epochs`` means
    ``method.local.epochs``. If the document has phases instead, it is set in the recipe of every phase. A table missing
    from the document is created from the default at that place, if the default has the key: ``task.max_length`` refers
    to that of ``text_classification``.

    Args:
        document: the parsed document, as from ``tomllib``.
        path: the dotted key; entries of a list by their index.
        value: a TOML value.

    Raises:
        ConfigError: the key is unknown but resembles a known one, an intermediate key is not a table, or ``rounds`` is
            set for several phases at once.
    """
    for full in _routed(document, path):
        *parents, last = full.split(".")
        place: Any = document
        default: Any = _DEFAULT
        for key, below in zip(parents, full.split(".")[1:], strict=True):
            default = _default_below(default, key)
            if isinstance(place, list):
                place = place[_entry(path, key, place)]
            else:
                place = place.setdefault(key, _table(default, below))
            if not isinstance(place, dict | list):
                raise ConfigError(f"-s {path!r}: {key!r} is a value, not a table")
        place[_entry(path, last, place) if isinstance(place, list) else last] = copy.deepcopy(value)


def _routed(document: Mapping[str, Any], path: str) -> list[str]:
    """The full paths in the document that a key refers to."""
    check_key(path, document)
    phases = document.get("phases")
    if path.split(".")[0] in TOP:
        return [path]
    if "method" in document or not isinstance(phases, list):
        return [f"method.{path}"]
    if path != "rounds":
        return [f"phases.{number}.recipe.{path}" for number in range(len(phases))]
    if len(phases) > 1:
        raise ConfigError(
            f"'rounds' could be those of any of the {len(phases)} phases; name one, as in phases.0.rounds"
        )
    return ["phases.0.rounds"]


def _default_below(default: Any, key: str) -> Any:
    """The value under a key of a default value; None if there is none."""
    if isinstance(default, tuple):
        return default[0] if default else None
    return getattr(default, key, None) if dataclasses.is_dataclass(default) else None


def _table(default: Any, key: str) -> dict[str, Any]:
    """A new table for a key, with the default's kind if the default has the key."""
    names = [field.name for field in dataclasses.fields(default)] if dataclasses.is_dataclass(default) else []
    return {"kind": default.kind} if {"kind", key} <= {*names} else {}


def _entry(path: str, key: str, place: list[Any]) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(
            f"-s {path!r}: {key!r} should be the number of one of the {len(place)} entries there, from 0, as in "
            "phases.0.rounds"
        )
    return int(key)

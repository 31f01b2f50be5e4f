"""Configuration files, in TOML or YAML, that may extend others."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedlora.config.yaml_files import yaml_values
from fedlora.core.errors import ConfigError

EXTENDS = "extends"
"""The key that names the files that a file extends."""
_YAML = (".yaml", ".yml")
Carry = Callable[[dict[str, Any], Path, Path], dict[str, Any]]
"""Maps the values of a file in one folder to what they are in another: relative paths point to the same places."""


class Document(NamedTuple):
    """The values of a file and of those that it extends.

    Args:
        values: the merged values.
        origins: the file of each key, by dotted key; empty for a file that extends none.
    """

    values: dict[str, Any]
    origins: Mapping[str, Path]


def read(path: Path, carry: Carry = lambda values, source, target: values) -> Document:
    """The content of a TOML or YAML file, over the content of the files that it extends.

    ``extends`` is the name of a file, or a list of these of which later ones have precedence, relative to the file that
    says it. Tables are merged key by key, unless they have different kinds.

    Args:
        path: the file; YAML if its name ends in ``.yaml`` or ``.yml``, else TOML.
        carry: adapts the relative paths of a file in another folder.

    Raises:
        ConfigError: there is no such file, or it is not of that form, or files extend each other in a circle.
    """
    values, origins = _extended(path, carry, ())
    return Document(values, origins if len(set(origins.values())) > 1 else {})


@contextlib.contextmanager
def naming(document: Document) -> Iterator[None]:
    """Adds the file of a key to an error that names the key, if the document was read from several files."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        named = {key for key in document.origins if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w|\.(?!\d))", message)}
        if not named:
            raise
        key = min(named, key=message.index)
        raise ConfigError(f"{message} ({key} is in {document.origins[key]})") from error


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` overridden by ``over``; tables are merged recursively, unless that of ``over`` has a different kind."""
    found = dict(base)
    for key, value in over.items():
        held = found.get(key)
        if isinstance(value, Mapping) and isinstance(held, Mapping):
            alike = value.get("kind", held.get("kind")) == held.get("kind")
            found[key] = merged(held, value) if alike else dict(value)
        else:
            found[key] = value
    return found


def _extended(path: Path, carry: Carry, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The merged values of a file, and the file of each key; ``above`` are the files that led to it."""
    own = _values(path)
    names = own.pop(EXTENDS, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{path}: extends = {names!r}, but the name of a file was expected, or a list of names")
    values: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    chain = (*above, path)
    for name in names:
        base = path.parent / Path(name).expanduser()
        if not base.is_file():
            raise ConfigError(f"{path} extends {name!r}, but there is no file {base}: correct the name")
        if base.resolve() in [one.resolve() for one in chain]:
            circle = " extends ".join(map(str, (*chain, base)))
            raise ConfigError(f"{circle}, which is a circle: remove `extends` from one of them")
        found, places = _extended(base, carry, chain)
        values = merged(values, carry(found, base.parent, path.parent))
        origins |= places
    values = merged(values, own)
    origins |= dict.fromkeys(_leaves(own), path)
    return values, {key: origins[key] for key in _leaves(values)}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values that are no tables, and of empty tables."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _values(path: Path) -> dict[str, Any]:
    """The content of one file.

    Raises:
        ConfigError: there is no such file, or it is not of the form that its name says.
    """
    form = "YAML" if path.suffix.lower() in _YAML else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        return yaml_values(text) if form == "YAML" else tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not {form}: it is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}{_backslash(text, error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path} is not YAML that can be read: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{path} is not {form} that can be read: its lists or tables lie too deep in each other"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name an existing {form} file") from error


def _backslash(text: str, error: tomllib.TOMLDecodeError) -> str:
    """How to write a path with backslashes, if the line of an error may have one."""
    found = re.search(r"at line (\d+)", str(error))
    line = text.splitlines()[int(found[1]) - 1] if found and int(found[1]) <= len(text.splitlines()) else ""
    path = re.search(r'"([^"]*\\[^"]*)"', line)
    if not path:
        return ""
    return f"; in double quotes a backslash begins an escape: write '{path[1]}' in single quotes, or / for \\"

"""Where the relative paths of a configuration start: beside its file, or else in the working folder."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.tasks import Model
from fedlora.tasks.models.objects import IN_MEMORY

if TYPE_CHECKING:
    from fedlora.config.experiment import Experiment

_DATA = ("train", "test", "path")


def root_of(document: Mapping[str, Any], folder: Path) -> str | None:
    """The folder from which relative paths of a configuration start; None if it has none that exist.

    Args:
        document: the configuration as TOML values.
        folder: the folder of its file; the working folder is the second choice.
    """
    paths = [path for path in (_relative(table.get(name)) for table, name in _places(document)) if path]
    for root in (folder.absolute(), Path.cwd()):
        if any((root / path).exists() for path in paths):
            return str(root)
    return None


def carried(document: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """A configuration for a file in another folder: relative paths that exist beside the old file lead there still.

    Args:
        document: the configuration as TOML values.
        source: the folder of the old file.
        target: the folder of the new one.
    """
    found = copy.deepcopy(document)
    if source.resolve() == target.resolve():
        return found
    for table, name in _places(found):
        path = _relative(table.get(name))
        if path and (source / path).exists():
            table[name] = Path(os.path.relpath(source / path, target)).as_posix()
    return found


def rooted(experiment: Experiment, document: Mapping[str, Any]) -> Experiment:
    """The experiment with the working folder as its root, if it has none yet and a relative path needs one.

    Args:
        experiment: the experiment.
        document: its settings as TOML values.
    """
    if experiment.root is not None:
        return experiment
    return dataclasses.replace(experiment, root=root_of(document, Path.cwd()))


def located(path: str, root: str | None) -> str:
    """A path of a configuration, absolute if it exists; a hub id, and a path that does not exist, as it is.

    Args:
        path: as the configuration has it.
        root: the folder from which relative paths start; the working folder is the second choice.
    """
    relative = _relative(path)
    for start in ([Path(root)] if root else []) + [Path.cwd()]:
        if relative is not None and (start / relative).exists():
            return str(start / relative)
    return path


def located_model(experiment: Experiment) -> Model:
    """The experiment's model, with an absolute path if it is a local folder."""
    model = experiment.model
    path = located(model.path, experiment.root) if model.object is None else model.path
    return model if path == model.path else dataclasses.replace(model, path=path)


def located_data(data: Any, root: str | None) -> Any:
    """A data source with absolute paths, if it names files or folders that exist.

    Args:
        data: the source; one around another one is treated the same way.
        root: see ``located``.
    """
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.init}
    found = {name: located(value, root) for name, value in values.items() if name in _DATA and isinstance(value, str)}
    if dataclasses.is_dataclass(values.get("source")):
        found["source"] = located_data(values["source"], root)
    changed = {name: value for name, value in found.items() if value != values[name]}
    return dataclasses.replace(data, **changed) if changed else data


def _places(document: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """The tables and keys of a configuration that may have a path."""
    model, data = document.get("model"), document.get("data")
    if isinstance(model, Mapping):
        yield model, "path"
    yield document, "init_from"
    while isinstance(data, Mapping):
        yield from ((data, name) for name in _DATA)
        data = data.get("source")


def _relative(path: Any) -> Path | None:
    if (
        not isinstance(path, str)
        or path in ("", "embedded", "smollm2", IN_MEMORY)
        or path.startswith("~")
        or ":" in path
    ):
        return None
    return None if Path(path).is_absolute() else Path(path)

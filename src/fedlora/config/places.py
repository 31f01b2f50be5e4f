"""Where the relative paths of a configuration start: beside its file, or else in the working folder."""

from __future__ import annotations

import copy
import dataclasses
import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.tasks import Model
from fedlora.tasks.models.objects import IN_MEMORY

if TYPE_CHECKING:
    from fedlora.config.experiment import Experiment

_DATA = ("train", "test", "path")
"""The settings of data sources that name files or folders: a path, a pattern, or several of them in a list."""


def root_of(document: Mapping[str, Any], folder: Path) -> str | None:
    """The folder from which relative paths of a configuration start; None if it has none that exist.

    Args:
        document: the configuration as TOML values.
        folder: the folder of its file; the working folder is the second choice.
    """
    paths = [path for path in (_relative(table[name]) for table, name in _places(document)) if path]
    for root in (folder.absolute(), Path.cwd()):
        if any(_stands_for_any(root, path) for path in paths):
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
        path = _relative(table[name])
        if path and _stands_for_any(source, path):
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
    """A path or pattern of a configuration, absolute if there is such a file; a hub id, and any other, as it is.

    Args:
        path: as the configuration has it.
        root: the folder from which relative paths start; the working folder is the second choice.
    """
    relative = _relative(path)
    for start in ([Path(root)] if root else []) + [Path.cwd()]:
        if relative is not None and _stands_for_any(start, relative):
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
    found: dict[str, Any] = {}
    for name in _DATA:
        if isinstance(given := values.get(name), str):
            found[name] = located(given, root)
        elif isinstance(given, list | tuple):
            found[name] = type(given)(located(one, root) for one in given)
    if dataclasses.is_dataclass(values.get("source")):
        found["source"] = located_data(values["source"], root)
    changed = {name: value for name, value in found.items() if value != values[name]}
    return dataclasses.replace(data, **changed) if changed else data


def located_adapter(experiment: Experiment) -> str | None:
    """The folder of the adapter that the first phase starts from, if there is one."""
    return located(experiment.init_from, experiment.root) if experiment.init_from else None


def elsewhere(experiment: Experiment) -> Experiment:
    """The experiment for machines that have files of their own: with names of files in place of this machine's paths.

    Args:
        experiment: the experiment, whose data are ``Sites``.
    """

    def named(path: str) -> str:
        found = Path(located(path, experiment.root)).expanduser()
        return found.name if found.is_absolute() else path

    data: Any = experiment.data
    test = data.test
    data = dataclasses.replace(data, test=named(test) if isinstance(test, str) else type(test)(map(named, test)))
    model = dataclasses.replace(experiment.model, path=named(experiment.model.path))
    return dataclasses.replace(experiment, root=None, init_from=None, data=data, model=model)


def _places(document: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The tables and lists of a configuration that may have paths, each with the key or position of one."""
    model, data = document.get("model"), document.get("data")
    tables = [(model, "path"), (document, "init_from")]
    while isinstance(data, Mapping):
        tables += [(data, name) for name in _DATA]
        data = data.get("source")
    for table, name in tables:
        given = table.get(name) if isinstance(table, Mapping) else None
        if isinstance(given, list | tuple):
            yield from ((given, number) for number in range(len(given)))
        elif given is not None:
            yield table, name


def _stands_for_any(start: Path, path: Path) -> bool:
    """Whether there is such a file or folder, or one that the pattern stands for."""
    if (start / path).exists():
        return True
    return any(one in str(path) for one in "*?[") and any(glob.iglob(str(path), root_dir=start, recursive=True))


def _relative(path: Any) -> Path | None:
    if (
        not isinstance(path, str)
        or path in ("", "embedded", "smollm2", IN_MEMORY)
        or path.startswith("~")
        or ":" in path
    ):
        return None
    return None if Path(path).is_absolute() else Path(path)

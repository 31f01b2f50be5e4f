"""Extensible slots: a value of a user-defined class is accepted wherever a built-in one is.

A built-in class is identified by its name in the slot's table; any other class by ``package.module:Class``, given as
``kind`` in TOML, or by an entry point in the group ``fedlora.<slot>``. The configuration records its name and a digest
of its source, so that a run resumes with the same code or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import core_schema

from fedlora.core.errors import ConfigError, first_line

OPEN = (
    *("aggregator", "client_optimizer", "data", "engine", "lora_init", "partition", "precision", "privacy"),
    *("server", "skew", "sparsify", "task", "track", "tuning"),
)
"""The slots that accept user-defined classes; their entry points are in the groups ``fedlora.<slot>``."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Metadata of a union of components: discriminated by ``kind``, and open to other classes with the same base.

    Args:
        name: the slot's name, as in ``fedlora list``.
        base: the slot's abstract class.
    """

    name: str
    base: type

    def __get_pydantic_core_schema__(self, union: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        kinds = _kinds(union)
        choices = {kind: handler.generate_schema(cls) for kind, cls in kinds.items()}
        known = core_schema.tagged_union_schema(choices, discriminator="kind")
        written = core_schema.wrap_serializer_function_ser_schema(
            lambda value, write: write(value) if type(value) in kinds.values() else written_as(value), schema=known
        )
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: self._read(value, read, kinds), known, serialization=written
        )

    def _read(self, value: Any, read: Any, kinds: Mapping[str, type]) -> Any:
        if isinstance(value, self.base):
            return value if type(value) in kinds.values() else _checked(value)
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or kind in kinds or not (":" in kind or kind in self.installed()):
            return read(value)
        return self._build(kind, value)

    def _build(self, kind: str, table: Mapping[str, Any]) -> Any:
        cls = self.find(kind)
        _check_class(cls)
        fields = {key: one for key, one in table.items() if key not in ("kind", "source")}
        known = _settings(cls)
        if unknown := [key for key in fields if key not in known]:
            raise ConfigError(f"{kind} has no setting {unknown[0]!r}; known: {', '.join(known) or 'none'}")
        try:
            value: Any = _adapter(cls).validate_python(fields)
        except (PydanticUserError, PydanticUndefinedAnnotation, ValidationError) as error:
            raise ConfigError(f"{kind} does not take these settings: {_problems(error)}") from error
        if table.get("source", digest_of(cls)) != digest_of(cls):
            raise ConfigError(
                f"the source of {kind} differs from the one this configuration was written with "
                f"({digest_of(cls)} instead of {table['source']}); restore that source, or remove `source` there "
                "and start a new run"
            )
        return value

    def installed(self) -> dict[str, str]:
        """Classes from installed packages: entry point name -> ``package.module:Class``."""
        return _installed(self.name)

    def find(self, kind: str) -> type:
        """The class that a name refers to.

        Args:
            kind: ``package.module:Class``, or the name of an entry point.

        Raises:
            ConfigError: it cannot be imported, or is not a class of this slot.
        """
        name = self.installed().get(kind, kind)
        module, _, path = name.partition(":")
        try:
            found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"kind = {kind!r} cannot be imported ({error}); install its package, or put its folder on PYTHONPATH"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"{module} cannot be imported ({type(error).__name__}: {error}); correct its file"
            ) from error
        if not (inspect.isclass(found) and issubclass(found, self.base) and not inspect.isabstract(found)):
            raise ConfigError(
                f"kind = {kind!r} is no {self.base.__name__}: derive it from fedlora.parts.{self.base.__name__}, and "
                "define its abstract methods"
            )
        return found


def named(document: Any) -> set[str]:
    """The user-defined classes that a configuration names, as ``package.module:Class``.

    Args:
        document: untrusted TOML or JSON values.
    """
    found: set[str] = set()
    for table in tables_in(document):
        kind = table.get("kind")
        if isinstance(kind, str):
            # where a name stands for different classes in different slots, all of them count
            found |= {kind} if ":" in kind else {_installed(s)[kind] for s in OPEN if kind in _installed(s)}
    return found


def tables_in(document: Any) -> Iterator[Mapping[str, Any]]:
    """All tables of untrusted TOML or JSON values, at any depth."""
    left = [document]
    while left:  # no recursion: the depth is whatever a peer sent
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, Mapping):
            left += value.values()
            yield value


def kind_of(value: Any) -> str:
    """The name of a component: its ``kind``, or ``package.module:Class`` for a user-defined class."""
    return str(value.kind) if type(value).__module__.split(".")[0] == "fedlora" else name_of(type(value))


def name_of(cls: type) -> str:
    """``package.module:Class``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def written_as(value: Any) -> dict[str, Any]:
    """A value of a user-defined class as TOML values: its name, its settings, and a digest of its source.

    Raises:
        ConfigError: its settings, written and read again, would be others.
    """
    cls: type = type(value)
    names = _settings(cls)
    try:
        adapter = _adapter(cls)
        held = adapter.dump_python(value, mode="json", warnings=False)
        fields = adapter.dump_python(value, mode="json", exclude_none=True, warnings=False)
        fields = {name: one for name, one in fields.items() if name in names}
        read = adapter.dump_python(adapter.validate_python(fields), mode="json")
    except (PydanticUserError, PydanticUndefinedAnnotation, ValueError) as error:
        raise ConfigError(
            f"the settings of {name_of(cls)} cannot be written to a configuration and read again: {_problems(error)}; "
            "give its fields numbers, texts, lists of these, or dataclasses"
        ) from error
    if lost := [name for name in (*names, "kind") if held.get(name) != read.get(name)]:
        raise ConfigError(
            f"{name_of(cls)} has {lost[0]} = {held[lost[0]]!r}, which a configuration cannot hold: read again, it "
            f"would be {read[lost[0]]!r}; make that value the default of the field, or choose another name or value"
        )
    return {**fields, "kind": name_of(cls), "source": digest_of(cls)}


def _problems(error: Exception) -> str:
    """What a library's error says about the settings of a class, on one line."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'its settings'}: {one['msg'][0].lower()}{one['msg'][1:]}"
        for one in error.errors(include_url=False)
    )


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _settings(cls: Any) -> list[str]:
    """The names of the fields that a value is made of."""
    return [one.name for one in dataclasses.fields(cls) if one.init and one.name != "kind"]


def digest_of(cls: type[Any]) -> str:
    """A digest of the source of a class and its bases, excluding fedlora's own.

    Raises:
        ConfigError: the source cannot be read, so that changes could not be detected.
    """
    whole = hashlib.blake2b(digest_size=8)
    for one in cls.__mro__[:-1]:
        if one.__module__.split(".")[0] not in ("fedlora", "abc", "typing"):
            try:
                whole.update(_source(one).encode())
            except (OSError, TypeError) as error:
                raise ConfigError(
                    f"the source of {name_of(one)} cannot be read ({error}); put the class into a file"
                ) from error
    return whole.hexdigest()


@functools.cache  # finding it takes as long as a round of a tiny model
def _source(cls: type) -> str:
    return textwrap.dedent(inspect.getsource(cls))


def _checked(value: Any) -> Any:
    _check_class(type(value))
    written_as(value)
    return value


def _check_class(cls: type) -> None:
    settings = getattr(cls, "__dataclass_params__", None)
    if settings is None or not settings.frozen:
        raise ConfigError(f"{name_of(cls)} is not a frozen dataclass: decorate it with @dataclass(frozen=True)")
    if "<locals>" in cls.__qualname__:
        raise ConfigError(
            f"{name_of(cls)} is defined inside a function, where a run that resumes cannot import it: move it to the "
            "top of its file"
        )
    _check_declared(cls)
    if "source" in _settings(cls):
        raise ConfigError(
            f"{name_of(cls)} has a field source, a name that configurations use for the digest of its code: rename it"
        )


def _check_declared(cls: type) -> None:
    """Rejects a class that lacks an attribute which its slot declares for it, and which refusals read."""
    for base in cls.__mro__:
        declared = inspect.get_annotations(base) if base.__module__.split(".")[0] == "fedlora" else {}
        for name, kind in declared.items():
            if str(kind).startswith("ClassVar") and getattr(cls, name, None) is None:
                raise ConfigError(
                    f"{name_of(cls)} does not set {name!r}, which {base.__name__} declares: add `{name}: {kind} = ...` "
                    "to the class"
                )


def _kinds(union: Any) -> dict[str, type]:
    """The classes of a union by their ``kind``."""
    return {cls.kind: cls for cls in _members(union)}


def _members(union: Any) -> Collection[Any]:
    origin: Collection[Any] = getattr(union, "__args__", ())
    return [one for member in origin for one in (_members(member) or [member]) if inspect.isclass(one)]


@functools.cache
def _installed(slot: str) -> dict[str, str]:
    found = importlib.metadata.entry_points(group=f"fedlora.{slot}")
    return {point.name: point.value for point in found}

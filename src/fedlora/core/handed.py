"""Objects passed in from Python, such as rows or a loaded model: a file records only their fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import PlainSerializer
from pydantic_core import ArgsKwargs

from fedlora.core.errors import ConfigError


@dataclass(frozen=True)
class Handed:
    """An object identified by a fingerprint of its content: two with the same fingerprint are equal.

    Args:
        fingerprint: the same in every process for the same content.
        value: the object; None if only the fingerprint is known, as in a configuration read from a file.
    """

    fingerprint: str
    value: Any = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handed:
        return self

    def here(self, what: str) -> Any:
        """The object.

        Args:
            what: the setting's name, for the message.

        Raises:
            ConfigError: only its fingerprint is known.
        """
        if self.value is None:
            raise ConfigError(absent([what]))
        return self.value


HandedField = Annotated[Any, PlainSerializer(lambda held: held.fingerprint, return_type=str)]
"""The type of a setting passed as an object, a ``Handed`` once validated; TOML and digests use its fingerprint."""


def absent(names: list[str]) -> str:
    """The error message for settings of which only the fingerprints are known."""
    task = ", task=..." if any(name.startswith("task.") for name in names) else ""
    return (
        f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'} passed from Python, and the configuration "
        "keeps only a fingerprint: pass the same again, by running the same script, or by "
        f"fedlora.run(dataclasses.replace(fedlora.load(FOLDER), data=..., model=...{task}), FOLDER)"
    )


def with_keywords(given: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The input of a validator in the mode ``before``, by keyword or from a table, with its values changed.

    Args:
        given: what pydantic passes.
        change: maps the values by name to their replacements.
    """
    if isinstance(given, ArgsKwargs):
        return ArgsKwargs(given.args, change(dict(given.kwargs or {})))
    return change(dict(given)) if isinstance(given, Mapping) else given

"""Fingerprints of functions and objects of Python, by their source and settings."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from fedlora.core.errors import ConfigError
from fedlora.core.handed import Handed
from fedlora.core.later import transformers
from fedlora.tasks.models.objects import fingerprint_of_tokenizer

_MARK = "code:"
_INSTALLED = ("fedlora", "peft", "torch", "transformers", "trl")
"""Packages whose classes and functions are identified by name: another version of them is recorded by itself."""
_PLAIN = (str, int, float, bool, bytes, type(None))


def handed_code(given: Any, name: str) -> Handed:
    """A function, or an object that can be called, with a fingerprint of what it computes.

    Args:
        given: that; or the fingerprint of one, as in a file.
        name: the setting's name, for the message.

    Raises:
        ConfigError: it cannot be called.
    """
    if isinstance(given, Handed):
        return given
    if isinstance(given, str) and given.startswith(_MARK):
        return Handed(given)
    if not callable(given):
        raise ConfigError(f"{name} is of type {type(given).__name__}, but a function was expected: pass one")
    return Handed(_MARK + xxhash.xxh3_128_hexdigest("\n".join(_facts(given, depth=0)).encode()), given)


def _facts(given: Any, depth: int) -> Iterator[str]:
    """What a value is, line by line; what lies deeper than objects in objects in objects is named only by its type."""
    yield type(given).__name__
    if isinstance(given, _PLAIN):
        yield repr(given)
    elif isinstance(given, transformers.PreTrainedTokenizerBase | transformers.ImageProcessingMixin):
        yield fingerprint_of_tokenizer(given)
    elif depth > 3:
        return
    elif isinstance(given, functools.partial):
        yield from _inside([given.func, *given.args, given.keywords], depth)
    elif isinstance(given, list | tuple):
        yield from _inside(given, depth)
    elif isinstance(given, dict):
        yield from _inside([part for name in sorted(given, key=str) for part in (str(name), given[name])], depth)
    elif inspect.ismethod(given):
        yield from _inside([given.__func__, given.__self__], depth)
    elif inspect.isroutine(given) or inspect.isclass(given):
        yield _source(given)
        # a function that another one returns differs by the values that it encloses
        yield from _inside([cell.cell_contents for cell in getattr(given, "__closure__", None) or ()], depth)
    elif callable(given) or depth:
        yield _source(type(given))
        yield from _facts(dict(getattr(given, "__dict__", {})), depth + 1)


def _inside(values: Any, depth: int) -> Iterator[str]:
    for value in values:
        yield from _facts(value, depth + 1)


def _source(given: Callable[..., Any]) -> str:
    """The name of a function or class of an installed package; of any other one its source, or else its bytecode."""
    name = f"{given.__module__}:{given.__qualname__}"
    if str(given.__module__).split(".")[0] in _INSTALLED:
        return name
    try:
        return textwrap.dedent(inspect.getsource(given))
    except (OSError, TypeError):
        code = getattr(given, "__code__", None)
        return name if code is None else f"{code.co_code!r}{code.co_names}"

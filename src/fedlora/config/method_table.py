"""The ``[method]`` table: a method by name, its own arguments, and overrides of any recipe key."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError, validate_call

from fedlora.config.explain import explain, nearest
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS, paper
from fedlora.recipe import Phase, Recipe

_RECIPE = TypeAdapter(Recipe)
_SLOTS = tuple(field.name for field in dataclasses.fields(Recipe))


def build_method(table: Mapping[str, Any]) -> tuple[Phase, ...]:
    """The phases described by a ``[method]`` table.

    ``kind`` names the method. The method's own arguments are passed to it; every other recipe key (``privacy``,
    ``memory``, ``aggregator``, ``up``, ...) overrides that slot in all of its phases. A table with a ``kind`` replaces
    the method's value; a table without one overrides that value key by key, in the phases that have the keys.
    ``preset = "paper"`` starts from the settings of the paper's official code instead of this project's defaults.

    Args:
        table: as read from TOML.

    Raises:
        ConfigError: there is no such method or key, or the combination is not supported.
    """
    kind = str(table.get("kind", ""))
    if kind not in METHODS:
        raise ConfigError(f"there is no method {kind!r}{nearest(kind, list(METHODS))}; known: {', '.join(METHODS)}")
    preset = table.get("preset", "paper")
    if preset != "paper":
        raise ConfigError(f"method.preset = {preset!r} is not known; known: paper; leave it out for the defaults")
    given = {key: value for key, value in table.items() if key not in ("kind", "preset")}
    if "preset" in table:
        given = _merged(paper(kind), given)
    own, common = _split(kind, given)
    known = list(dict.fromkeys((*inspect.signature(METHODS[kind]).parameters, *_SLOTS)))
    if unknown := [key for key in own if key not in known]:
        raise ConfigError(
            f"unknown key 'method.{unknown[0]}'{nearest(unknown[0], known)}; known here: {', '.join(known)}"
        )
    try:
        phases: tuple[Phase, ...] = validate_call(METHODS[kind])(**own)
    except ValidationError as error:
        raise ConfigError(explain(error, METHODS[kind], "method")) from error
    return tuple(
        dataclasses.replace(phase, recipe=_changed(phase.recipe, _of_phase(common, phase, phases))) for phase in phases
    )


def _split(kind: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the method's function, merged over its defaults, and the slots it has no argument for."""
    parameters = inspect.signature(METHODS[kind]).parameters
    own: dict[str, Any] = {}
    common: dict[str, Any] = {}
    for key, value in sorted(given.items(), key=lambda pair: pair[0].startswith("warm_")):
        table = isinstance(value, Mapping) and "kind" not in value
        default = parameters[key].default if key in parameters else None
        # the first phase's value is the method's, unless stated otherwise
        base = own.get(key.removeprefix("warm_"), _default(parameters, key.removeprefix("warm_")))
        if key in parameters and table and (dataclasses.is_dataclass(default) or key.startswith("warm_")):
            own[key] = _merged(plain_values(default or base), value)
        elif key in _SLOTS and (key not in parameters or table):
            common[key] = value
        else:
            own[key] = value
    return own, common


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    return parameters[name].default if name in parameters else None


def _of_phase(common: dict[str, Any], phase: Phase, phases: tuple[Phase, ...]) -> dict[str, Any]:
    """``common`` without the settings that only the tuning of another phase has, such as those of LoRA in ``slora``."""
    table = common.get("tuning")
    if not isinstance(table, Mapping) or "kind" in table or len(phases) == 1:
        return common
    own, *others = (
        {field.name for field in dataclasses.fields(each.recipe.tuning)}  # type: ignore[arg-type]
        for each in (phase, *phases)
    )
    elsewhere = set().union(*others) - own
    return common | {"tuning": {key: value for key, value in table.items() if key not in elsewhere}}


def _changed(recipe: Recipe, common: Mapping[str, Any]) -> Recipe:
    if not common:
        return recipe
    try:
        return _RECIPE.validate_python(_merged(plain_values(recipe), common))
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe, "method")) from error


def plain_values(value: Any) -> Any:
    """A component as TOML values; tables are returned unchanged."""
    return TypeAdapter(Any).dump_python(value, mode="json", exclude_none=True)


def _merged(base: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` merged over ``base``: tables without a ``kind`` are merged recursively, everything else replaces."""
    result = dict(base) if isinstance(base, Mapping) else {}
    for key, value in table.items():
        over = isinstance(value, Mapping) and "kind" not in value and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if over else value
    return result

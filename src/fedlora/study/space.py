"""The search space of a tuning: lists and ranges, full grids and balanced samples."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedlora.config import toml_value
from fedlora.core.errors import ConfigError
from fedlora.core.state import named_seed

Values = dict[str, Any]
_RANGE = re.compile(r"\s*(-?[\d.]+(?:[eE][+-]?\d+)?)\s*\.\.\s*(-?[\d.]+(?:[eE][+-]?\d+)?)\s*")
_PLAIN = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_DESIGNS = 200
"""Number of random designs drawn; the one whose points are farthest apart is used."""


def parse_vary(assignments: Sequence[str]) -> dict[str, Any]:
    """Parses the keys to vary from assignments such as ``rank=1,2,4`` and ``server.lr=1e-3..1e-1``.

    Raises:
        ConfigError: one is not of that form, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for one in assignments:
        key, equals, text = one.partition("=")
        if not equals or not key.strip() or not text.strip():
            raise ConfigError(f"--vary {one!r} is not of the form key=value,value or key=low..high")
        if key.strip() in found:
            raise ConfigError(f"--vary {key.strip()} is given twice; give all its values in one")
        found[key.strip()] = text if _RANGE.fullmatch(text) else _list(text)
    return found


def _list(text: str) -> list[Any]:
    listed = toml_value(f"[{text}]")
    return listed if isinstance(listed, list) else [_value(part.strip()) for part in text.split(",")]


def _value(text: str) -> Any:
    """A TOML value; numbers such as ``.01`` and ``1.``, which TOML does not know, are numbers too."""
    found = toml_value(text)
    if isinstance(found, str) and _PLAIN.fullmatch(text):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    return found


def points(vary: Mapping[str, Any], num: int, seed: int) -> list[Values]:
    """The settings to try: every combination if there are few enough, otherwise a balanced sample.

    Args:
        vary: key -> a list of values, or a range ``low..high``. Ranges of positive numbers are geometric; a range of
            integers yields integers.
        num: maximum number of settings.
        seed: seed of the sample. Every value of a list occurs equally often, up to a difference of one; a range is
            divided evenly, both ends included (a Latin hypercube).

    Raises:
        ConfigError: a list is empty or contains a value twice, a range is malformed, or see ``check_apart``.
    """
    check_apart(vary)
    axes = {key: _axis(key, given, num) for key, given in vary.items()}
    size = int(np.prod([len(axis) for axis in axes.values()], dtype=object)) if axes else 1
    if size <= num:
        return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]
    rng = np.random.default_rng(named_seed(seed, "tune"))
    designs = [np.stack([_balanced(len(axis), num, rng) for axis in axes.values()], 1) for _ in range(_DESIGNS)]
    scale = np.array([max(1, len(axis) - 1) for axis in axes.values()])
    best = max(designs, key=lambda design: _apart(design / scale))
    rows = dict.fromkeys(map(tuple, best.tolist()))
    return [{key: axis[place] for (key, axis), place in zip(axes.items(), row, strict=True)} for row in rows]


def check_apart(keys: Iterable[str]) -> None:
    """Rejects a key that replaces the values of an earlier one, such as ``method.rank`` after ``rank``."""
    for earlier, later in itertools.combinations(keys, 2):
        if f"{short(earlier)}.".startswith(f"{short(later)}."):
            raise ConfigError(f"{later!r} replaces {earlier!r}, which would vary in name only; keep one of them")


def short(key: str) -> str:
    """A key without the table of the method, which may be left out."""
    return key.removeprefix("method.")


def at_ends(vary: Mapping[str, Any], best: Values) -> list[str]:
    """The varied numeric keys whose best value is the smallest or largest of its list or range."""
    found = []
    for key, given in vary.items():
        ends = _ends(key, given) if isinstance(given, str) else list(given)
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in ends)
        if numbers and len(ends) > 1 and best[key] in (min(ends), max(ends)):
            found.append(key)
    return found


def _ends(key: str, given: str) -> list[Any]:
    match = _RANGE.fullmatch(given)
    ends = [_value(text) for text in match.groups()] if match else []
    if len(ends) != 2 or not all(isinstance(one, int | float) for one in ends) or ends[0] >= ends[1]:
        raise ConfigError(f"the values of {key!r} are {given!r}: write a list, or a range such as 1e-3..1e-1")
    return ends


def _axis(key: str, given: Any, num: int) -> list[Any]:
    if isinstance(given, str):
        low, high = _ends(key, given)
        steps = np.linspace(0, 1, num) if num > 1 else np.array([0.5])
        values = low * (high / low) ** steps if low > 0 else low + (high - low) * steps
        if isinstance(low, int) and isinstance(high, int):
            return sorted({round(value) for value in values.tolist()})
        if num == 1:
            return _rounded(low, values.tolist(), high)[1:2]
        return _rounded(low, values.tolist()[1:-1], high)
    if not isinstance(given, Sequence) or not given:
        raise ConfigError(f"{key!r} has no values to try: write a list, or a range such as 1e-3..1e-1")
    if any(one == other for number, one in enumerate(given) for other in given[:number]):
        raise ConfigError(f"the values of {key!r} contain one twice: {given}")
    return list(given)


def _rounded(low: Any, inner: Sequence[float], high: Any) -> list[Any]:
    """The values of a range with both ends, with the fewest digits, at least three, that keep them apart."""
    for digits in range(3, 18):
        found = [low, *(float(f"{value:.{digits}g}") for value in inner), high]
        if all(one < other for one, other in itertools.pairwise(found)):
            return found
    return list(dict.fromkeys([low, *inner, high]))  # the range has fewer numbers than that


def _balanced(values: int, num: int, rng: np.random.Generator) -> Any:
    """A random sequence of ``num`` indices below ``values``, with frequencies that differ by at most one."""
    rounds = [rng.permutation(values) for _ in range(-(-num // values))]
    return rng.permutation(np.concatenate(rounds)[:num])


def _apart(design: Any) -> tuple[int, float, float]:
    """The quality of a design: number of distinct points, minimum pairwise distance, mean distance."""
    gaps = np.abs(design[:, None] - design[None]).sum(-1)[np.triu_indices(len(design), 1)]
    different = len(np.unique(design, axis=0))
    return different, float(gaps.min(initial=np.inf)), float(gaps.mean()) if len(gaps) else 0.0

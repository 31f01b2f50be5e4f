"""What must hold before a study's figures mean anything, such as ``lora >= head_only``."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config import toml_value
from fedlora.core.errors import ConfigError, FedloraError

INSIDE = "inside the grid"
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_NUMBER = r"\d+\.?\d*(?:[eE][+-]?\d+)?"
_SIDE = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?([A-Za-z][\w.-]*?)\s*(?:\s([+-])\s*({_NUMBER}))?\s*")
Figures = Mapping[tuple[str, str], float]
"""The main metric of a method at a setting, by both names."""


class GateError(FedloraError):
    """A gate does not hold; figures beyond it would mean nothing."""


@dataclass(frozen=True)
class Term:
    """A figure to compare: ``factor * label + offset``; without a label the offset alone.

    Args:
        label: of a method or line; empty for a number.
        factor: what its figure is multiplied by.
        offset: what is added.
    """

    label: str
    factor: float = 1.0
    offset: float = 0.0

    def value(self, figure: float) -> float:
        """The term, of the figure of its method."""
        return self.factor * figure * bool(self.label) + self.offset


def parse_term(text: str) -> Term:
    """A term from words such as ``0.9 * full`` or ``full - 0.03``.

    Raises:
        ConfigError: it is neither a number nor such words.
    """
    if re.fullmatch(rf"\s*-?{_NUMBER}\s*", text):
        return Term("", offset=float(text))
    match = _SIDE.fullmatch(text)
    if not match:
        raise ConfigError(f"{text.strip()!r} is no figure: write a number, a method, 0.9 * method or method - 0.03")
    factor, label, sign, offset = match.groups()
    return Term(label, float(factor or 1.0), float(f"{sign or ''}{offset or 0}"))


@dataclass(frozen=True)
class Rule:
    """A gate.

    Args:
        text: as it was written.
        left: one side; None for ``inside the grid``.
        compare: ``>=`` and the like.
        right: the other side.
        at: the settings that it is about: key -> value; all where empty.
    """

    text: str
    left: Term | None = None
    compare: str = ">="
    right: Term | None = None
    at: tuple[tuple[str, Any], ...] = ()

    @property
    def labels(self) -> list[str]:
        """The methods that it is about."""
        return [term.label for term in (self.left, self.right) if term and term.label]


def parse_rules(texts: Sequence[str], labels: Sequence[str], vary: Mapping[str, Sequence[Any]]) -> list[Rule]:
    """Gates from words.

    Args:
        texts: such as ``lora >= full - 0.03 at clients.partition.alpha = 0.5``, or ``inside the grid``.
        labels: the methods there are.
        vary: the settings there are.

    Raises:
        ConfigError: a rule says something else, or names a method or setting that is not there.
    """
    return [Rule(text) if text.strip() == INSIDE else _rule(text, labels, vary) for text in texts]


def _rule(text: str, labels: Sequence[str], vary: Mapping[str, Sequence[Any]]) -> Rule:
    words, _, condition = text.partition(" at ")
    parts = re.split(r"(>=|<=|>|<)", words)
    if len(parts) != 3:
        raise ConfigError(
            f"the gate {text!r} is not understood: write 'lora >= full - 0.03 at KEY = VALUE', or {INSIDE!r}"
        )
    rule = Rule(text, parse_term(parts[0]), parts[1], parse_term(parts[2]), _conditions(text, condition, vary))
    if unknown := [label for label in rule.labels if label not in labels]:
        raise ConfigError(f"the gate {text!r}: there is no method {unknown[0]!r}; there are: {', '.join(labels)}")
    return rule


def _conditions(text: str, condition: str, vary: Mapping[str, Sequence[Any]]) -> tuple[tuple[str, Any], ...]:
    found = []
    for part in condition.split(",") if condition.strip() else ():
        given, _, words = part.partition("=")
        keys = [key for key in vary if given.strip() in (key, key.rpartition(".")[2])]
        value = toml_value(words.strip())
        if len(keys) != 1 or value not in vary[keys[0]]:
            there = "; ".join(f"{key} = {', '.join(map(str, values))}" for key, values in vary.items())
            raise ConfigError(f"the gate {text!r}: there is no setting {part.strip()!r}; there are: {there or 'none'}")
        found.append((keys[0], value))
    return tuple(found)


def check(
    rules: Sequence[Rule],
    settings: Mapping[str, Mapping[str, Any]],
    figures: Figures,
    ends: Mapping[tuple[str, str], Sequence[str]],
    where: str,
) -> list[str]:
    """Which gates do not hold, one sentence each; those whose figures are not there yet are left out.

    Args:
        rules: the gates.
        settings: the settings by name.
        figures: what was reached.
        ends: the tuned keys whose best value is an end of what was tried, by method and setting.
        where: what the figures are of, for the sentences.
    """
    broken = []
    for rule in rules:
        if rule.left is None or rule.right is None:
            found = [f"{label}{_at(setting)}: {', '.join(keys)}" for (label, setting), keys in ends.items() if keys]
            if found:
                broken.append(
                    f"the gate {rule.text!r} does not hold, the best value is an end of its grid: " + "; ".join(found)
                )
            continue
        for name, setting in settings.items():
            wanted = [(label, name) for label in rule.labels]
            if any(setting.get(key) != value for key, value in rule.at) or any(one not in figures for one in wanted):
                continue
            left, right = (term.value(figures.get((term.label, name), 0.0)) for term in (rule.left, rule.right))
            if not _COMPARE[rule.compare](left, right):
                shown_figures = ", ".join(f"{label} {figures[label, at]:.4f}" for label, at in wanted)
                broken.append(f"the gate {rule.text!r} does not hold{_at(name)} on {where}: {shown_figures}")
    return broken


def _at(setting: str) -> str:
    return f" at {setting}" if setting != "all" else ""

"""Gates: sanity conditions for the validity of a study's results, such as ``lora >= head_only``."""

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
_SIDE = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?([A-Za-z0-9][\w.-]*?)\s*(?:\s([+-])\s*({_NUMBER}))?\s*")
Figures = Mapping[tuple[str, str], float]
"""The main metric by method and setting."""


class GateError(FedloraError):
    """A gate does not hold, so further results would be meaningless."""


@dataclass(frozen=True)
class Term:
    """One side of a comparison: ``factor * label + offset``; without a label, only the offset.

    Args:
        label: label of a method or line; empty for a number.
        factor: factor applied to its figure.
        offset: number added.
    """

    label: str
    factor: float = 1.0
    offset: float = 0.0

    def value(self, figure: float) -> float:
        """The value of the term, given its method's figure."""
        return self.factor * figure * bool(self.label) + self.offset


def parse_term(text: str, labels: Sequence[str] = ()) -> Term:
    """Parses a term such as ``0.9 * full`` or ``full - 0.03``.

    Args:
        text: the term.
        labels: the existing methods; a term that is one of these, such as ``16``, is not a number.

    Raises:
        ConfigError: it is neither a number nor such an expression.
    """
    if text.strip() in labels:
        return Term(text.strip())
    if re.fullmatch(rf"\s*-?{_NUMBER}\s*", text):
        return Term("", offset=float(text))
    match = _SIDE.fullmatch(text)
    if not match:
        raise ConfigError(f"{text.strip()!r} is not a value: write a number, a method, 0.9 * method or method - 0.03")
    factor, label, sign, offset = match.groups()
    return Term(label, float(factor or 1.0), float(f"{sign or ''}{offset or 0}"))


@dataclass(frozen=True)
class Rule:
    """A gate.

    Args:
        text: the rule as written.
        left: left-hand side; None for ``inside the grid``.
        compare: comparison operator, such as ``>=``.
        right: right-hand side.
        at: the settings to which it applies: key -> value; all if empty.
    """

    text: str
    left: Term | None = None
    compare: str = ">="
    right: Term | None = None
    at: tuple[tuple[str, Any], ...] = ()

    @property
    def labels(self) -> list[str]:
        """The methods that it refers to."""
        return [term.label for term in (self.left, self.right) if term and term.label]


def parse_rules(texts: Sequence[str], labels: Sequence[str], vary: Mapping[str, Sequence[Any]]) -> list[Rule]:
    """Parses gates.

    Args:
        texts: rules such as ``lora >= full - 0.03 at clients.partition.alpha = 0.5``, or ``inside the grid``.
        labels: the existing methods.
        vary: the existing settings.

    Raises:
        ConfigError: a rule is malformed, or names a method or setting that does not exist.
    """
    return [Rule(text) if text.strip() == INSIDE else _rule(text, labels, vary) for text in texts]


def parse_target(target: float | str, labels: Sequence[str]) -> Term:
    """Parses a target, in which only a text can name a method.

    Raises:
        ConfigError: see ``parse_term``.
    """
    return parse_term(str(target), labels if isinstance(target, str) else ())


def _rule(text: str, labels: Sequence[str], vary: Mapping[str, Sequence[Any]]) -> Rule:
    words, _, condition = text.partition(" at ")
    parts = re.split(r"(>=|<=|>|<)", words)
    if len(parts) != 3:
        raise ConfigError(
            f"the gate {text!r} is not understood: write 'lora >= full - 0.03 at KEY = VALUE', or {INSIDE!r}"
        )
    rule = Rule(
        text, parse_term(parts[0], labels), parts[1], parse_term(parts[2], labels), _conditions(text, condition, vary)
    )
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
    failed: Mapping[tuple[str, str], str],
) -> list[str]:
    """The gates that do not hold, one sentence each; gates whose figures are not available yet are skipped.

    Args:
        rules: the gates.
        settings: the settings by name.
        figures: the metrics reached.
        ends: the tuned keys whose best value is at an end of the range tried, by method and setting.
        where: the data the figures refer to, for the sentences.
        failed: why there is no figure where runs failed, by method and setting; a gate on one of these does not hold.
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
            if any(setting.get(key) != value for key, value in rule.at):
                continue
            if lost := [one for one in wanted if one in failed]:
                why = f"{lost[0][0]} failed: {failed[lost[0]]}"
                broken.append(f"the gate {rule.text!r} cannot be judged{_at(name)} on {where}, as {why}")
            if any(one not in figures for one in wanted):
                continue
            left, right = (term.value(figures.get((term.label, name), 0.0)) for term in (rule.left, rule.right))
            if not _COMPARE[rule.compare](left, right):
                shown_figures = ", ".join(f"{label} {figures[label, at]:.4f}" for label, at in wanted)
                broken.append(f"the gate {rule.text!r} does not hold{_at(name)} on {where}: {shown_figures}")
    return broken


def _at(setting: str) -> str:
    return f" at {setting}" if setting != "all" else ""

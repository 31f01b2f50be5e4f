"""What a study file asks for: methods, settings and seeds on one federation, and what each run's configuration is."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from fedlora.config.experiment import read_toml
from fedlora.config.explain import explain
from fedlora.core.component import MODEL_CONFIG, Count, Field, Fraction, Whole, dataclass
from fedlora.core.errors import ConfigError
from fedlora.recipe.modes import MODES
from fedlora.study.halving import with_values

_SHARED = ("local", "rounds", "rank", "alpha", "targets", "tuning")
"""First parts of the keys that mean something where nothing is sent."""
HEAD_ONLY, CENTRALISED, LOCAL = "head_only", "centralised", "local"
_HEAD_OPTIMISERS = {
    "server": {"kind": "adamw", "lr": 3e-2, "weight_decay": 0.0},
    "local": {"optimizer": {"kind": "sgd", "lr": 0.05}},
}
"""What a head trains well with, where a study does not name a server for all."""
Table = dict[str, Any]
Vary = dict[str, list[Any] | str]


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class MethodTuning:
    """What is tuned for one method.

    Args:
        vary: the keys and their values, in place of those of all methods.
    """

    vary: Vary


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Tuning:
    """How settings are chosen.

    Args:
        trials: for each method at each setting, the same number for all.
        vary: key -> a list of values, or a range such as ``"1e-3..1e-1"``.
        holdout: part of the training data to choose by.
        seed: of the sample, and of the runs: the seed of the study that trials use.
        methods: other keys for a method.
    """

    trials: Count = 8
    vary: Vary = field(default_factory=dict)
    holdout: Fraction = 0.1
    seed: Whole = 0
    methods: dict[str, MethodTuning] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Line:
    """A line to hold methods against.

    Args:
        methods: labels of the methods that it is made of; the first method if absent. The head alone is made of none.
        set: keys that are other than theirs, such as ``rounds``.
    """

    methods: tuple[str, ...] = ()
    set: Table = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Lines:
    """What methods are held against, tuned alike: ``true``, ``false``, a list of methods, or a ``Line``.

    Args:
        head_only: the head on frozen features, under federated averaging.
        centralised: one client that holds everything.
        local_only: clients that train alone.
    """

    head_only: bool | Line = True
    centralised: bool | tuple[str, ...] | Line = True
    local_only: bool | tuple[str, ...] | Line = True


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Gates:
    """What must hold before figures mean anything.

    Args:
        rules: such as ``lora >= full - 0.03 at clients.partition.alpha = 0.5`` and ``inside the grid``.
        stop: whether the study ends where one does not hold; else the report says so.
    """

    rules: tuple[str, ...] = ()
    stop: bool = True


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Report:
    """What tables show.

    Args:
        reference: the method that others are compared with; the first one if absent.
        target: a value of the main metric, or a share of a method's best: ``0.9 * full``.
        link: the network over which the time to it is modelled.
    """

    reference: str = ""
    target: float | str | None = None
    link: str = ""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Study:
    """Methods, settings and seeds on one federation.

    Args:
        name: of the study and its folder.
        base: a configuration without a method's kind; what all runs share.
        methods: label -> what its ``[method]`` table has over that of ``base``.
        seeds: of the final runs.
        vary: key -> values; every combination is a setting of its own.
        tune: how settings of each method are chosen.
        lines: what methods are held against.
        gates: what must hold.
        report: what tables show.
    """

    name: str
    base: Table
    methods: Annotated[dict[str, Table], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = field(default_factory=dict)
    tune: Tuning = Tuning()
    lines: Lines = Lines()
    gates: Gates = Gates()
    report: Report = Report()

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {list(self.seeds)} names one twice; each run needs its own")
        for label in (*self.methods, self.name):
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", label):
                raise ConfigError(
                    f"{label!r} is to name a folder: use letters, digits, '_', '-' and '.', as in flasc_16"
                )
        if unknown := [label for label in self.tune.methods if label not in self.labels]:
            raise ConfigError(
                f"tune.methods.{unknown[0]}: there is no such method; there are: {', '.join(self.labels)}"
            )
        if self.reference not in self.labels:
            raise ConfigError(
                f"report.reference = {self.reference!r} is no method; there are: {', '.join(self.labels)}"
            )

    @property
    def labels(self) -> list[str]:
        """The methods and lines."""
        return list(self._tables())

    @property
    def tuned(self) -> bool:
        """Whether there is anything to tune."""
        return bool(self.tune.vary or self.tune.methods)

    @property
    def reference(self) -> str:
        """The method that others are compared with."""
        return self.report.reference or next(iter(self.methods))

    def settings(self) -> list[Table]:
        """Every combination of the varied keys."""
        return [dict(zip(self.vary, chosen, strict=True)) for chosen in itertools.product(*self.vary.values())]

    def document(self, label: str, setting: Mapping[str, Any], seed: int) -> Table:
        """The configuration of a method at a setting, as a TOML document."""
        mode, table, extra = self._tables()[label]
        found = {"checkpoint_every": 5, **self.base, "label": label, "seed": seed}
        found["method"] = merged(self.base.get("method", {}), table)
        if not MODES[mode].sends:
            found["mode"] = mode
        return with_values(found, {**setting, **extra})

    def varied(self, label: str) -> Vary:
        """The keys that are tuned for a method."""
        if label in self.tune.methods:
            return self.tune.methods[label].vary
        # a server's rate is nothing where there is no server
        sends = MODES[self._tables()[label][0]].sends
        return {key: values for key, values in self.tune.vary.items() if sends or key.split(".")[0] in _SHARED}

    def _tables(self) -> dict[str, tuple[str, Table, Table]]:
        """The mode, the ``[method]`` table, and what is set beside, of each method and line by label."""
        found: dict[str, tuple[str, Table, Table]] = {
            label: ("federated", table, {}) for label, table in self.methods.items()
        }
        head = _line(self.lines.head_only)
        if head and HEAD_ONLY not in found:
            optimisers = {} if "server" in self.base.get("method", {}) else _HEAD_OPTIMISERS
            found[HEAD_ONLY] = "federated", {"kind": "fedavg", "tuning": {"kind": "head_only"}, **optimisers}, head.set
        for mode, given in ((CENTRALISED, self.lines.centralised), (LOCAL, self.lines.local_only)):
            line = _line(given)
            for label in (line.methods or (next(iter(self.methods)),)) if line else ():
                if label not in self.methods:
                    raise ConfigError(
                        f"lines: there is no method {label!r} to be {mode}; there are: {', '.join(self.methods)}"
                    )
                if line:
                    found[f"{mode}_{label}"] = mode, self.methods[label], line.set
        return found


_ADAPTER = TypeAdapter(Study)


def load_study(path: Path) -> Study:
    """Reads a study from a TOML file.

    Raises:
        ConfigError: there is no such file, or it asks for something that is not there.
    """
    return parse_study(read_toml(path))


def parse_study(document: Mapping[str, Any]) -> Study:
    """A study from the content of a TOML file.

    Raises:
        ConfigError: with the offending key.
    """
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        raise ConfigError(explain(error, Study, "")) from error


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """``base`` with the keys of ``over``; tables are merged too, unless the one of ``over`` is of another kind."""
    found = dict(base)
    for key, value in over.items():
        held = found.get(key)
        if isinstance(value, Mapping) and isinstance(held, Mapping):
            alike = value.get("kind", held.get("kind")) == held.get("kind")
            found[key] = merged(held, value) if alike else dict(value)
        else:
            found[key] = value
    return found


def _line(given: bool | tuple[str, ...] | Line) -> Line | None:
    if isinstance(given, Line):
        return given
    if isinstance(given, tuple):
        return Line(methods=given)
    return Line() if given else None

"""The content of a study file: methods, settings and seeds on one federation, and the configuration of each run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from fedlora.config.explain import explain
from fedlora.config.files import merged, naming, read
from fedlora.config.places import carried, root_of
from fedlora.core.component import MODEL_CONFIG, Count, Field, Fraction, Whole, dataclass
from fedlora.core.errors import ConfigError
from fedlora.recipe.modes import MODES
from fedlora.study.halving import with_values
from fedlora.study.space import check_apart, short

_SHARED = ("local", "rounds", "rank", "alpha", "targets", "tuning", "model", "task", "data")
"""First parts of the keys that have an effect in modes without communication."""
_OF_RUNS = ("seed", "label")
"""Keys that a study sets for each run."""
HEAD_ONLY, CENTRALISED, LOCAL = "head_only", "centralised", "local"
_LINES = {CENTRALISED: "centralised", LOCAL: "local_only"}
"""The key in ``lines`` of each mode."""
_HEAD_OPTIMISERS = {
    "server": {"kind": "adamw", "lr": 3e-2, "weight_decay": 0.0},
    "local": {"optimizer": {"kind": "sgd", "lr": 0.05}, "lr_scale": {"head": 1.0}},
}
"""Optimisers that work well for a head, if the study does not set a server optimiser for all methods."""
Table = dict[str, Any]
Vary = dict[str, list[Any] | str]


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class MethodTuning:
    """Tuning of one method.

    Args:
        vary: the keys and their values, replacing those shared by all methods.
    """

    vary: Vary


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Tuning:
    """Tuning of the methods' settings.

    Args:
        trials: number of trials for each method at each setting, the same for all.
        vary: key -> a list of values, or a range such as ``"1e-3..1e-1"``.
        holdout: fraction of the training data held out for selection.
        seed: seed of the sample of settings and of the trials' runs.
        methods: keys that differ for individual methods.
    """

    trials: Count = 8
    vary: Vary = field(default_factory=dict)
    holdout: Fraction = 0.1
    seed: Whole = 0
    methods: dict[str, MethodTuning] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Line:
    """A baseline for comparison.

    Args:
        methods: labels of the methods it is derived from; the first method if absent. ``head_only`` uses none.
        set: keys that differ from those of the methods, such as ``rounds``.
    """

    methods: tuple[str, ...] = ()
    set: Table = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Lines:
    """Baselines, tuned like the methods: ``true``, ``false``, a list of methods, or a ``Line``.

    Args:
        head_only: the head on frozen features, trained with federated averaging.
        centralised: one client that holds all data.
        local_only: clients trained in isolation.
    """

    head_only: bool | Line = True
    centralised: bool | tuple[str, ...] | Line = True
    local_only: bool | tuple[str, ...] | Line = True


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Gates:
    """Conditions for the validity of the results.

    Args:
        rules: conditions such as ``lora >= full - 0.03 at clients.partition.alpha = 0.5`` and ``inside the grid``.
        stop: whether the study stops if one does not hold; otherwise it is only reported.
    """

    rules: tuple[str, ...] = ()
    stop: bool = True


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Report:
    """Content of the tables.

    Args:
        reference: the method that others are compared with; the first one if absent.
        target: a value of the main metric, or a fraction of a method's best: ``0.9 * full``.
        link: the network over which the time to the target is modelled.
    """

    reference: str = ""
    target: float | str | None = None
    link: str = ""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Study:
    """Methods, settings and seeds on one federation.

    Args:
        name: name of the study and its folder.
        base: the configuration shared by all runs, without a method's kind.
        methods: label -> the keys of its ``[method]`` table that are added to or override those of ``base``.
        seeds: seeds of the final runs.
        vary: key -> values; every combination is a separate setting.
        tune: tuning of each method's settings.
        lines: baselines.
        gates: conditions for the validity of the results.
        report: content of the tables.
    """

    name: str
    base: Table
    methods: Annotated[dict[str, Table], Field(min_length=1)]
    seeds: Annotated[tuple[Whole, ...], Field(min_length=1)] = (0, 1, 2)
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = field(default_factory=dict)
    tune: Tuning = Tuning()
    lines: Lines = Lines()
    gates: Gates = Gates()
    report: Report = Report()

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {list(self.seeds)} has a seed twice; each run needs its own")
        for label in (*self.methods, self.name):
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", label):
                raise ConfigError(
                    f"{label!r} has to be usable as a folder name: use letters, digits, '_', '-' and '.', as in "
                    "flasc_16"
                )
        if unknown := [label for label in self.tune.methods if label not in self.labels]:
            raise ConfigError(
                f"tune.methods.{unknown[0]}: there is no such method; there are: {', '.join(self.labels)}"
            )
        if self.reference not in self.labels:
            raise ConfigError(
                f"report.reference = {self.reference!r} is not a method; there are: {', '.join(self.labels)}"
            )
        self._check_keys()

    @property
    def labels(self) -> list[str]:
        """The labels of methods and baselines."""
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
        # a server learning rate has no effect without a server
        sends = MODES[self._tables()[label][0]].sends
        return {key: values for key, values in self.tune.vary.items() if sends or short(key).split(".")[0] in _SHARED}

    def _check_keys(self) -> None:
        """Refuses keys that the study sets for each run, and keys that are a setting twice, or one that is tuned."""
        check_apart(self.vary)
        tuned = {"tune.vary": self.tune.vary}
        tuned |= {f"tune.methods.{label}.vary": found.vary for label, found in self.tune.methods.items()}
        lines = {name: _line(given) for name, given in vars(self.lines).items()}
        tables: dict[str, Mapping[str, Any]] = {"base": self.base, "vary": self.vary, **tuned}
        tables |= {f"lines.{name}.set": line.set for name, line in lines.items() if line}
        for place, table in tables.items():
            if found := [key for key in table if key in _OF_RUNS]:
                raise ConfigError(
                    f"{place} has the key {found[0]!r}, which a study sets for each run; seeds are listed in `seeds`, "
                    "and labels are those of [methods]. Remove it"
                )
        for place, table in tuned.items():
            for key, held in itertools.product(table, self.vary):
                if f"{short(held)}.".startswith(f"{short(key)}."):
                    raise ConfigError(
                        f"{key!r} in {place} replaces {held!r} in vary, so all settings would be the same; keep it in "
                        "one of them"
                    )

    def _tables(self) -> dict[str, tuple[str, Table, Table]]:
        """The mode, the ``[method]`` table and the additional settings of each method and baseline, by label."""
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
                if f"{mode}_{label}" in self.methods:
                    raise ConfigError(
                        f"methods.{mode}_{label} has the label of a baseline; give the method another label, or leave "
                        f"{label!r} out of lines.{_LINES[mode]}"
                    )
                if line:
                    found[f"{mode}_{label}"] = mode, self.methods[label], line.set
        return found


_ADAPTER = TypeAdapter(Study)


def load_study(path: Path) -> Study:
    """Reads a study from a TOML or YAML file, which may extend others.

    Relative paths in ``base`` start beside the file that has them, or else in the working folder.

    Raises:
        ConfigError: there is no such file, or it names something that does not exist.
    """
    document = read(path, _carried)
    base = document.values.get("base")
    if isinstance(base, dict) and "root" not in base and (root := root_of(base, path.parent)):
        base["root"] = root
    with naming(document):
        return parse_study(document.values)


def parse_study(document: Mapping[str, Any]) -> Study:
    """Parses the content of a TOML file into a study.

    Raises:
        ConfigError: naming the offending key.
    """
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        raise ConfigError(explain(error, Study, "")) from error


def _line(given: bool | tuple[str, ...] | Line) -> Line | None:
    if isinstance(given, Line):
        return given
    if isinstance(given, tuple):
        return Line(methods=given) if given else None
    return Line() if given else None


def _carried(values: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """The values of a study file for a file in another folder, see ``fedlora.config.places.carried``."""
    base = values.get("base")
    return {**values, "base": carried(base, source, target)} if isinstance(base, dict) else values

"""An experiment as a value, and as TOML: reading, overriding, explaining what is wrong, writing back."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from fedlora.config.explain import explain
from fedlora.config.handed_over import dealt_as_handed
from fedlora.config.method_table import build_method
from fedlora.config.upgrade import upgraded
from fedlora.core.component import MODEL_CONFIG, Count, Field, Whole, dataclass
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS
from fedlora.population.clients import Clients
from fedlora.recipe import Phase, Recipe
from fedlora.recipe.refusals import check_experiment
from fedlora.tasks import AnySource, AnyTask, Docstrings, Model, TextClassification
from fedlora.tasks.base import as_model
from fedlora.tasks.data.rows import as_source


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Evaluate:
    """When and on what the model is evaluated, in the form in which clients would receive it next (as FLASC does).

    Args:
        every: rounds between two evaluations; the start and the end are always evaluated.
        num_examples: size of the fixed subset of the test examples used between rounds; all of them if absent. The
            end is always evaluated on all.
        dense: where clients receive the model thinned or rounded, also evaluate the server's own; its metrics are
            named ``dense_...``. Where they follow it by differences, the server's own is the model of the run, and
            what a new client would receive is ``newcomer_...``.
        clients: when to evaluate on what each client keeps away from training as well (``clients.holdout``): ``end``
            is after the last round, ``always`` whenever the model is evaluated. The main metric over clients is named
            ``client_mean_...``, ``client_worst_tenth_...`` and ``client_spread_...``, see ``over_clients``.
        num_clients: size of the fixed subset of clients used between rounds; all of them if absent. The end is always
            evaluated on all.

    Raises:
        ConfigError: ``num_clients`` is set, but clients are never evaluated.
    """

    every: Count = 5
    num_examples: Count | None = None
    dense: bool = True
    clients: Literal["never", "end", "always"] = "never"
    num_clients: Count | None = None

    def __post_init__(self) -> None:
        if self.num_clients is not None and self.clients == "never":
            raise ConfigError(
                f"evaluate.num_clients = {self.num_clients} has no effect with evaluate.clients = 'never': remove it, "
                "or set evaluate.clients to always"
            )


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Experiment:
    """Everything that decides a run.

    Args:
        label: the method's name in tables.
        seed: the run's seed; every draw has a named seed of its own that follows from it.
        mode: ``federated``; ``centralised`` trains one client that holds everything, a round being a pass; ``local``
            lets ``num_local`` clients train alone, and reports their mean. In the latter two nothing is sent.
        num_local: clients that train alone in the mode ``local``.
        model: the pre-trained model; a loaded one, or a pair of it and its tokenizer, becomes ``Model(object=...)``.
        task: what it is trained for.
        data: on what; rows that are no source become ``Rows(train=...)``.
        clients: how the data are dealt, and how many clients take part in a round. Rows that were handed over by client
            are dealt so where ``partition`` is left at its default.
        phases: the method.
        evaluate: when the model is evaluated.
        checkpoint_every: rounds between two checkpoints.
        device: where the model lives; ``auto`` takes a GPU if there is one.
    """

    label: str = "run"
    seed: Whole = 0
    mode: Literal["federated", "centralised", "local"] = "federated"
    num_local: Count = 10
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Count = 1
    model: Annotated[Model, BeforeValidator(as_model)] = Model()
    task: AnyTask = TextClassification()
    data: Annotated[AnySource, BeforeValidator(as_source)] = Docstrings()
    clients: Clients = Clients()
    evaluate: Evaluate = Evaluate()
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", dealt_as_handed(self.data, self.clients))
        check_experiment(self)
        for tier, phase in itertools.product(self.clients.tiers, self.phases):
            tier.applied(phase.recipe)

    @property
    def rounds(self) -> int:
        """Rounds of all phases."""
        return sum(phase.rounds for phase in self.phases)


_ADAPTER = TypeAdapter(Experiment)


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment from a TOML file.

    Args:
        path: the file, or a run folder with a ``config.toml``.
        overrides: ``key.key=value`` each; the value is read as TOML, and as plain text where that fails.

    Raises:
        ConfigError: there is no such file, it is no TOML, or it asks for something that is not there.
    """
    return parse(document_of(path, overrides))


def document_of(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a TOML file, or of a run folder's, with overrides; as for ``load``.

    Raises:
        ConfigError: there is no such file, it is no TOML, or an override is none.
    """
    file = path / "config.toml" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"there is no file {file}; `fedlora new flasc > run.toml` writes one to start from")
    document = read_toml(file)
    for assignment in overrides:
        override(document, assignment)
    return document


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: there is no such file, or it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a TOML file there is") from error


def parse(document: Mapping[str, Any]) -> Experiment:
    """An experiment from the content of a TOML file.

    ``[method]`` (see ``build_method``) is expanded into ``phases``; the resolved form has ``phases`` alone.

    Raises:
        ConfigError: with the offending key, the nearest known one, and all that are known there.
    """
    content = upgraded(document)
    if "method" in content:
        if "phases" in content:
            raise ConfigError("a configuration has either [method] or [[phases]], not both; remove one of them")
        method = content.pop("method")
        if not isinstance(method, Mapping) or "kind" not in method:
            raise ConfigError(f"[method] needs a kind, one of: {', '.join(METHODS)}")
        content["phases"] = build_method(method)
        content.setdefault("label", method["kind"])
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise ConfigError(explain(error, Experiment, "")) from error


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Every setting of ``experiment``, defaults included, as TOML values."""
    values: dict[str, Any] = _ADAPTER.dump_python(experiment, mode="json", exclude_none=True)
    return values


def to_toml(experiment: Experiment) -> str:
    """The resolved configuration as text; ``load`` gives the same experiment back."""
    return tomli_w.dumps(resolved(experiment))


def digest(experiment: Experiment) -> str:
    """A name for everything that decides the run's numbers."""
    values = resolved(experiment)
    del values["checkpoint_every"]
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two resolved configurations differ, dotted, with both values."""
    found = []
    for key in sorted(left.keys() | right.keys()):
        mine, other = left.get(key), right.get(key)
        if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
            mine, other = dict(enumerate(mine)), dict(enumerate(other))
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += differences(
                {str(k): v for k, v in mine.items()}, {str(k): v for k, v in other.items()}, f"{prefix}{key}."
            )
        elif mine != other:
            found.append(f"{prefix}{key}: {mine!r} against {other!r}")
    return found


def override(document: dict[str, Any], assignment: str) -> None:
    """Sets one value of a TOML document in place; keys as for ``assign``.

    Args:
        document: what ``tomllib`` read.
        assignment: ``key.key=value``.

    Raises:
        ConfigError: it is not of that form, or a key on the way is no table.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"-s {assignment!r} is not of the form key.key=value")
    assign(document, path.strip(), toml_value(text))


def toml_value(text: str) -> Any:
    """A value read as TOML, and as plain text where that fails."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def assign(document: dict[str, Any], path: str, value: Any) -> None:
    """Sets one value of a TOML document in place.

    A key whose first part is no key of an ``Experiment`` belongs to the method: ``local.epochs`` is
    ``method.local.epochs``. Where the document has phases instead, it is set in the recipe of every phase.

    Args:
        document: what ``tomllib`` read.
        path: dotted; entries of a list by their number.
        value: a TOML value.

    Raises:
        ConfigError: a key on the way is no table, or ``rounds`` is set for several phases at once.
    """
    for full in _routed(document, path):
        *parents, last = full.split(".")
        place: Any = document
        for key in parents:
            place = place[_entry(path, key, place)] if isinstance(place, list) else place.setdefault(key, {})
            if not isinstance(place, dict | list):
                raise ConfigError(f"-s {path!r}: {key!r} is a value, not a table")
        place[_entry(path, last, place) if isinstance(place, list) else last] = copy.deepcopy(value)


def _routed(document: Mapping[str, Any], path: str) -> list[str]:
    """The places in the document that a key stands for."""
    first, phases = path.split(".")[0], document.get("phases")
    method = document.get("method")
    function = METHODS.get(str(method.get("kind"))) if isinstance(method, Mapping) else None
    own = ["method", *(field.name for field in dataclasses.fields(Experiment))]
    others = [*(inspect.signature(function).parameters if function else ()), *inspect.signature(Recipe).parameters]
    # a slip in a key of the experiment is no key of the method
    near = difflib.get_close_matches(first, [*own, *others], n=1)
    if first in own or (near and near[0] in own):
        return [path]
    if "method" in document or not isinstance(phases, list):
        return [f"method.{path}"]
    if path != "rounds":
        return [f"phases.{number}.recipe.{path}" for number in range(len(phases))]
    if len(phases) > 1:
        raise ConfigError(
            f"'rounds' could be those of any of the {len(phases)} phases; name one, as in phases.0.rounds"
        )
    return ["phases.0.rounds"]


def _entry(path: str, key: str, place: list[Any]) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(
            f"-s {path!r}: {key!r} should be the number of one of the {len(place)} entries there, from 0, as in "
            "phases.0.rounds"
        )
    return int(key)

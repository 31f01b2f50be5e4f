"""Experiments as values: parsing them from the content of a TOML file, and writing them back."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from fedlora.config.explain import explain
from fedlora.config.handed_over import dealt_as_handed
from fedlora.config.method_table import build_method
from fedlora.config.stop import Stop
from fedlora.config.track import Tracks
from fedlora.config.upgrade import upgraded
from fedlora.core.component import MODEL_CONFIG, Count, Field, Whole, dataclass
from fedlora.core.devices import DeviceName
from fedlora.core.errors import ConfigError
from fedlora.methods import METHODS
from fedlora.population.clients import Clients
from fedlora.recipe import Phase
from fedlora.recipe.refusals import check_experiment
from fedlora.tasks import AnySource, AnyTask, Docstrings, Model, TextClassification
from fedlora.tasks.base import as_model
from fedlora.tasks.data.rows import as_source


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Evaluate:
    """When and on what data the model is evaluated, in the form that clients would receive next (as in FLASC).

    Args:
        every: rounds between two evaluations; the model is always evaluated at the start and at the end.
        num_examples: size of the fixed subset of test examples used for evaluations during the run; all of them if
            absent. The final evaluation always uses all.
        dense: where clients receive a sparsified or quantized model, also evaluate the server's own parameters; these
            metrics are named ``dense_...``. Where clients track the server's parameters through differences, those
            parameters are the model of the run, and the metrics of the model that a new client would receive are
            named ``newcomer_...``.
        clients: when to evaluate on each client's held-out examples as well (``clients.holdout``): ``end`` is after
            the last round, ``always`` at every evaluation. Summaries of the main metric over clients are named
            ``client_mean_...``, ``client_worst_tenth_...`` and ``client_spread_...``, see ``over_clients``.
        num_clients: size of the fixed subset of clients used for evaluations during the run; all of them if absent.
            The final evaluation always uses all.

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
    """Everything that determines a run.

    Args:
        label: the method's name in tables.
        seed: the run's seed; every random draw uses a named seed derived from it.
        mode: ``federated``; ``centralised`` trains one client that holds all data, a round being one epoch; ``local``
            trains ``num_local`` clients in isolation and reports their mean. The latter two communicate nothing.
        num_local: number of clients trained in isolation in the mode ``local``.
        model: the pre-trained model; a loaded one, or a pair of it and its tokenizer, becomes ``Model(object=...)``.
        task: the task it is trained for.
        data: the data it is trained on; rows that are not a data source become ``Rows(train=...)``.
        clients: how the data are partitioned among clients, and how many clients participate per round. Rows passed
            grouped by client keep that grouping if ``partition`` is left at its default.
        init_from: the folder of a PEFT adapter of LoRA, or of a finished run, whose values the first phase starts from.
        root: the folder from which relative paths start, before the working folder; set when a configuration is read
            from a file, and no part of the run's digest.
        phases: the method.
        evaluate: when the model is evaluated.
        stop: when the run ends before its last round.
        track: experiment trackers to which figures are sent; no part of the run's digest.
        checkpoint_every: rounds between two checkpoints.
        device: the device of the model: ``cpu``, ``cuda``, one of several GPUs as ``cuda:1``, or ``mps``; ``auto`` uses
            CUDA if there is a GPU.
        deterministic: whether CUDA uses kernels that give the same bits in each run (``core.devices``); other devices
            need none.
    """

    label: str = "run"
    seed: Whole = 0
    mode: Literal["federated", "centralised", "local"] = "federated"
    num_local: Count = 10
    device: DeviceName = "auto"
    deterministic: bool = True
    checkpoint_every: Count = 1
    model: Annotated[Model, BeforeValidator(as_model)] = Model()
    task: AnyTask = TextClassification()
    data: Annotated[AnySource, BeforeValidator(as_source)] = Docstrings()
    clients: Clients = Clients()
    evaluate: Evaluate = Evaluate()
    stop: Stop | None = None
    track: Tracks = ()
    init_from: str | None = None
    root: str | None = None
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", dealt_as_handed(self.data, self.clients))
        check_experiment(self)
        for tier, phase in itertools.product(self.clients.tiers, self.phases):
            tier.applied(phase.recipe)

    @property
    def rounds(self) -> int:
        """Total number of rounds over all phases."""
        return sum(phase.rounds for phase in self.phases)


_ADAPTER = TypeAdapter(Experiment)


def parse(document: Mapping[str, Any]) -> Experiment:
    """Parses the content of a TOML file into an experiment.

    ``[method]`` (see ``build_method``) is expanded into ``phases``; the resolved form contains only ``phases``.

    Raises:
        ConfigError: naming the offending key, the closest known key, and all keys known there.
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
        raise ConfigError(explain(error, Experiment, "", beside=["method"])) from error


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Every setting of ``experiment``, defaults included, as TOML values."""
    values: dict[str, Any] = _ADAPTER.dump_python(experiment, mode="json", exclude_none=True)
    if not values["track"]:
        del values["track"]
    return values


def to_toml(experiment: Experiment) -> str:
    """The resolved configuration as text; ``load`` gives the same experiment back."""
    return tomli_w.dumps(resolved(experiment))


def digest(experiment: Experiment) -> str:
    """A hash of everything that determines the run's numerical results."""
    values = resolved(experiment)
    del values["checkpoint_every"]
    for name in ("root", "track"):
        values.pop(name, None)
    values["model"].pop("hub_id", None)
    if experiment.deterministic:  # versions without the key had no other kernels on a CPU
        del values["deterministic"]
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def folder_name(label: str) -> str:
    """A label as a part of a folder's name, so that no label leads elsewhere."""
    return re.sub(r"[/\\]", "_", label)


def default_folder(experiment: Experiment) -> Path:
    """The folder of a run that is given none."""
    return Path("runs") / f"{folder_name(experiment.label)}-{digest(experiment)}"


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two resolved configurations differ, with both values."""
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

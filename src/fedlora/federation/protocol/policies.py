"""Settings of a federation over several machines: a site's identity and policy, and the server's policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedlora.config.explain import explain
from fedlora.config.files import naming, read
from fedlora.core.component import MODEL_CONFIG, Count, Field, NonNegative, Positive, Whole, dataclass
from fedlora.core.devices import DeviceName
from fedlora.core.errors import ConfigError
from fedlora.core.slots import kind_of, named
from fedlora.privacy import CentralGaussian
from fedlora.privacy.examples import ExampleNoise
from fedlora.recipe import Recipe
from fedlora.tasks import Model
from fedlora.tasks.data.opening import Delimiter, Encoding, Format, Reading
from fedlora.tuning.accepted import objection

T = TypeVar("T")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class SitePolicy:
    """Limits on what a site does for a server; None means no limit.

    Args:
        tunings: permitted kinds of tuning, which determine what may be trained and sent.
        classes: user-defined classes, as ``package.module:Class``, that a server may name; their code runs on this
            site. Classes of fedlora itself need no entry.
        max_megabytes: maximum size of one message, in either direction.
        max_steps: maximum number of optimiser steps per turn.
        min_noise: minimum noise multiplier that the server must declare to add to the mean over clients.
        min_example_noise: minimum noise multiplier that this site itself adds to per-example gradients.
        max_seconds: longest time for one message: a turn, or the loading and installing of a model.
        min_cohort: minimum number of clients per round that the server must announce.
        max_runs: maximum number of runs, of all servers together; this limit and the following ones hold across
            restarts.
        max_rounds: maximum number of rounds of all runs together.
        max_epsilon: maximum example-level epsilon of all runs together, at delta = 1e-6; it requires noise for
            examples.
        max_megabytes_per_day: maximum size of all messages of a day, in both directions.
    """

    tunings: tuple[str, ...] | None = None
    classes: tuple[str, ...] = ()
    max_megabytes: Positive | None = None
    max_steps: Whole | None = None
    min_noise: NonNegative | None = None
    min_example_noise: NonNegative | None = None
    max_seconds: Positive | None = None
    min_cohort: Count | None = None
    max_runs: Whole | None = None
    max_rounds: Whole | None = None
    max_epsilon: NonNegative | None = None
    max_megabytes_per_day: Positive | None = None

    def check_settings(self, head: Mapping[str, Any]) -> None:
        """Checks for settings that no server may choose, and classes that are not permitted, before any is imported.

        Args:
            head: the head of a server's message.

        Raises:
            ConfigError: it contains one of them.
        """
        if why := objection(head):
            raise ConfigError(why)
        if unknown := sorted(named(head) - {*self.classes}):
            raise ConfigError(
                f"the class {unknown[0][:200]!r} is not accepted here; limits.classes lists those that are"
            )

    def refusal(self, recipe: Recipe, examples: int, opening: bool = False) -> str:
        """Why a recipe is not accepted; empty if it is.

        Args:
            recipe: the recipe of a job.
            examples: number of the client's examples.
            opening: whether no job has been received yet; a target epsilon is only turned into a noise multiplier with
                the first job.
        """
        if self.tunings is not None and kind_of(recipe.tuning) not in self.tunings:
            return f"tuning {kind_of(recipe.tuning)!r} is not accepted here, only {', '.join(self.tunings)}"
        steps = recipe.local.num_steps(examples)
        if self.max_steps is not None and steps > self.max_steps:
            return f"{steps} steps were requested, but at most {self.max_steps} are accepted here"
        central = recipe.privacy if isinstance(recipe.privacy, CentralGaussian) else None
        return self._noise_refusal(central, opening) or self._example_noise_refusal(recipe.local.example_privacy)

    def _noise_refusal(self, privacy: CentralGaussian | None, opening: bool) -> str:
        if not self.min_noise:
            return ""
        noise = privacy.noise_multiplier if privacy else 0.0
        pending = opening and noise is None
        if not pending and (noise or 0.0) < self.min_noise:
            return f"the mean of clients gets noise {noise or 0.0:g}, but {self.min_noise:g} is required here"
        if privacy and privacy.seed is not None:
            return "the noise of the mean would be drawn from a seed that every site is told, so it could be subtracted"
        return ""

    def _example_noise_refusal(self, privacy: ExampleNoise | None) -> str:
        noise, least = privacy.noise_multiplier if privacy else 0.0, self.min_example_noise
        if least is not None and noise < least:
            return f"examples get noise {noise:g}, but {least:g} is required here"
        limited = least is not None or self.max_epsilon is not None
        if limited and privacy and privacy.seed is not None:
            return "noise for examples would be drawn from a seed known to the server, which could subtract it"
        return ""

    def too_large(self, size: int) -> str:
        """Why a message of ``size`` bytes is not accepted; empty if it is."""
        if self.max_megabytes is not None and size > 1e6 * self.max_megabytes:
            return f"a message has {size / 1e6:.1f} MB, but at most {self.max_megabytes:g} are accepted here"
        return ""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Share:
    """The clients of the server's own partition that a site represents: ``number``, ``number + of``, and so on.

    Args:
        number: number of the site, from 0 to ``of - 1``.
        of: total number of sites.
    """

    number: Whole
    of: Count

    def __post_init__(self) -> None:
        if self.number >= self.of:
            raise ConfigError(f"number = {self.number} of {self.of} sites; sites are numbered from 0 to {self.of - 1}")


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class SiteConfig:
    """A site: its name, rows, model, and policy.

    Exactly one of ``rows`` and ``share`` must be given.

    Args:
        name: the site's name in the ledger.
        rows: training rows, a file or pattern as for ``Files``; rows never leave the site.
        columns: column name used by the task -> name in the file, if different.
        delimiter: as for ``Files``.
        encoding: as for ``Files``.
        max_unpacked_gb: as for ``Files``.
        format: as for ``Files``.
        share: share of the data of the server's configuration, for trials on one machine.
        tier: kind of this site, for ``clients.tiers`` by ``values``.
        model: location of the pre-trained model on this site; by default the server's, if that is ``embedded``.
        device: the device of the model, as in a configuration.
        state: folder for the state kept between rounds.
        poll_seconds: seconds between two polls for work; each costs about a kilobyte.
        limits: the site's policy.

    Raises:
        ConfigError: neither or both of ``rows`` and ``share`` are given, or there is no such encoding.
    """

    name: Name
    rows: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    delimiter: Delimiter | None = None
    encoding: Encoding | None = None
    max_unpacked_gb: Positive | None = None
    format: Format | None = None
    share: Share | None = None
    tier: str = ""
    model: Model | None = None
    device: DeviceName = "auto"
    state: str = "state"
    poll_seconds: Annotated[float, Field(ge=0.05)] = 1.0
    limits: SitePolicy = SitePolicy()

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.share is None):
            raise ConfigError("a site has rows = 'FILE', or a share of the server's data for trials; give one of them")

    @property
    def reading(self) -> Reading:
        """How the rows are read."""
        return Reading(
            delimiter=self.delimiter, encoding=self.encoding, max_unpacked_gb=self.max_unpacked_gb, format=self.format
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a site's TOML or YAML file; paths in it are relative to its folder.

        Raises:
            ConfigError: it cannot be read, or contains unknown keys or values.
        """
        document = read(path, _carried)
        values = document.values
        for key in ("rows", "state"):
            if key in values or key == "state":
                values[key] = str(path.parent / Path(str(values.get(key, "state"))).expanduser())
        model = values.get("model")
        if isinstance(model, dict) and (path.parent / str(model.get("path"))).exists():  # else a hub id, or "embedded"
            values["model"] = {**model, "path": str(path.parent.absolute() / str(model["path"]))}
        with naming(document):
            return parse_as(cls, values, path)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class ServerPolicy:
    """Quorum, timeouts and retries of a server.

    Args:
        min_available: clients that must be reachable before the first round starts; ``min_clients`` if absent.
        min_clients: replies required per round; with fewer, the round is retried.
        round_timeout: seconds after which a round continues without clients that have not replied; by default ten times
            the longest turn so far, but at least ten minutes, and an hour before the first turn.
        rejoin_timeout: seconds for which a round waits for a lost site to reconnect and be sent its jobs again.
        over_sample: ratio of clients asked to clients counted; the first to reply are counted.
        attempts: attempts at a round with too few replies before the run stops.
        max_weight: largest number of examples with which a site that has its own rows is weighted, as a multiple of the
            median site's, where clients are weighted by examples: how many a site has is its own word.
        max_examples: the same as a number, for every client.
    """

    min_available: Count | None = None
    min_clients: Count = 1
    round_timeout: Positive | None = None
    rejoin_timeout: NonNegative = 120.0
    over_sample: Annotated[float, Field(ge=1)] = 1.0
    attempts: Count = 3
    max_weight: Annotated[float, Field(ge=1)] = 2.0
    max_examples: Count | None = None


def _carried(values: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """A site's settings for a file in another folder: its rows stay where they are."""
    rows = values.get("rows")
    if not isinstance(rows, str) or not (source / rows).exists():
        return values
    return {**values, "rows": os.path.relpath(source / rows, target)}


def parse_as(kind: type[T], values: dict[str, Any], path: Path) -> T:
    """Validates ``values`` as a ``kind``.

    Raises:
        ConfigError: naming the problem.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, kind, '')}") from error

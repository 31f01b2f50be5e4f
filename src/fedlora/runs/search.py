"""FLASC-Search: finds the best rank and density under a communication budget, by short runs in pairs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError

from fedlora import config
from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData, prepare
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.core.slots import kind_of
from fedlora.core.state import generator
from fedlora.recipe.modes import MODES
from fedlora.rounds.phases import open_phase
from fedlora.runs.callbacks import Callback
from fedlora.runs.experiment import run
from fedlora.runs.folder import RunFolder
from fedlora.tasks.data.sources import Validation
from fedlora.transport import Link, TopK
from fedlora.tuning import LoRA


@dataclasses.dataclass(frozen=True)
class Trial:
    """A short run of one configuration.

    Args:
        step: the pair that it belongs to; 0 is the start.
        rank: rank of the adapters.
        density: density of both links.
        client_bytes: bytes to one client and back per round, the mean over the run.
        metric: the main metric at the end; None if training failed.
        kept: whether the search continued from here.
        failure: why training failed; empty if it did not.
    """

    step: int
    rank: int
    density: float
    client_bytes: float
    metric: float | None
    kept: bool
    failure: str = ""


class Bounds(NamedTuple):
    """Start and limits of a search.

    Attributes:
        rank: rank of the first configuration.
        density: density of the first configuration.
        factor: factor by which a step multiplies rank or density.
        client_bytes: the budget: bytes to one client and back per round.
        max_rank: the largest rank tried.
    """

    rank: int
    density: float
    factor: int
    client_bytes: float
    max_rank: int


def search(
    experiment: Experiment, folder: Path, bounds: Bounds, *, holdout: float = 0.1, callbacks: Sequence[Callback] = ()
) -> list[Trial]:
    """Grows a small, sparsely sent adapter up to a communication budget (FLASC-Search, arXiv 2406.05233).

    The candidates after ``(rank, density)`` are ``(factor * rank, density)`` and ``(rank, density of equal bytes)``. If
    not even a dense adapter of the old rank takes that many bytes, the new rank is lowered until it does; if even one
    additional rank is too many, only the density grows. Both candidates are trained for the configuration's rounds from
    the same seed, on the same cohorts; the better one is kept, on ties the denser one. The search ends when the next
    step would exceed the budget. This follows the paper's abstract; no code is public.

    Each trial is a run in its own folder, so an interrupted search can be resumed.

    Args:
        experiment: LoRA in one phase; its rounds are those of a trial. The density is applied to ``top_k`` links.
        folder: the folder of the trials, of ``search.json`` (the table) and of ``best.toml``.
        bounds: start and limits of the search.
        holdout: share of the training rows, or natural clients, to compare trials on; with 0, on the test rows.
        callbacks: called during each trial.

    Returns:
        The trials, in order. The result of the search is the best of those that were kept.

    Raises:
        ConfigError: the configuration has no rank or no density, or the first trial exceeds the budget.
        CheckpointError: the folder has a trial of other settings.
    """
    _check_start(bounds)
    configured(experiment, bounds.rank, bounds.density)  # rejects invalid configurations before data are read
    data = prepare(trained := _held_out(experiment, holdout))
    tried = functools.partial(_try, trained, data, folder, callbacks)
    sizes = _Sizes(trained, data, bounds)
    _check(bounds, sizes.of(bounds.rank, bounds.density), "about ", 1.5)  # the estimate is not exact
    best = tried(0, bounds.rank, bounds.density)
    if best.metric is None:
        raise ConfigError(f"the first trial (rank {best.rank}, density {best.density:g}) did not train: {best.failure}")
    _check(bounds, best.client_bytes)

    def merit(trial: Trial) -> float:
        return (trial.metric or 0.0) * (1 if data.task.higher_is_better else -1)

    trials = [best]
    while True:
        spare = bounds.client_bytes - best.client_bytes + sizes.of(best.rank, best.density)
        found = [tried(best.step + 1, *one) for one in sizes.after(best.rank, best.density) if sizes.of(*one) <= spare]
        # a trial may send more than estimated
        fit = [one for one in found if one.metric is not None and one.client_bytes <= bounds.client_bytes]
        better = max(fit, key=merit, default=None)  # on ties, the first one is the denser
        trials += [one if one is better else dataclasses.replace(one, kept=False) for one in found]
        _write(folder, data.task.main_metric, bounds, trials)
        if better is None:
            break
        best = better
    best = max((one for one in trials if one.kept), key=merit)
    RunFolder(folder).write("best.toml", config.to_toml(configured(experiment, best.rank, best.density)))
    return trials


def _check_start(bounds: Bounds) -> None:
    if not 0 < bounds.density <= 1:
        raise ConfigError(f"a density is above 0 and at most 1, and {bounds.density:g} is not; set --density")
    if not math.isfinite(bounds.client_bytes):
        raise ConfigError(f"a budget is a finite number, and {bounds.client_bytes:g} is not; set --kilobytes")
    if bounds.rank > bounds.max_rank:
        raise ConfigError(
            f"the search would start at rank {bounds.rank}, above --max-rank {bounds.max_rank}; raise --max-rank"
        )


def _held_out(experiment: Experiment, share: float) -> Experiment:
    """The experiment with a part of the training data in place of its test data."""
    if not share or isinstance(experiment.data, Validation):
        return experiment
    unit: Literal["clients", "rows"] = "clients" if experiment.clients.column() else "rows"
    try:
        data = Validation(source=experiment.data, share=share, seed=experiment.seed, hold_out=unit)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(
            f"a search holds the share {share:g} of the training rows of data.kind = {kind_of(experiment.data)!r} out, "
            "which needs a share above 0 and below 1 and data on this machine; set --holdout, 0 for none"
        ) from error
    return dataclasses.replace(experiment, data=data)


def _check(bounds: Bounds, sent: float, about: str = "", slack: float = 1.0) -> None:
    """Rejects a first configuration that exceeds the budget."""
    if sent > slack * bounds.client_bytes:
        raise ConfigError(
            f"rank {bounds.rank} at density {bounds.density:g} sends {about}{sent:,.0f} bytes to a client and back, "
            f"above the budget of {bounds.client_bytes:,.0f}; start smaller, or raise the budget"
        )


def _try(
    experiment: Experiment, data: FederatedData, folder: Path, callbacks: Sequence[Callback],
    step: int, rank: int, density: float,
) -> Trial:  # fmt: skip
    chosen = configured(experiment, rank, density)
    path = folder / f"rank-{rank}-density-{density:g}"
    RunFolder(path).check(chosen, extend=False)  # a trial of other settings does not compare with this search's
    try:
        result = run(chosen, path, data=data, callbacks=callbacks)
    except TrainingError as error:  # a diverged trial loses
        return Trial(step, rank, density, 0.0, None, False, str(error))
    sent = sum(result.down_bytes.values()) + sum(result.up_bytes.values())
    turns = result.rounds * experiment.clients.per_round
    return Trial(step, rank, density, sent / turns, result.after[result.main_metric], True)


def _write(folder: Path, metric: str, bounds: Bounds, trials: Sequence[Trial]) -> None:
    table = [dataclasses.asdict(trial) for trial in trials]
    RunFolder(folder).write_json("search.json", {"metric": metric, "bounds": bounds._asdict(), "trials": table})


class _Sizes:
    """Bytes of one message in each direction, from random values in the shapes of a given rank.

    Args:
        experiment: defines the links.
        data: its data.
        bounds: start and limits of the search.
    """

    def __init__(self, experiment: Experiment, data: FederatedData, bounds: Bounds) -> None:
        recipe = configured(experiment, bounds.rank, bounds.density).phases[0].recipe
        workspace = Workspace(data.task, experiment.seed, data.device)
        state, _ = open_phase(workspace, 0, recipe, experiment.seed, 0, None)
        self._experiment, self._params, self._schema = experiment, state.params, state.schema
        self._pairs = state.schema.pairs
        sides = [min(state.params[b].shape[0], state.params[a].shape[1]) for a, b, _ in self._pairs]
        self._most, self._factor = min(bounds.max_rank, *sides), bounds.factor
        self._known: dict[tuple[int, float], int] = {}

    def of(self, rank: int, density: float) -> int:
        """The bytes for a rank and a density."""
        if (rank, density) not in self._known:
            shapes = {name: list(value.shape) for name, value in self._params.items()}
            for a, b, _ in self._pairs:
                shapes[a][0] = shapes[b][1] = rank
            draws = generator(0)
            recipe = configured(self._experiment, rank, density).phases[0].recipe
            values = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
            # frozen parameters are not sent
            roles = recipe.tuning.in_round(self._schema, 0)
            values = {name: value * (roles[name].role != "frozen") for name, value in values.items()}
            links = (recipe.down, recipe.up)
            self._known[rank, density] = sum(len(link.send(values, self._schema, 0, 0).raw) for link in links)
        return self._known[rank, density]

    def after(self, rank: int, density: float) -> list[tuple[int, float]]:
        """The next candidates: a higher density, or a higher rank, of equal bytes."""
        if rank >= self._most:
            return [(rank, min(1.0, self._factor * density))] if density < 1 else []
        top = min(self._factor * rank, self._most)
        if density == 1:
            return [(top, 1.0)]
        dense = self.of(rank, 1.0)
        wider = next((wide for wide in range(top, rank, -1) if self.of(wide, density) <= dense), None)
        if wider is None:
            return [(rank, 1.0)]
        low, high = density, 1.0
        for _ in range(16):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.of(rank, middle) < self.of(wider, density) else (low, middle)
        return [(rank, float(f"{high:.4g}")), (wider, density)]


def configured(experiment: Experiment, rank: int, density: float) -> Experiment:
    """The experiment with a rank and a density.

    Raises:
        ConfigError: there is more than one phase, no LoRA, no ``top_k`` link, or bytes that depend on neither the rank
            nor the density.
    """
    if not MODES[experiment.mode].sends:
        raise ConfigError("a search weighs bytes, which only a federation sends; set mode = 'federated'")
    if len(experiment.phases) != 1 or not isinstance(experiment.phases[0].recipe.tuning, LoRA):
        raise ConfigError("a search varies the rank of LoRA in one phase; use a method such as flasc")
    phase = experiment.phases[0]
    recipe = phase.recipe
    tuning = experiment.phases[0].recipe.tuning
    if tuning.rank_pattern:
        raise ConfigError("a search varies the same rank of all adapters; leave tuning.rank_pattern out")
    if not any(isinstance(link.sparsify, TopK) and not link.stages for link in (recipe.down, recipe.up)):
        raise ConfigError(
            "a search varies the density of links that are top_k and have no stages, and there is none; use method "
            "flasc, or set down.sparsify and up.sparsify"
        )
    if recipe.aggregator.edits_base:
        raise ConfigError(
            f"{kind_of(recipe.aggregator)!r} sends folds, whose size does not depend on the density; use an "
            "aggregator without folds"
        )
    if own := [tier.name for tier in experiment.clients.tiers if tier.rank or tier.down or tier.up]:
        raise ConfigError(
            f"tier {own[0]!r} has a rank or links of its own, and a search varies the same for all clients; leave them "
            "out"
        )
    tuning = dataclasses.replace(tuning, rank=rank)
    down, up = _thinned(recipe.down, density), _thinned(recipe.up, density)
    changed = dataclasses.replace(recipe, tuning=tuning, down=down, up=up)
    label = f"{experiment.label}-rank-{rank}-density-{density:g}"
    return dataclasses.replace(experiment, label=label, phases=(dataclasses.replace(phase, recipe=changed),))


def _thinned(link: Link, density: float) -> Link:
    if not isinstance(link.sparsify, TopK) or link.stages:
        return link
    return dataclasses.replace(link, sparsify=dataclasses.replace(link.sparsify, density=density))

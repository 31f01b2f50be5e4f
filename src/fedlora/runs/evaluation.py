"""Evaluation of a run's model on the test examples and on clients' held-out examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.client.workspace import Workspace
from fedlora.config import Experiment
from fedlora.config.federated_data import FederatedData
from fedlora.core.errors import TrainingError
from fedlora.core.state import ServerState, named_seed
from fedlora.population.tiers import recipes_of
from fedlora.recipe import Recipe
from fedlora.rounds.downlink import Downlink, view


def tested_clients(experiment: Experiment, data: FederatedData, last: bool) -> list[int]:
    """The clients whose held-out rows an evaluation uses."""
    settings, clients = experiment.evaluate, sorted(data.holdout)
    if settings.clients == "never" or (settings.clients == "end" and not last):
        return []
    if last or settings.num_clients is None or settings.num_clients >= len(clients):
        return clients
    rng = np.random.default_rng(named_seed(experiment.seed, "evaluate_clients"))
    return sorted(rng.choice(clients, settings.num_clients, replace=False).tolist())


def uses_all_rows(experiment: Experiment, data: FederatedData) -> bool:
    """Whether evaluations during the run use all test examples, like the final one."""
    limit = experiment.evaluate.num_examples
    return limit is None or limit >= len(data.test_rows)


def evaluate(
    experiment: Experiment,
    data: FederatedData,
    workspace: Workspace,
    recipe: Recipe,
    state: ServerState,
    clients: Sequence[int] | None = None,
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Metrics and warnings, on all test examples unless ``clients`` to evaluate as well are given.

    Args:
        experiment: defines the evaluation.
        data: the data.
        workspace: the resident model; it is overwritten.
        recipe: the recipe of the current phase.
        state: the state to evaluate.
        clients: clients whose held-out rows are evaluated as well; if given, the test examples used during the run are
            the fixed subset.

    Raises:
        TrainingError: a metric is not finite.
    """
    rows = data.test_rows
    if clients is not None and not uses_all_rows(experiment, data):
        rng = np.random.default_rng(named_seed(experiment.seed, "evaluate"))
        rows = np.sort(rng.choice(rows, experiment.evaluate.num_examples, replace=False))
    compute = recipe.local.compute
    own_view = view(recipe, state, experiment.seed)
    views = {"": (own_view, compute)}
    if experiment.evaluate.dense and own_view is not state.params:
        views["dense_"] = state.params, compute
    if experiment.evaluate.dense and recipe.memory == "last_round" and recipe.down.lossy:
        views["newcomer_"] = Downlink(recipe, state, experiment.seed).message({}).start, compute
    for name, tier_recipe in recipes_of(data.tiers, recipe).items():
        views[f"{name}_"] = view(tier_recipe, state, experiment.seed), tier_recipe.local.compute
    metrics: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    main = data.task.main_metric
    for prefix, (params, precision) in views.items():
        workspace.load(recipe, params, state.folds)
        found = workspace.evaluate(rows, data.split, precision)
        metrics |= {f"{prefix}{name}": value for name, value in found.metrics.items()}
        if prefix:
            continue
        warnings += found.warnings
        own = {
            f"{main} of client {client}": workspace.evaluate(data.holdout[client], "train", compute).metrics[main]
            for client in clients or ()
        }
        _check_finite(own)
        metrics |= over_clients(main, list(own.values()), data.task.higher_is_better)
    _check_finite(metrics)
    return metrics, warnings


def over_clients(name: str, values: Sequence[float], higher_is_better: bool) -> dict[str, float]:
    """Summarises a metric over clients, each evaluated on its own rows; all clients have equal weight.

    Args:
        name: the metric.
        values: its value for each client, finite.
        higher_is_better: the metric's direction, which determines the worst clients.

    Returns:
        ``client_mean_``, ``client_worst_tenth_`` (the mean over the worst tenth of clients, their number rounded down
        but at least one) and ``client_spread_`` (the population standard deviation, i.e. divided by n), by name; empty
        without values.

    >>> over_clients("loss", [1.0, 3.0], higher_is_better=False)
    {'client_mean_loss': 2.0, 'client_worst_tenth_loss': 3.0, 'client_spread_loss': 1.0}
    """
    if not values:
        return {}
    ranked = np.sort(values) if higher_is_better else np.sort(values)[::-1]
    return {
        f"client_mean_{name}": float(np.mean(ranked)),
        f"client_worst_tenth_{name}": float(np.mean(ranked[: max(1, len(ranked) // 10)])),
        f"client_spread_{name}": float(np.std(ranked)),
    }


def _check_finite(metrics: dict[str, float]) -> None:
    wrong = {name: value for name, value in metrics.items() if not np.isfinite(value)}
    if wrong:
        raise TrainingError(f"the evaluation has values that are not finite: {wrong}; lower the learning rate")

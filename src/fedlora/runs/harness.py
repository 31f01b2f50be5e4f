"""Evaluation of a run's language model by lm-evaluation-harness (the package ``lm-eval``, extra ``eval``)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedlora.core.errors import ConfigError, DataError, first_line
from fedlora.runs.inference import TrainedRun
from fedlora.tasks.data.tokenized import PreparedTokenized


class Score(NamedTuple):
    """A metric of a task of the harness.

    Args:
        task: the task or group.
        metric: the metric.
        filter: the harness's name for how answers are extracted; usually ``none``.
        value: its value.
        stderr: its standard error, if the harness gives one.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None


def harness(
    run: TrainedRun, tasks: Sequence[str], folder: Path | None = None, batch_size: int = 8, limit: int | None = None
) -> list[Score]:
    """The scores of a run's model, adapter and base changes included, on tasks of lm-evaluation-harness.

    Args:
        run: a run of a causal language model.
        tasks: names of tasks or groups; may contain ``*``.
        folder: a folder with tasks as YAML files, used in place of the harness's own; YAML can name Python functions,
            which run, so it must be trusted.
        batch_size: requests per batch.
        limit: the most rows of each task; all if None.

    Raises:
        ConfigError: lm-eval is not installed, the run's model is no causal language model, or a task is unknown.
        DataError: the data of a task cannot be loaded.
    """
    task = run.task
    if task.auto_class != "AutoModelForCausalLM" or not isinstance(task, PreparedTokenized):
        raise ConfigError(
            f"lm-eval evaluates causal language models, but this run's model is loaded by {task.auto_class}: evaluate "
            "it on a file, by --data"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs the package lm-eval, which is not installed: pip install 'fedlora[eval]'")
    manager = _manager(folder)
    names = [name for asked in tasks for name in _matching(manager, asked, folder)]
    model = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=run.workspace.model.eval(),
        tokenizer=task.tokenizer,
        backend="causal",
        batch_size=batch_size,
        device=str(run.workspace.device),
    )
    evaluate = importlib.import_module("lm_eval.evaluator").simple_evaluate
    try:
        with torch.inference_mode(), run.workspace.autocast(run.recipe.local.compute):
            found = evaluate(model=model, tasks=names, task_manager=manager, limit=limit, log_samples=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"lm-eval could not evaluate {', '.join(names)} ({first_line(error)}): correct the tasks' data, or connect "
            "once so that they can be fetched"
        ) from error
    return [score for name, values in found["results"].items() for score in _scores(name, values)]


def _manager(folder: Path | None) -> Any:
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} with tasks of lm-eval: correct --tasks-from")
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    return manager() if folder is None else manager(include_path=str(folder), include_defaults=False)


def _matching(manager: Any, asked: str, folder: Path | None) -> list[str]:
    found = sorted(manager.match_tasks([asked]))
    if not found:
        place = "lm-eval has" if folder is None else f"the folder {folder} has"
        raise ConfigError(
            f"{place} no task {asked!r}: `lm-eval ls tasks` prints lm-eval's own, and --tasks-from names a folder of "
            "others, one YAML file each"
        )
    return found


def _scores(task: str, values: dict[str, Any]) -> list[Score]:
    """The metrics of a task: keys are ``metric,filter``, and standard errors ``metric_stderr,filter``."""
    scores = []
    for key, value in values.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{how}")
        scores.append(Score(task, metric, how, float(value), error if isinstance(error, float) else None))
    return scores

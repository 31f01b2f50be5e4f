"""Configurations of older versions in today's keys, so that their finished runs can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TASK = {"kind", "problem", "max_length", "pad_to", "eval_batch_size"}
"""What the resolved settings of text classification had in version 0.1."""


def upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document that says the same in today's keys; one of today's comes back as it is.

    ``tuning.lr_ratio`` of version 0.1 is ``local.lr_scale.B``, and classifiers of texts read what the stock class does.

    Args:
        document: a configuration as read from TOML; it is left as it was.
    """
    result = dict(document)
    if isinstance(method := result.get("method"), Mapping):
        result["method"] = _with_lr_scale(method)
    if isinstance(phases := result.get("phases"), list):
        result["phases"] = [_phase(phase) if isinstance(phase, Mapping) else phase for phase in phases]
        # a run's own file has every key
        if isinstance(task := result.get("task"), Mapping) and task.keys() >= _TASK and "pooling" not in task:
            result["task"] = {**task, "pooling": "model"}
    return result


def _phase(phase: Mapping[str, Any]) -> Mapping[str, Any]:
    recipe = phase.get("recipe")
    return {**phase, "recipe": _with_lr_scale(recipe)} if isinstance(recipe, Mapping) else phase


def _with_lr_scale(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    tuning = recipe.get("tuning")
    if not isinstance(tuning, Mapping) or "lr_ratio" not in tuning:
        return recipe
    rest = {key: value for key, value in tuning.items() if key != "lr_ratio"}
    if tuning["lr_ratio"] == 1.0:
        return {**recipe, "tuning": rest}
    local = recipe.get("local", {})
    return {**recipe, "tuning": rest, "local": {**local, "lr_scale": {"B": tuning["lr_ratio"]}}}

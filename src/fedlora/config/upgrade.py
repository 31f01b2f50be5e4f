"""Upgrades configurations of older versions to the current keys, so that their finished runs can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TASK = {"kind", "problem", "max_length", "pad_to", "eval_batch_size"}
"""The resolved settings of text classification in version 0.1."""


def upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """An equivalent document in the current keys; a current document is returned unchanged.

    ``tuning.lr_ratio`` of version 0.1 becomes ``local.lr_scale.B``, and text classifiers pool as the stock class does.

    Args:
        document: a configuration as read from TOML; it is not modified.
    """
    result = dict(document)
    if isinstance(method := result.get("method"), Mapping):
        result["method"] = _with_lr_scale(method)
    if isinstance(phases := result.get("phases"), list):
        result["phases"] = [_phase(phase) if isinstance(phase, Mapping) else phase for phase in phases]
        # the configuration file of a run contains every key
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

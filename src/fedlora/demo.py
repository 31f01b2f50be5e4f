"""The main job on what every installation carries: a real model, real text, four methods on one federation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from fedlora.config import override

ROUNDS = 16
_LOCAL = {"optimizer": {"kind": "adamw", "lr": 1e-2}, "batch_size": 16, "compute": "bf16", "dropout": False}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    # plain averaging and a mask of what changed: the official code's server needs more rounds than a demo has
    "flasc": {"server": {"kind": "sgd", "lr": 1.0}, "reference": "init", "memory": "init"},
    "federa": {},
    "slora": {"warm_local": _LOCAL},
}
"""The methods of the demo, with what each needs beyond the common settings."""


def configuration(method: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of one method of the demo.

    Args:
        method: a key of ``METHODS``.
        overrides: as for ``config.load``.
    """
    document: dict[str, Any] = {
        "label": method,
        "seed": 0,
        "task": {"kind": "text_classification", "max_length": 64},
        "clients": {"num": 100, "per_round": 10, "partition": {"kind": "dirichlet", "alpha": 1.0}},
        "evaluate": {"every": 4, "dense": False},
        "method": {"kind": method, "rounds": ROUNDS, "local": _LOCAL, **METHODS[method]},
    }
    document = copy.deepcopy(document)  # overrides must not reach the tables above
    for one in overrides:
        override(document, one)
    if "warm_local" in METHODS[method] and isinstance(rounds := document["method"].get("rounds"), int):
        document["method"].setdefault("warm_rounds", max(1, rounds // 4))
    return document

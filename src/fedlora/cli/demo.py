"""The demo, on data included in every installation: a real model, real text, four methods on one federation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlora.config import override

ROUNDS = 16
METHODS = ("lora", "flasc", "federa", "slora")
"""The methods of the demo, each with its defaults."""


def configuration(method: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of one method of the demo.

    Args:
        method: one of ``METHODS``.
        overrides: as for ``config.load``.
    """
    document: dict[str, Any] = {
        "label": method,
        "seed": 0,
        "task": {"kind": "text_classification", "max_length": 64},
        "clients": {"num": 100, "per_round": 10, "partition": {"kind": "dirichlet", "alpha": 1.0}},
        "evaluate": {"every": 4, "dense": False},
        "method": {"kind": method, "rounds": ROUNDS},
    }
    for one in overrides:
        override(document, one)
    return document

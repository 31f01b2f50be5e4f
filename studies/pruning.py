"""20 Newsgroups as in ``newsgroups``: FLASC and what its paper compares with, at three budgets of bytes.

A label is a method and the share of dense LoRA's values that it sends: ``flasc_4``. A lower rank sends a share too:
``rank_4``.
"""

from __future__ import annotations

from typing import Any

from studies import newsgroups
from studies.study import Study

RATE = 1e-2
ROUNDS = 30
SHARES = (2, 4, 8, 16)
METHODS = ("flasc", "sparse_adapter", "adapter_lth", "fed_select", "rank")


def table(label: str, rounds: int) -> dict[str, Any]:
    """The ``[method]`` table of a label."""
    name, _, share = label.rpartition("_")
    common = {"rounds": rounds, "local": newsgroups.document("lora", RATE, rounds, 0, False)["method"]["local"]}
    if not name:
        return {"kind": "lora", **common}
    density = 1 / int(share)
    if name == "flasc":
        plain = {"kind": "sgd", "lr": 1.0}
        return {
            "kind": "flasc",
            "down": density,
            "up": density,
            "server": plain,
            "reference": "init",
            "memory": "init",
        } | common
    if name == "rank":
        return {"kind": "lora", "rank": 16 // int(share), **common}
    if name == "sparse_adapter":
        return {"kind": name, "density": density, **common}
    # densities that fall by the same factor in each round and have the share as their mean
    return {"kind": name, "keep": _factor(density, rounds), **common}


def _factor(mean: float, rounds: int) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**turn for turn in range(rounds)) / rounds < mean:
            low = middle
        else:
            high = middle
    return high


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    whole = newsgroups.document("lora", rate, rounds, seed, tuning)
    return whole | {"label": label, "method": table(label, rounds)}


STUDY = Study(
    name="pruning",
    metric="accuracy",
    document=document,
    grids={},
    chosen=dict.fromkeys(["dense", *(f"{method}_{share}" for share in SHARES for method in METHODS)], RATE),
    tuning_rounds=10,
    rounds=ROUNDS,
    shown=(10, 20, 30),
)

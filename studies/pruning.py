"""20 Newsgroups as in ``newsgroups``: FLASC and what its paper compares with, at three budgets of bytes.

A label is a method and the share of dense LoRA's values that it sends: ``flasc_4``. A lower rank sends a share too:
``rank_4``.
"""

from __future__ import annotations

from typing import Any

from studies import newsgroups
from studies.study import Study

ROUNDS = 30
SHARES = (2, 4, 8, 16)
METHODS = ("flasc", "sparse_adapter", "adapter_lth", "fed_select", "rank")
RATE = 1e-2
# what the grids say at a quarter; at a sixteenth FLASC is better at the lower one
FASTER = dict.fromkeys([f"{method}_{share}" for method in ("flasc", "sparse_adapter") for share in (2, 4, 8)], 3e-2)
# with a mean of an eighth after a dense start nothing is left that moves before the end, and fedlora stops the run
STUCK = {f"{method}_{share}" for method in ("adapter_lth", "fed_select") for share in (8, 16)}
LABELS = ["dense", *(f"{method}_{share}" for share in SHARES for method in METHODS if f"{method}_{share}" not in STUCK)]
TUNED = ("flasc_4", "flasc_16", "sparse_adapter_4", "adapter_lth_4", "rank_4")


def table(label: str, rate: float, rounds: int) -> dict[str, Any]:
    """The ``[method]`` table of a label at a client learning rate."""
    name, _, share = label.rpartition("_")
    common = {"rounds": rounds, "local": newsgroups.document("lora", rate, rounds, 0, False)["method"]["local"]}
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
    return whole | {"label": label, "method": table(label, rate, rounds)}


STUDY = Study(
    name="pruning",
    metric="accuracy",
    document=document,
    grids=dict.fromkeys(TUNED, (3e-3, 1e-2, 3e-2, 1e-1)) | {"flasc_2": (1e-2, 3e-2)},
    chosen=dict.fromkeys(LABELS, RATE) | FASTER,
    tuning_rounds=20,
    rounds=ROUNDS,
    shown=(10, 20, 30),
)

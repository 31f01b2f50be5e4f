"""20 Newsgroups over 10 clients that all take part: what error feedback does for TopK(1/64) in 4 bits.

``longer`` is ``feedback`` for three times as many rounds.
"""

from __future__ import annotations

from typing import Any

from studies import newsgroups, wire
from studies.study import Study

RATE = 3e-3
THIN: dict[str, Any] = {"sparsify": {"kind": "top_k", "density": 1 / 64}, "precision": wire.PRECISIONS["4bit"]}


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run: ``dense``, ``thin``, ``feedback`` or ``longer``."""
    rounds *= 3 if label == "longer" else 1
    whole = newsgroups.document("lora", rate, rounds, seed, tuning)
    whole |= {"label": label, "evaluate": {"every": 10, "num_examples": 1000, "dense": False}}
    whole["clients"] |= {"num": 10, "per_round": 10}
    local = whole["method"]["local"] | {"max_steps": 3}
    whole["method"] = {"kind": "fedavg", "rounds": rounds, "local": local}
    if label == "thin":
        whole["method"] |= {"down": THIN | {"reference": "init"}, "up": THIN, "memory": "init"}
    if label in ("feedback", "longer"):
        down, up = THIN | {"reference": "init"}, THIN | {"feedback": True}
        whole["method"] |= {"down": down, "up": up, "memory": "last_round"}
    return whole


STUDY = Study(
    name="silo",
    metric="accuracy",
    document=document,
    grids={},
    chosen={"dense": RATE, "feedback": RATE, "longer": RATE, "thin": RATE},
    tuning_rounds=10,
    rounds=80,
    shown=(10, 20, 30, 40, 60, 80, 120, 160, 200, 240),
)

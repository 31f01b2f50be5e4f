"""20 Newsgroups as in ``newsgroups`` with three tiers of clients, as FLASC's code has them: what do weak clients cost?

``density``: the weakest third gets and sends a sixteenth, the next a quarter, the last everything; ``rank``: ranks 1,
4 and 16; ``norm``: the longest 1, 4 and 16 ranks; ``het``: ``rank`` under HetLoRA's weights. ``all`` and ``none``:
everyone is strong, or weak.
"""

from __future__ import annotations

from typing import Any

from studies import newsgroups
from studies.study import Study

TUNED = ("density", "rank", "norm", "het", "none")
NAMES = ("weak", "middle", "strong")


def tiers(label: str) -> list[dict[str, Any]]:
    """The tiers of a label."""
    found = []
    for place, name in enumerate(NAMES):
        tier: dict[str, Any] = {"name": name, "share": 1 / 3}
        rank, density = 4**place, 1 / 4 ** (2 - place)
        if label == "density" and density < 1:
            # FLASC's code leaves the head out of the mask down, and not up
            down = {"kind": "top_k", "density": density, "quota": {"head": 1.0}}
            tier |= {"down": {"sparsify": down}, "up": {"sparsify": {"kind": "top_k", "density": density}}}
        if label in ("rank", "norm", "het"):
            tier |= {"rank": rank, "rank_by": "norm" if label == "norm" else "order"}
        found.append(tier)
    return found


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    whole = newsgroups.document("lora", rate, rounds, seed, tuning) | {"label": label}
    method = {"kind": "lora", "rounds": rounds, "local": whole["method"]["local"]}
    whole["method"] = method | {"kind": "het_lora", "shrink": None} if label == "het" else method
    if label == "none":
        weak = 1 / 16
        whole["method"] |= {"kind": "flasc", "down": weak, "up": weak, "server": {"kind": "sgd", "lr": 1.0}}
    if label in ("density", "rank", "norm", "het"):
        whole["clients"] |= {"tiers": tiers(label)}
    return whole


STUDY = Study(
    name="tiers",
    metric="accuracy",
    document=document,
    # everyone strong is dense LoRA, whose grid `newsgroups` has
    grids=dict.fromkeys(TUNED, (3e-3, 1e-2, 3e-2)),
    chosen={"all": 1e-2, **dict.fromkeys(TUNED, 3e-2), "het": 1e-2},
    tuning_rounds=20,
    rounds=30,
    shown=(10, 20, 30),
)

"""20 Newsgroups with noise for whole clients: dense LoRA, FFA-LoRA and FLASC at epsilon 2, 8 and infinity.

350 clients, 100 of them in a round on average (Poisson), adapters of rank 4, since noise grows with what is trained. At
infinity updates are clipped and get no noise. The noise has a seed so that runs repeat; the account holds as if it were
secret.
"""

from __future__ import annotations

from typing import Any

from studies import newsgroups
from studies.study import Study

RATE = 1e-2
EPSILONS = ("2", "8", "inf")


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run; a label is a method and its epsilon: ``ffa_8``."""
    name, _, epsilon = label.partition("_")
    whole = newsgroups.document("lora", rate, rounds, seed, tuning)
    whole |= {"label": label, "evaluate": {"every": 5, "num_examples": 1000, "dense": False}}
    whole["clients"] |= {"per_round": 100, "sampling": "poisson"}
    spent = {"noise_multiplier": 0.0} if epsilon == "inf" else {"target_epsilon": float(epsilon)}
    privacy = {"kind": "central_gaussian", "clip_norm": 1.0, "seed": seed, **spent}
    common = {
        "rounds": rounds,
        "rank": 4,
        "local": whole["method"]["local"],
        "server": {"kind": "sgd", "lr": 2.0},
        "privacy": privacy,
    }
    if name == "lora":
        tuned = {"kind": "lora", "rank": common.pop("rank")}
        whole["method"] = {"kind": "fedavg", "tuning": tuned, **common}
    elif name == "ffa":
        whole["method"] = {"kind": "ffa", **common}
    else:
        whole["method"] = {"kind": "flasc", "down": 0.25, "up": 0.25, "reference": "init", "memory": "init", **common}
    return whole


STUDY = Study(
    name="private",
    metric="accuracy",
    document=document,
    grids={},
    chosen={f"{name}_{epsilon}": RATE for name in ("lora", "ffa", "flasc") for epsilon in EPSILONS},
    tuning_rounds=5,
    rounds=15,
    shown=(5, 10, 15),
)

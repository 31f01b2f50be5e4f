"""Banking77 over 30 clients that all take part, at three skews of labels: which methods bear clients that differ?

A label is a method and the concentration of the Dirichlet draw: ``lora_0.1``. All adapters have rank 8.
"""

from __future__ import annotations

from typing import Any

from studies.study import DATA, Study

RULES: dict[str, dict[str, Any]] = {
    "flexlora": {"kind": "svd_redistribute"},
    "fedex": {"kind": "product_exact"},
    "flora": {"kind": "stack"},
}
# rates of first phases: a mask of one weight in a hundred wants a far higher one than all weights
WARM = {"slora": 1e-1, "primed_lora": 1e-3}
ALPHAS = ("0.5", "0.1", "0.01")


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    name, _, alpha = label.rpartition("_")
    source: dict[str, Any] = {"kind": "files", "train": str(DATA / "banking77.train.jsonl.gz")}
    source |= {"test_fraction": 0.1} if tuning else {"test": str(DATA / "banking77.test.jsonl.gz")}
    turn = {"batch_size": 8, "optimizer": {"kind": "adamw", "lr": rate}, "max_steps": 4, "compute": "bf16"}
    method: dict[str, Any] = {"kind": "fedavg" if name in RULES else name, "rounds": rounds, "local": turn}
    if name in RULES:
        method |= {"aggregator": RULES[name], "tuning": {"kind": "lora", "rank": 8}}
    elif name != "full":
        method["rank"] = 8
    if name in WARM:
        warm = turn | {"optimizer": {"kind": "adamw", "lr": WARM[name]}}
        method |= {"warm_rounds": rounds // 4, "warm_local": warm}
    return {
        "label": label,
        "seed": seed,
        "checkpoint_every": 10,
        "task": {"kind": "text_classification", "max_length": 32},
        "data": source,
        "clients": {
            "num": 30,
            "per_round": 30,
            "partition": {"kind": "dirichlet", "scheme": "hsu", "alpha": float(alpha), "min_examples": 2},
        },
        "evaluate": {"every": 10, "num_examples": 1000, "dense": False},
        "method": method,
    }


GRIDS: dict[str, tuple[float, ...]] = {
    "full": (3e-4, 1e-3, 3e-3),
    "lora": (3e-3, 1e-2, 3e-2),
    "ffa": (1e-2, 3e-2, 1e-1, 3e-1),
    "rolora": (3e-3, 1e-2, 3e-2),
    "fedex": (3e-3, 1e-2, 3e-2),
    "flexlora": (3e-3, 1e-2, 3e-2),
    "flora": (3e-3, 1e-2, 3e-2, 1e-1),
    "federa": (3e-3, 1e-2, 3e-2),
    "slora": (3e-3, 1e-2, 3e-2),
    "primed_lora": (3e-3, 1e-2, 3e-2, 1e-1),
}
BEST = {
    "full": 1e-3,
    "lora": 1e-2,
    "ffa": 1e-1,
    "rolora": 1e-2,
    "fedex": 1e-2,
    "flexlora": 1e-2,
    "flora": 1e-2,
    "federa": 1e-2,
    "slora": 1e-2,
    "primed_lora": 3e-2,
}
STUDY = Study(
    name="banking77",
    metric="accuracy",
    document=document,
    grids={f"{name}_0.1": rates for name, rates in GRIDS.items()},
    chosen={f"{name}_{alpha}": BEST[name] for alpha in ALPHAS for name in BEST},
    tuning_rounds=20,
    rounds=40,
    shown=(10, 20, 30, 40),
)

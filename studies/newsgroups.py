"""20 Newsgroups over 350 clients of skewed labels: MiniLM, text classification."""

from __future__ import annotations

from typing import Any

from studies.study import DATA, Study, method


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    source: dict[str, Any] = {"kind": "files", "train": str(DATA / "20news.train.jsonl.gz")}
    source |= {"test_fraction": 0.1} if tuning else {"test": str(DATA / "20news.test.jsonl.gz")}
    table = method(label, rate, rounds, compute="bf16")
    if label == "slora":
        # one weight in a hundred moves little at LoRA's rate
        table["warm_local"] = table["local"] | {"optimizer": {"kind": "adamw", "lr": 1e-1}}
    return {
        "label": label,
        "seed": seed,
        "checkpoint_every": 10,
        "task": {"kind": "text_classification", "max_length": 64},
        "data": source,
        "clients": {"num": 350, "per_round": 10, "partition": {"kind": "dirichlet", "scheme": "flasc", "alpha": 0.1}},
        "evaluate": {"every": 10, "num_examples": 1000, "dense": True},
        "method": table,
    }


STUDY = Study(
    name="newsgroups",
    metric="accuracy",
    document=document,
    grids={
        "lora": (3e-3, 1e-2, 3e-2),
        "flasc": (3e-3, 1e-2, 3e-2),
        "flasc_init": (3e-3, 1e-2, 3e-2),
        "flasc_adamw": (3e-3, 1e-2),
        "federa": (1e-3, 3e-3, 1e-2),
        "slora": (3e-3, 1e-2),
        "full": (1e-4, 3e-4, 1e-3),
    },
    chosen={"lora": 1e-2, "flasc": 3e-2, "flasc_init": 3e-2, "federa": 1e-2, "slora": 1e-2, "full": 3e-4},
    tuning_rounds=20,
    rounds=60,
    shown=(10, 20, 30, 40, 50, 60),
)

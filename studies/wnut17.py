"""WNUT-17 over 30 clients of like sentences (FedNLP's setting): MiniLM, named entities."""

from __future__ import annotations

from typing import Any

from studies.study import DATA, Study, method


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    return {
        "label": label,
        "seed": seed,
        "checkpoint_every": 10,
        "task": {"kind": "token_classification", "max_length": 96},
        "data": {
            "kind": "files",
            "train": str(DATA / "wnut17.train.jsonl.gz"),
            "test": str(DATA / f"wnut17.{'dev' if tuning else 'test'}.jsonl.gz"),
        },
        "clients": {
            "num": 30,
            "per_round": 10,
            "partition": {"kind": "dirichlet", "scheme": "hsu", "alpha": 0.5},
            "skew": {"kind": "clusters", "num": 10, "features": "tfidf"},
        },
        "evaluate": {"every": 5, "dense": True},
        "method": method(label, rate, rounds, compute="bf16"),
    }


STUDY = Study(
    name="wnut17",
    metric="f1",
    document=document,
    grids={
        "lora": (5e-4, 1e-3, 3e-3, 1e-2),
        "flasc": (1e-3, 3e-3, 1e-2),
        "federa": (5e-4, 1e-3, 3e-3),
        "slora": (1e-3, 3e-3),
        "full": (1e-4, 3e-4, 1e-3),
    },
    chosen={"lora": 3e-3, "flasc": 1e-2, "federa": 3e-3, "slora": 3e-3, "full": 3e-4},
    tuning_rounds=15,
    rounds=20,
    shown=(5, 10, 15, 20),
)

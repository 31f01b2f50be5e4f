"""Shakespeare's speakers, a fifth of them held out: stories260K (a Llama of 0.26 M parameters), next words."""

from __future__ import annotations

from typing import Any

from studies.study import DATA, MODELS, Study, method


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    return {
        "label": label,
        "seed": seed + 100 * tuning,  # other speakers are held out while tuning
        "checkpoint_every": 10,
        "model": {"path": str(MODELS / "stories260K")},
        "task": {"kind": "causal_lm", "block_size": 128},
        "data": {"kind": "files", "train": str(DATA / "shakespeare_by_speaker.jsonl.gz")},
        "clients": {
            "per_round": 10,
            "test_clients": 0.2,
            "holdout": 0.1,
            "partition": {"kind": "natural", "column": "speaker", "min_examples": 10},
        },
        "evaluate": {"every": 10, "num_examples": 300, "dense": True, "clients": "end"},
        "method": method(label, rate, rounds, max_steps=20),
    }


STUDY = Study(
    name="shakespeare",
    metric="accuracy",
    document=document,
    grids={
        "lora": (3e-3, 1e-2, 3e-2),
        "flasc": (3e-3, 1e-2, 3e-2),
        "federa": (3e-3, 1e-2),
        "slora": (3e-3, 1e-2),
        "full": (1e-3,),
    },
    chosen={"lora": 1e-2, "flasc": 1e-2, "federa": 1e-2, "slora": 1e-2, "full": 1e-3},
    tuning_rounds=20,
    rounds=40,
    shown=(10, 20, 30, 40),
)

"""An extract of SQuAD over 30 clients of like questions (FedNLP's setting): MiniLM, extractive questions."""

from __future__ import annotations

from typing import Any

from studies.study import DATA, Study, method


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    source: dict[str, Any] = {"kind": "files", "train": str(DATA / "squad.train.jsonl.gz")}
    source |= {"test_fraction": 0.1} if tuning else {"test": str(DATA / "squad.test.jsonl.gz")}
    return {
        "label": label,
        "seed": seed,
        "checkpoint_every": 10,
        "task": {"kind": "question_answering", "max_length": 256, "stride": 64},
        "data": source,
        "clients": {
            "num": 30,
            "per_round": 5,
            "partition": {"kind": "dirichlet", "scheme": "hsu", "alpha": 0.5},
            "skew": {"kind": "clusters", "num": 30, "features": "tfidf"},
        },
        "evaluate": {"every": 5, "num_examples": 300, "dense": True},
        "method": method(label, rate, rounds, compute="bf16", max_steps=4),
    }


STUDY = Study(
    name="squad",
    metric="f1",
    document=document,
    grids={},  # not tuned
    chosen={"lora": 3e-3, "flasc": 3e-3, "federa": 3e-3, "slora": 3e-3},
    tuning_rounds=8,
    rounds=10,
    shown=(5, 10),
)

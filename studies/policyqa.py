"""PolicyQA over the 20 web sites it was read from, tested on 20 others: MiniLM, extractive questions."""

from __future__ import annotations

from typing import Any

from studies.study import DATA, Study, method


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    source: dict[str, Any] = {"kind": "files", "train": str(DATA / "policyqa.train.jsonl.gz")}
    source |= {"test_fraction": 0.01} if tuning else {"test": str(DATA / "policyqa.test.jsonl.gz")}
    return {
        "label": label,
        "seed": seed,
        "checkpoint_every": 10,
        "task": {"kind": "question_answering", "max_length": 192, "stride": 64},
        "data": source,
        "clients": {
            "per_round": 5,
            "partition": {"kind": "natural", "column": "title"},
            "test_clients": 0.2 if tuning else 0.0,  # whole sites are held out for tuning too
        },
        "evaluate": {"every": 4, "num_examples": 400, "dense": True},
        "method": method(label, rate, rounds, compute="bf16", max_steps=4),
    }


STUDY = Study(
    name="policyqa",
    metric="f1",
    document=document,
    grids={},  # not tuned
    chosen={"lora": 3e-3, "flasc": 3e-3, "federa": 3e-3, "slora": 3e-3},
    tuning_rounds=8,
    rounds=16,
    shown=(4, 8, 12, 16),
)

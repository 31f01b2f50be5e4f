"""CIFAR-10 over 100 clients of skewed labels: MobileNetV2 at 64 x 64, image classification."""

from __future__ import annotations

from typing import Any

from studies.study import DATA, MODELS, Study, method


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    source: dict[str, Any] = {"kind": "files", "train": str(DATA / "cifar10_jpeg.train.parquet")}
    source |= {"test_fraction": 0.1} if tuning else {"test": str(DATA / "cifar10_jpeg.test.parquet")}
    return {
        "label": label,
        "seed": seed,
        "checkpoint_every": 10,
        "model": {"path": str(MODELS / "mobilenet_v2_1.0_224")},
        "task": {"kind": "image_classification", "size": 64, "augmentation": "flip"},
        "data": source,
        "clients": {"num": 100, "per_round": 10, "partition": {"kind": "dirichlet", "scheme": "flasc", "alpha": 0.1}},
        "evaluate": {"every": 5, "num_examples": 500, "dense": True},
        "method": method(label, rate, rounds, max_steps=5),
    }


STUDY = Study(
    name="cifar10",
    metric="accuracy",
    document=document,
    grids={
        "lora": (5e-4, 1e-3, 2e-3),
        "flasc": (1e-3, 2e-3, 4e-3),
        "federa": (3e-4, 1e-3),
        "slora": (5e-4, 1e-3, 2e-3),
        "full": (1e-4, 3e-4),
    },
    chosen={"lora": 1e-3, "flasc": 4e-3, "federa": 3e-4, "slora": 2e-3, "full": 1e-4},
    tuning_rounds=8,
    rounds=30,
    shown=(5, 10, 20, 30),
)

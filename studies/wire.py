"""20 Newsgroups as in ``newsgroups``, at several densities and precisions: accuracy against real bytes.

A label names what is sent: ``dense-bfloat16``; ``flasc-16-4bit`` (FLASC, a sixteenth both ways, ranked from the start,
values of 4 bits), ``flasc-16-4bit-ef`` (with error feedback up, and down the difference to what a client holds),
``flasc-4-4bit-tuned`` (at the clients' learning rate that suits a quarter: see ``newsgroups``); and
``links-4bit-1bit_1.5`` for any links down and up, and the server's learning rate; ``ffa-...`` the same with an ``A``
that keeps still.
"""

from __future__ import annotations

from typing import Any

from studies import newsgroups
from studies.study import Study

RATE = 1e-2  # the best of dense LoRA's grid in ``newsgroups``, and in `pruning` of FLASC's at a sixteenth
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"kind": "float32"},
    "bf16": {"kind": "bfloat16"},
    "8bit": {"kind": "uniform", "bits": 8},
    "4bit": {"kind": "uniform", "bits": 4},
    "2bit": {"kind": "uniform", "bits": 2},
    "1bit": {"kind": "uniform", "bits": 1},
}


def link(text: str) -> dict[str, Any]:
    """``4bit``: everything, at that precision; ``4bit@16``: the largest sixteenth; ``1bit~8``: a random eighth.

    ``!`` at the end: with error feedback.
    """
    if text.endswith("!"):
        return link(text[:-1]) | {"feedback": True}
    for sign, kind in (("@", "top_k"), ("~", "random_k")):
        precision, _, share = text.partition(sign)
        if share:
            return {"sparsify": {"kind": kind, "density": 1 / float(share)}, "precision": PRECISIONS[precision]}
    return {"precision": PRECISIONS[text]}


def table(label: str, client_rate: float, rounds: int) -> dict[str, Any]:
    """The ``[method]`` table of a label at a client learning rate."""
    kind, *settings = label.split("-")
    server = {"kind": "sgd", "lr": 1.0}
    local = newsgroups.document("lora", client_rate, rounds, 0, False)["method"]["local"]
    common = {"rounds": rounds, "local": local, "server": server}
    if kind == "dense":
        precision, _, rate = settings[0].partition("_")
        settings, common["server"] = [precision], {"kind": "sgd", "lr": float(rate or 1)}
        return {"kind": "lora", "precision": PRECISIONS[settings[0]], **common}
    if kind == "flasc":
        share, precision, *rest = settings
        feedback = rest == ["ef"]
        return {
            "kind": "flasc", "down": 1 / int(share), "up": 1 / int(share), "precision": PRECISIONS[precision],
            "reference": "init", "memory": "last_round" if feedback else "init", "feedback": feedback, **common,
        }  # fmt: skip
    down, up = settings
    up, _, rate = up.partition("_")
    common["server"] = {"kind": "sgd", "lr": float(rate or 1)}
    common["tuning"] = {"kind": "lora", "train": "B" if kind == "ffa" else "both"}
    return {"kind": "fedavg", "down": link(down) | {"reference": "init"}, "up": link(up), "memory": "init", **common}


def document(label: str, rate: float, rounds: int, seed: int, tuning: bool) -> dict[str, Any]:
    """The whole configuration of one run."""
    whole = newsgroups.document("lora", rate, rounds, seed, tuning)
    evaluate = {"every": 15, "num_examples": 1000, "dense": label.endswith("-ef")}
    return whole | {"label": label, "evaluate": evaluate, "method": table(label, rate, rounds)}


LABELS = (
    "dense-fp32",
    "links-4bit-1bit",
    "links-2bit@4-1bit@16",
    "links-4bit-1bit_1.5",
    "dense-fp32_1.5",
    "dense-fp32_2",
    "links-4bit-1bit_2",
    "links-4bit-1bit_3",
    "links-2bit-1bit_3",
    "links-2bit@4-1bit_2",
    "links-2bit@8-1bit_2",
    "links-2bit@8-1bit_2.4",
    "links-2bit@16-1bit_2",
    "ffa-4bit-1bit_2",
    "ffa-2bit-1bit_2",
    "ffa-4bit-1bit_4",
    "links-2bit-1bit_1.5",
    "links-2bit!-1bit_1.5",
    "links-4bit-1bit~4_1.5",
    "links-2bit-1bit~4_1.5",
    "links-2bit!-1bit~4_1.5",
    "links-2bit@2-1bit~4_1.5",
    "links-2bit@4-1bit_1.5",
    "flasc-4-fp32",
    "flasc-4-fp32-ef",
    "flasc-16-fp32",
    "flasc-64-fp32",
    "flasc-16-4bit-ef",
    "flasc-64-4bit-ef",
    "dense-bf16",
    "flasc-4-4bit",
    "flasc-4-8bit",
    "flasc-16-4bit",
    "flasc-64-4bit",
    "flasc-4-4bit-ef",
    "flasc-16-8bit",
    "flasc-64-8bit",
    "flasc-4-8bit-ef",
    "flasc-16-8bit-ef",
    "flasc-64-8bit-ef",
    "flasc-16-fp32-ef",
    "flasc-64-fp32-ef",
    "flasc-4-4bit-tuned",
)
STUDY = Study(
    name="wire",
    metric="accuracy",
    document=document,
    grids={},
    chosen=dict.fromkeys(LABELS, RATE) | {"flasc-4-4bit-tuned": 3e-2},
    tuning_rounds=20,
    rounds=60,
    shown=(15, 30, 45, 60),
)

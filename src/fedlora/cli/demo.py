"""The demos, on data included in every installation: a real model, real text, several methods on one federation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedlora.config import override


class Demo(NamedTuple):
    """A demo.

    Args:
        methods: the methods that it compares, each with its defaults.
        about: a sentence on its model, data and clients.
        question: an input for a model that it trained.
        document: its configuration, without label and method.
        method: what all methods have in common.
    """

    methods: tuple[str, ...]
    about: str
    question: str
    document: dict[str, Any]
    method: dict[str, Any]


CLASSIFIER = Demo(
    methods=("lora", "flasc", "federa", "slora"),
    about="Model all-MiniLM-L6-v2 (22.7 M parameters); data: docstrings of this Python's standard library, 20 packages "
    "to classify; 100 clients with skewed labels.",
    question="Parse a MIME message from a file.",
    document={
        "task": {"kind": "text_classification", "max_length": 64},
        "clients": {"num": 100, "per_round": 10, "partition": {"kind": "dirichlet", "alpha": 1.0}},
        "evaluate": {"every": 4, "num_examples": 256, "dense": False},  # the first step soon; the end uses all
    },
    method={"rounds": 16},
)
"""The default: a classifier of sentences."""

LLM = Demo(
    methods=("lora", "flasc", "federa"),
    about="Model SmolLM2-135M-Instruct (134.5 M parameters); data: which package of this Python's standard library has "
    "a docstring, as questions and answers; 20 clients, with answers skewed.",
    question="Which package says: Parse XML document from sequence of string fragments.",
    document={
        "model": {"path": "smollm2"},
        "task": {"kind": "instruction", "max_length": 48, "generate": 48, "max_new_tokens": 5},
        "data": {"kind": "docstring_questions", "num_packages": 8, "max_words": 12, "max_train": 800, "max_test": 48},
        "clients": {
            "num": 20,
            "per_round": 2,
            "partition": {"kind": "dirichlet", "alpha": 1.0},
            "skew": {"kind": "column", "name": "answer"},
        },
        "evaluate": {"every": 3, "dense": False},
    },
    method={"rounds": 6, "rank": 8, "local": {"batch_size": 4, "max_steps": 2}},
)
"""``--llm``: instruction tuning of a language model, with few short sequences, so that two cores suffice."""


def configuration(demo: Demo, method: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of one method of a demo.

    Args:
        demo: which demo.
        method: one of its methods.
        overrides: as for ``config.load``.
    """
    document: dict[str, Any] = {
        "label": method,
        "seed": 0,
        **demo.document,
        "method": {"kind": method, **demo.method},
    }
    for one in overrides:
        override(document, one)
    return document

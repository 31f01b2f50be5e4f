"""Whether the weights of a pre-trained model are those that its configuration describes, neither fewer nor others."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from fedlora.core.errors import ConfigError

NOTES = "notes_on_weights"
"""The attribute of a loaded model that holds sentences for the ledger."""
_LAYER = re.compile(r"\.\d+\.")
_MOST_LACKING = 0.5
"""The share of a backbone's parameters above which missing ones mean that the weights are of another model."""


def check_complete(loaded: nn.Module, report: Mapping[str, Any], head: Collection[str], path: str) -> None:
    """Refuses weights that are not those of the model, of which ``transformers`` would draw the rest at random.

    Args:
        loaded: the model.
        report: which names were missing, unexpected, or of another shape.
        head: the parameters that a checkpoint need not have.
        path: the model's, for the message.

    Raises:
        ConfigError: a parameter of the backbone has another shape, or most of them are missing.
    """
    backbone = [name for name, _ in loaded.named_parameters() if name not in head]
    for name, found, expected in sorted(report["mismatched_keys"]):
        if name in backbone:
            raise ConfigError(
                f"the weights of {path!r} do not fit its config.json: {name} has the shape {tuple(found)} in the "
                f"weights, but {tuple(expected)} by the configuration: use both files of one model"
            )
    missing = [name for name in backbone if name in report["missing_keys"]]
    if len(missing) > _MOST_LACKING * len(backbone):
        others = f", but has {_some(sorted(report['unexpected_keys']))}" if report["unexpected_keys"] else ""
        raise ConfigError(
            f"the weights of {path!r} are not those of a {type(loaded).__name__}: it lacks {len(missing)} of "
            f"{len(backbone)} parameters of the backbone, {_some(missing)}{others}: use config.json and weights of "
            "one model"
        )


def notes_on(loaded: nn.Module, report: Mapping[str, Any], expected: Collection[str], path: str) -> tuple[str, ...]:
    """Sentences on parameters that start from random values, and on layers of the checkpoint that are not used.

    Args:
        loaded: the model as it is trained.
        report: see ``check_complete``.
        expected: the parameters that are fresh in any checkpoint.
        path: the model's.
    """
    names = [name for name, _ in loaded.named_parameters()]
    drawn = [name for name in names if name in report["missing_keys"] and name not in expected]
    notes = []
    if drawn:
        notes.append(
            f"the weights of {path!r} lack {_some(drawn)}, which are not of a new head: they start from random values, "
            "and are trained and sent like the head"
        )
    # others, such as a pooler or the head of another task, are left out by many classes
    prefix = f"{getattr(loaded, 'base_model_prefix', None)}."
    unused = sorted(name for name in report["unexpected_keys"] if name.startswith(prefix) and _LAYER.search(name))
    if unused:
        notes.append(
            f"the weights of {path!r} have {_some(unused)}, layers for which config.json describes no place: they are "
            "not used"
        )
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]

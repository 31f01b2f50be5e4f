"""The settings of the papers' official code, where it exists."""

from __future__ import annotations

from typing import Any

from fedlora.core.errors import ConfigError

_FLASC_CODE: dict[str, Any] = {
    "server": {"kind": "adamw", "lr": 5e-3, "weight_decay": 0.01},
    "local": {
        "optimizer": {"kind": "sgd", "lr": 5e-4, "momentum": 0.9},
        "batch_size": 16,
        "epochs": 1,
        "dropout": False,
    },
}
"""From github.com/imkevinkuo/flasc at commit 17c7063: the script for heterogeneous clients, on 20 Newsgroups.

Its server uses ``torch.optim.AdamW`` with PyTorch's decay of 0.01; ``from_pretrained`` leaves the model in evaluation
mode, so that its own dropout is off, while the dropout of PEFT's new layers is on."""

_DROPOUT = {"tuning": {"dropout": 0.1}}
_HEAD_TOO: dict[str, Any] = {"whole_head": False}

PAPER: dict[str, dict[str, Any]] = {
    "flasc": _FLASC_CODE | {"dropout": 0.1, "reference": "zero"},
    "lora": _FLASC_CODE | _DROPOUT,
    "ffa": _FLASC_CODE | _DROPOUT | {"server": {"kind": "adamw", "lr": 5e-3, "weight_decay": 0.0}},
    "full": _FLASC_CODE,
    "sparse_adapter": _FLASC_CODE | _DROPOUT | _HEAD_TOO,
    "adapter_lth": _FLASC_CODE | _DROPOUT | _HEAD_TOO,
    "fed_select": _FLASC_CODE | _DROPOUT | _HEAD_TOO,
}
"""The settings of ``preset = "paper"``, by method: FLASC, and the baselines that FLASC's code has flags for.

``ffa`` has no weight decay on the server: it would change the frozen factor, whereas the optimiser in the official code
skips parameters without a gradient."""


def paper(method: str) -> dict[str, Any]:
    """The arguments of ``preset = "paper"``, to be used as keys of ``[method]``.

    Raises:
        ConfigError: this method has no known official code.
    """
    if method not in PAPER:
        raise ConfigError(
            f"method {method!r} has no preset 'paper': no official code with its settings is public; "
            f"docs/methods.md has the details. There is one for: {', '.join(PAPER)}"
        )
    return PAPER[method]

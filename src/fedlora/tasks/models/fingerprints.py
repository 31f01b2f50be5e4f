"""Fingerprints of what a run depends on: the base model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from fedlora.tasks.base import Model

NAMES = {"data": "the data have", "model": "the base model has", "tokenizer": "the tokenizer has"}
"""What a run depends on, as the subject of a sentence."""


def base_digest(model: Model) -> str:
    """Identifies a pre-trained model: a hash of its files, or the hub's id and revision, or that of an object."""
    if model.object:
        return str(model.object.fingerprint)
    path = Path(model.resolve())
    if not path.is_dir():
        return f"{model.path}@{model.revision or 'main'}"
    digest = xxhash.xxh3_128()
    for file in sorted(path.iterdir()):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
            digest.update(file.name.encode())
            with file.open("rb") as opened:
                while chunk := opened.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()


def changed(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What has changed since it was recorded; what an older version did not record counts as unchanged."""
    return [name for name in NAMES if name in recorded and name in found and recorded[name] != found[name]]

"""Fingerprints of what a run depends on: the base model, its tokenizer or image processor, an adapter to start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from fedlora.tasks.base import Model

_WEIGHTS = (".safetensors", ".bin")
NAMES = {
    "data": "the data have",
    "model": "the base model has",
    "tokenizer": "the tokenizer has",
    "processor": "the image processor has",
    "adapter": "the adapter of init_from has",
}
"""What a run depends on, as the subject of a sentence."""


def base_digest(model: Model) -> str:
    """Identifies a pre-trained model: a hash of its files, or the hub's id and revision, or that of an object."""
    if model.object:
        return str(model.object.fingerprint)
    path = Path(model.resolve())
    if not path.is_dir():
        return f"{model.path}@{model.revision or 'main'}"
    return _of_files(file for file in path.iterdir() if file.name == "config.json" or file.suffix in _WEIGHTS)


def adapter_digest(folder: Path) -> dict[str, str]:
    """Identifies an adapter of PEFT or of a finished run, as ``adapter``; empty if there is none in the folder."""
    for one in (folder, folder / "adapter"):
        if (one / "adapter_config.json").is_file():
            files = (file for file in one.rglob("*") if file.name == "adapter_config.json" or file.suffix in _WEIGHTS)
            return {"adapter": _of_files(files)}
    return {}


def _of_files(files: Iterable[Path]) -> str:
    digest = xxhash.xxh3_128()
    for file in sorted(files):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def changed(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What has changed since it was recorded; what an older version did not record counts as unchanged."""
    return [name for name in NAMES if name in recorded and name in found and recorded[name] != found[name]]

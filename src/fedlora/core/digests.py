"""Digests of written files, by which damage is found when they are read. They detect accidents, not attackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_64, xxh3_64_hexdigest

DIGESTS = "digests.json"
"""The digest of each other file of a folder, by its path in the folder."""
_EDITED = "README.md"
"""The model card, which users edit."""


def of_file(path: Path) -> str:
    """The digest of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def seal_folder(folder: Path) -> None:
    """Writes ``digests.json``, with the digest of every file of the folder but the model card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (_EDITED, DIGESTS))
    found = {path.relative_to(folder).as_posix(): of_file(path) for path in files}
    (folder / DIGESTS).write_text(json.dumps(sealed({"files": found}), indent=1) + "\n", encoding="utf-8")


def damaged(folder: Path) -> str | None:
    """The first file of a folder that is missing or differs from what was written; None if there is none.

    A folder without ``digests.json``, as older versions wrote it, is not checked.
    """
    try:
        held = unsealed(json.loads((folder / DIGESTS).read_text(encoding="utf-8")))["files"]
        return next((str(name) for name, digest in held.items() if _differs(folder / name, digest)), None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError):
        return DIGESTS


def _differs(path: Path, digest: str) -> bool:
    try:
        return of_file(path) != digest
    except OSError:
        return True


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of its other entries as its last one, ``digest``."""
    return {**value, "digest": _of(value)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an object that ``sealed`` gave; one without a digest, as older versions wrote it, is not checked.

    Raises:
        ValueError: it is no JSON object, or not the one that was written.
    """
    if not isinstance(value, Mapping):
        raise ValueError("it is no JSON object")
    entries = {key: one for key, one in value.items() if key != "digest"}
    if "digest" in value and value["digest"] != _of(entries):
        raise ValueError("it differs from what was written")
    return entries


def _of(value: Mapping[str, Any]) -> str:
    return xxh3_64_hexdigest(json.dumps(value, allow_nan=False).encode())

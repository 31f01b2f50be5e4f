"""The name by which others find a base model: a hub id with its revision, never a path of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fedlora.core.later import huggingface_hub
from fedlora.tasks.base import HUB_IDS, Model
from fedlora.tasks.models.objects import origin_of

HUB_ID = r"[\w.-]+(/[\w.-]+)?"
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?")
"""Where the cache of the Hub keeps a revision of a model."""
_LONGEST_CARD = 1 << 20


class PublicName(NamedTuple):
    """A base model as others know it.

    Args:
        id: its hub id; of a local folder or file that has none, the folder's or file's own name; empty if unknown.
        revision: the hub revision that was asked for, if any.
        on_hub: whether ``id`` is a hub id.
    """

    id: str
    revision: str | None = None
    on_hub: bool = False


def public_name(model: Model) -> PublicName:
    """The public name of a base model.

    The ``_name_or_path`` in a folder's ``config.json`` is not used: it names what the folder's model was made from,
    whose weights may be others.

    Args:
        model: the model, with a path that is valid in the working folder.
    """
    if model.hub_id is not None:
        return PublicName(model.hub_id, model.revision, on_hub=True)
    if model.object is None and model.path in HUB_IDS:
        return PublicName(HUB_IDS[model.path], on_hub=True)
    origin = origin_of(model.object) if model.object else model.path
    here = os.path.abspath(Path(origin).expanduser())
    if found := _SNAPSHOT.search(Path(here).as_posix()):
        return PublicName(found[1].replace("--", "/"), found[2], on_hub=True)
    if origin and (os.path.exists(here) or not re.fullmatch(HUB_ID, origin) or origin.lower().endswith(".gguf")):
        return PublicName(PurePosixPath(here.replace("\\", "/")).name)
    return PublicName(origin, None if model.object else model.revision, on_hub=bool(origin))


def license_of(model: Model) -> str | None:
    """The license of a base model, if it is a built-in one or its folder's model card has it.

    Args:
        model: the model, with a path that is valid in the working folder.
    """
    if model.object is None and model.path in HUB_IDS:
        return "apache-2.0"
    origin = origin_of(model.object) if model.object else model.path
    card = Path(origin).expanduser() / "README.md"
    return _license(card) if origin and card.is_file() and card.stat().st_size < _LONGEST_CARD else None


def _license(card: Path) -> str | None:
    try:
        found = (huggingface_hub.metadata_load(card) or {}).get("license")
    except Exception:  # a file of any content makes the reader of its YAML raise anything
        return None
    return found if isinstance(found, str) and found != "other" else None

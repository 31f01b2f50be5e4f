"""The base model of a finished run, if it was passed from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError
from fedlora.tasks import Model
from fedlora.tasks.base import as_model
from fedlora.tasks.models.objects import loaded_again


def base_model(known: Model, given: Any, recorded: Mapping[str, Mapping[str, str]], path: Path) -> Model:
    """The base model of a run: as named by its configuration, or passed again by the caller.

    Args:
        known: the model in the run's configuration.
        given: the model passed by the caller, or None.
        recorded: the manifest's entries on objects passed from Python, by setting.
        path: the run's folder, for messages.

    Raises:
        ConfigError: the model is not available, or a different one was passed.
    """
    if known.object is None or known.tokenizer is None:
        if given is not None:
            raise ConfigError(
                f"the run in {path} reads its base model from {known.path!r}, which cannot be replaced: leave "
                "`model` out"
            )
        return known
    fingerprints = {"object": known.object.fingerprint, "tokenizer": known.tokenizer.fingerprint}
    if given is None:
        origins = {part: recorded.get(f"model.{part}", {}).get("origin", "") for part in fingerprints}
        parts = loaded_again(fingerprints, origins)
        if parts is None:
            folder = origins["object"]
            looked = f", and {folder} is not a local folder with the same content" if folder else ""
            raise ConfigError(
                f"the base model of the run in {path} was passed from Python{looked}: pass the same again, by "
                "fedlora.load_run(path, model=fedlora.Model(object=..., tokenizer=...))"
            )
        return dataclasses.replace(known, **parts)
    chosen = as_model(given)
    for part, name in (("object", "weights"), ("tokenizer", "tokenizer")):
        held = getattr(chosen, part, None)
        found = held.fingerprint if held else "none"
        if found != fingerprints[part]:
            raise ConfigError(
                f"the {name} passed ({found}) are not those of the run in {path} ({fingerprints[part]}): pass "
                "the objects that the run started with"
            )
    return dataclasses.replace(known, object=chosen.object, tokenizer=chosen.tokenizer)

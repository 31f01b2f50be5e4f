"""A start from an adapter that was trained before: a PEFT adapter, or that of a finished run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedlora.core.digests import DIGESTS, damaged
from fedlora.core.errors import ConfigError, first_line
from fedlora.core.tree import Tree
from fedlora.tuning.base import Installed, Tuning
from fedlora.tuning.lora import LoRA
from fedlora.tuning.peft import EDITS_BASE
from fedlora.tuning.peft_names import ending_of, from_peft
from fedlora.tuning.targets import check_endings, of_ending

_SETTINGS, _TENSORS, _HEAD = "adapter_config.json", "adapter_model.safetensors", Path("2_Dense", "model.safetensors")
_CLASSES = "id2label.json"


def read_adapter(folder: Path, tuning: Tuning, installed: Installed, start: Tree) -> Tree:
    """The initial values of trained parameters from an adapter of LoRA, whose function they compute at the start.

    With another scale the factor ``B`` is rescaled. A smaller rank is filled up: further rows of ``A`` start
    as ``init`` draws them, further columns of ``B`` at zero. A head with other outputs is left out; one with the same
    classes in another order gets the order of the model's.

    Args:
        folder: with ``adapter_config.json``, or the folder of a finished run.
        tuning: the tuning of the first phase.
        installed: the model it is installed in.
        start: the values without the adapter.

    Raises:
        ConfigError: there is no such adapter, or its parameters have no place in the model.
    """
    if not isinstance(tuning, LoRA) or not tuning.lost_ranks_are_neutral:
        raise ConfigError(
            "init_from starts LoRA from an adapter, but the first phase trains something else, or starts from an SVD: "
            "use `lora` with init = { kind = 'kaiming' }, or leave init_from out"
        )
    folder = _adapter_folder(folder.expanduser())
    settings, tensors = _settings(folder, tuning), _tensors(folder)
    values: Tree = {}
    for key, value in tensors.items():
        name = _place(key, start)
        if name is None:
            raise ConfigError(
                f"{folder} holds {key}, which this run does not train: give method.targets the modules of the adapter, "
                "or set model.path to the model that it was trained on"
            )
        if installed.schema[name].factor == "B":
            module, ours = name.rpartition(".")[0], len(start[installed.schema[name].pair])
            given = _scale(settings, key.rpartition(".")[0], value.shape[1])
            value = value * (given / tuning.scale_of(module, ours))
        values[name] = value
    if not any(installed.schema[name].factor for name in values):
        raise ConfigError(f"{folder} holds no factors of LoRA, so there is nothing to start from: name another adapter")
    values |= _in_order(values, start, installed, folder)
    fitted = {name: _fitted(name, value, start[name], installed, folder) for name, value in values.items()}
    return {name: value for name, value in fitted.items() if value is not None}


def _adapter_folder(folder: Path) -> Path:
    for one in (folder, folder / "adapter"):
        if (one / _SETTINGS).is_file():
            if wrong := damaged(one):
                raise ConfigError(
                    f"{one / wrong} is missing or differs from what was written: export the adapter again, or remove "
                    f"{one / DIGESTS} if you changed it on purpose"
                )
            return one
    if (folder / "model").is_dir():
        raise ConfigError(
            f"init_from = '{folder}' is a run that exported a whole model: set model.path to {folder / 'model'} instead"
        )
    what = "there is no such folder" if not folder.is_dir() else f"it has no {_SETTINGS}, and no finished run's adapter"
    raise ConfigError(
        f"init_from = '{folder}' cannot be read: {what}; name the folder of an adapter or of a finished run"
    )


def _settings(folder: Path, tuning: LoRA) -> Mapping[str, Any]:
    try:
        settings = dict(json.loads((folder / _SETTINGS).read_text("utf-8")))
        kind, dora = settings.get("peft_type"), bool(settings.get("use_dora"))
        alphas = (settings.get("alpha_pattern") or {}).items()
        settings["alpha_pattern"] = {ending_of(key): float(value) for key, value in alphas}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / _SETTINGS} cannot be read ({first_line(error)}): fetch it again") from error
    if kind != "LORA":
        raise ConfigError(
            f"{folder} holds an adapter of the kind {kind}, but init_from reads LoRA: name another adapter"
        )
    if dora != tuning.dora:
        held, wanted = ("with", "true") if dora else ("without", "false")
        raise ConfigError(
            f"{folder} holds an adapter {held} DoRA, and this run has tuning.dora = {str(tuning.dora).lower()}: set it "
            f"to {wanted}, or name another adapter"
        )
    init = str(settings.get("init_lora_weights", True)).lower()
    if init.startswith(EDITS_BASE):
        raise ConfigError(
            f"{folder} holds an adapter with init_lora_weights = {init!r}, which belongs to a base that `peft` edits "
            "when it loads it: convert it to a plain adapter, as `peft` describes it "
            "(path_initial_model_for_weight_conversion)"
        )
    check_endings(f"alpha_pattern of {folder / _SETTINGS}", settings["alpha_pattern"])
    return settings


def _tensors(folder: Path) -> Tree:
    try:
        tensors = from_peft(load_file(folder / _TENSORS))
        head = load_file(folder / _HEAD) if (folder / _HEAD).is_file() else {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / _TENSORS} cannot be read ({first_line(error)}): adapters are read in the format safetensors"
        ) from error
    # a pooled classifier is exported as a module of sentence-transformers
    return tensors | {name.replace("linear.", "classifier."): value for name, value in head.items()}


def _in_order(values: Tree, start: Tree, installed: Installed, folder: Path) -> Tree:
    """The rows of a head in the order of the model's classes, where the adapter names its own; other ones are noted."""
    wanted = list(getattr(getattr(installed.model, "config", None), "id2label", {}).values())
    held = _classes(folder)
    rows = {
        name: value
        for name, value in values.items()
        if installed.schema[name].group == "head" and value.shape == start[name].shape and len(value) == len(wanted)
    }
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(held))
    if not rows or unnamed or held == wanted:
        return {}
    if sorted(held) != sorted(wanted):
        note = f"the classifier in {folder} is of other classes ({', '.join(held[:3])}, ...): each class starts from "
        installed.notes += (note + "the row of another one",)
        return {}
    places = [held.index(name) for name in wanted]
    return {name: value[places] for name, value in rows.items()}


def _classes(folder: Path) -> list[str]:
    """The names of an adapter's classes, in the order of its rows; an empty list if it does not name them."""
    file = folder / _CLASSES
    if not file.is_file():
        return []
    try:
        names = {int(number): str(name) for number, name in json.loads(file.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({first_line(error)}): fetch it again") from error
    return [names[number] for number in sorted(names)]


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    fitting = [ending for ending in settings["alpha_pattern"] if of_ending(module, {ending: True}, False)]
    # of several, `peft` takes the first
    alpha = float(settings["alpha_pattern"][fitting[0]] if fitting else settings.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _place(key: str, start: Tree) -> str | None:
    """The trained parameter of a name, which may lack the prefix of the backbone."""
    found = [key] if key in start else [name for name in start if name.endswith(f".{key}")]
    return found[0] if len(found) == 1 else None


def _fitted(name: str, value: Tensor, start: Tensor, installed: Installed, folder: Path) -> Tensor | None:
    """The value in the parameter's shape; None, with a note, for a head with other outputs."""
    leaf = installed.schema[name]
    if value.shape == start.shape:
        return value.clone()
    if not leaf.factor and leaf.group == "head":
        shapes = f"of shape {tuple(value.shape)} in {folder} and {tuple(start.shape)} here"
        installed.notes += (f"the head starts fresh in {name}, which is {shapes}",)
        return None
    axis = 0 if leaf.factor == "A" else 1
    if not leaf.factor or value.dim() != 2 or value.shape[1 - axis] != start.shape[1 - axis]:
        raise ConfigError(
            f"{folder} holds {name} of shape {tuple(value.shape)}, but the model has {tuple(start.shape)} there: set "
            "model.path to the model that the adapter was trained on"
        )
    rank = value.shape[axis]
    if rank > start.shape[axis]:
        raise ConfigError(
            f"the adapter in {folder} has rank {rank}, and method.rank = {start.shape[axis]} is too small for it: set "
            f"method.rank to {rank} or more"
        )
    rest = start.narrow(axis, rank, start.shape[axis] - rank)
    return torch.cat([value, rest if leaf.factor == "A" else torch.zeros_like(rest)], dim=axis)

"""Exports adapters in the format that ``peft`` loads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fedlora.core.errors import ConfigError
from fedlora.core.later import peft
from fedlora.core.tree import Tree
from fedlora.tuning.base import Installed
from fedlora.tuning.dora import MAGNITUDE, DoRALinear
from fedlora.tuning.lora import LoRA, lora_layers
from fedlora.tuning.lora_layer import LoRAConv, LoRAEmbedding, LoRALayer
from fedlora.tuning.peft_names import PEFT_PREFIX, to_peft
from fedlora.tuning.targets import saved_modules

_SETTINGS, _FILE = "adapter_config.json", "adapter_model.safetensors"


def save_lora(
    tuning: LoRA,
    installed: Installed,
    init: Tree,
    params: Tree,
    base: str,
    folder: Path,
    task_type: str | None = "SEQ_CLS",
    root: str = "",
    revision: str | None = None,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    If ``scale B0 A0`` was subtracted from the frozen weights at the start, the adapter on the *original* base has twice
    the rank: ``scale (B A - B0 A0) = scale [B, -B0] [A; A0]``.

    Args:
        tuning: the LoRA.
        installed: the model it is installed in.
        init: the parameters before training.
        params: the parameters after training.
        base: the name of the base model, preferably its hub id.
        folder: where to write.
        task_type: ``SEQ_CLS``, ``TOKEN_CLS``, ``QUESTION_ANS``, ``CAUSAL_LM``, or None if ``peft`` has no name for the
            task, as for images.
        root: the prefix of the backbone's names, such as ``bert.``, for an adapter on the backbone alone; everything
            outside the backbone is then left out.
        revision: the hub revision of the base model.

    Raises:
        ConfigError: no ``peft`` adapter computes the same function.
    """
    layers = lora_layers(installed.model)
    for name in dilated(installed):
        raise ConfigError(
            f"{name} is a dilated convolution, beside which `peft` has no adapter; write the whole model with "
            "--merge, or choose other targets"
        )
    factors = _factors(tuning, layers, init, params)
    head = {name: value for name, value in installed.head_values(params).items() if name.startswith(root)}
    scales = _scales(tuning, {name.removeprefix(root): layer for name, layer in layers.items()})
    settings = peft.LoraConfig(
        **scales,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        layers_to_transform=list(tuning.layers_to_transform) or None,
        lora_dropout=tuning.dropout,
        target_modules=sorted(name.removeprefix(root) for name in layers),
        modules_to_save=_saved(installed, head, root) or None,
        fan_in_fan_out=any(layer.transposed and not isinstance(layer, LoRAEmbedding) for layer in layers.values()),
        task_type=task_type,
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    _complete(folder, settings, base, revision)
    tensors = {name: value.contiguous() for name, value in to_peft(factors | head, installed.model).items()}
    save_file(_on_backbone(tensors, root), folder / _FILE, metadata={"format": "pt"})


def _factors(tuning: LoRA, layers: Mapping[str, LoRALayer], init: Tree, params: Tree) -> Tree:
    """The parameters of the adapter on the original base."""
    found: Tree = {}
    for name, layer in layers.items():
        a, b = params[f"{name}.lora_A"], params[f"{name}.lora_B"]
        if tuning.residual:
            a = torch.cat([a, init[f"{name}.lora_A"]], dim=0)
            b = torch.cat([b, -init[f"{name}.lora_B"]], dim=1)
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = a, b
        if isinstance(layer, DoRALinear):
            found[f"{name}.{MAGNITUDE}"] = params[f"{name}.{MAGNITUDE}"]
    return found


def _scales(tuning: LoRA, layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """The fields of a ``peft`` configuration that give each adapter its rank and its scale.

    Args:
        tuning: the LoRA.
        layers: its adapters, by the names that they have in ``peft``'s model.
    """
    times = 2 if tuning.residual else 1

    def alpha(scale: float, rank: int) -> float:
        return scale * (math.sqrt(rank) if tuning.rslora else rank)

    rank = times * tuning.rank
    usual = alpha(tuning.alpha / (math.sqrt(tuning.rank) if tuning.rslora else tuning.rank), rank)
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        # `peft` reads a key as a regular expression that the end of a name must match
        key, own = f"^{re.escape(name)}", times * len(layer.lora_A)
        if own != rank:
            ranks[key] = own
        if not math.isclose(alpha(layer.scale, own), usual, rel_tol=1e-9):
            alphas[key] = alpha(layer.scale, own)
    return {"r": rank, "lora_alpha": usual, "rank_pattern": ranks, "alpha_pattern": alphas}


def _saved(installed: Installed, head: Tree, root: str) -> list[str]:
    return [name.removeprefix(root) for name in saved_modules(installed.model, frozenset(head))]


def _on_backbone(tensors: Tree, root: str) -> Tree:
    """The tensors under the names that they have on a backbone loaded on its own."""
    outer, inner = PEFT_PREFIX, PEFT_PREFIX + root
    return {outer + name.removeprefix(inner): value for name, value in tensors.items() if name.startswith(inner)}


def dilated(installed: Installed) -> list[str]:
    """The adapters that ``peft`` cannot represent: its adapter convolutions copy only the stride and the padding."""
    layers = lora_layers(installed.model)
    return [name for name, layer in layers.items() if isinstance(layer, LoRAConv) and max(layer.dilation) > 1]


def save_peft(
    installed: Installed,
    base: str,
    folder: Path,
    task_type: str | None = None,
    root: str = "",
    revision: str | None = None,
) -> None:
    """Writes the adapter that ``peft`` itself installed, with the values currently in the model.

    Args:
        installed: the model.
        base: the name of the base model, preferably its hub id.
        folder: where to write.
        task_type: with ``root``, the task named in the configuration.
        root: see ``save_lora``.
        revision: the hub revision of the base model.
    """
    model = installed.model
    assert isinstance(model, peft.PeftModel)
    model.save_pretrained(str(folder))
    _complete(folder, model.peft_config[model.active_adapter], base, revision)
    if not root:
        return
    save_file(_on_backbone(load_file(folder / _FILE), root), folder / _FILE, metadata={"format": "pt"})
    file = folder / _SETTINGS
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"task_type": task_type, "auto_mapping": None}
    if "target_modules" in settings:  # a regular expression was matched against longer names
        tuner: Any = model.base_model
        settings["target_modules"] = sorted(name.removeprefix(root) for name in tuner.targeted_module_names)
    saved = settings.get("modules_to_save") or []
    inside = [name.removeprefix(root) for name in saved if name.startswith(root)]
    settings["modules_to_save"] = inside or None
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _complete(folder: Path, settings: peft.PeftConfig, base: str, revision: str | None) -> None:
    """Names the base model, and sorts the entries that ``peft`` keeps as sets, whose order differs by process."""
    file = folder / _SETTINGS
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": base, "revision": revision}
    values |= {name: sorted(value) for name, value in vars(settings).items() if isinstance(value, set)}
    file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")

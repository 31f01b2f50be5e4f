"""Export of a run: an adapter folder that ``peft`` loads, or a model folder, each with a model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedlora.config.places import located_model
from fedlora.core.errors import ConfigError
from fedlora.core.files import new_folder
from fedlora.core.slots import kind_of
from fedlora.core.state import named_seed
from fedlora.core.tree import Tree
from fedlora.rounds.downlink import view
from fedlora.rounds.phases import close_phase
from fedlora.runs.card import CLASSES, model_card
from fedlora.runs.folder import cannot_write
from fedlora.tasks.models.loading import pooled, quiet_transformers, stored_dtype
from fedlora.tasks.models.public_name import public_name
from fedlora.tuning import Bottleneck, Installed, LoRA, Peft
from fedlora.tuning.export import dilated, save_lora, save_peft
from fedlora.tuning.peft_names import PEFT_PREFIX

if TYPE_CHECKING:
    from fedlora.runs.inference import TrainedRun


def export_run(run: Path, trained: TrainedRun) -> Path:
    """Writes ``adapter`` into the run's folder, or ``model`` if the tuning is not an adapter.

    Returns:
        The folder written.
    """
    state, recipe, installed = trained.state, trained.recipe, trained.workspace.installed
    edited = installed.folded or state.folds.version or dilated(installed)
    merged = not isinstance(recipe.tuning, LoRA | Peft | Bottleneck) or bool(edited)
    folder = run / ("model" if merged else "adapter")
    received = dataclasses.replace(state, params=view(recipe, state, trained.experiment.seed))
    export(folder, dataclasses.replace(trained, state=received), merge=merged)
    return folder


def export(folder: Path, trained: TrainedRun, merge: bool) -> None:
    """Writes an adapter, or with ``merge`` a whole model that does not need ``peft``; the folder is created atomically.

    Raises:
        ConfigError: the tuning cannot be exported in that form.
        DataError: writing failed.
    """
    try:
        with new_folder(folder) as temporary:
            _write(temporary, trained, merge)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _write(temporary: Path, trained: TrainedRun, merge: bool) -> None:
    task, state, installed = trained.task, trained.state, trained.workspace.installed
    tuning = trained.recipe.tuning
    root = f"{getattr(installed.model, 'base_model_prefix', '')}." if task.backbone_only else ""
    alone = isinstance(tuning, Bottleneck) and not merge  # a format that only fedlora loads
    base = public_name(located_model(trained.experiment))
    if merge:
        _save_merged(temporary, trained)
    elif isinstance(tuning, LoRA) and not (installed.folded or state.folds.version):
        save_lora(tuning, installed, state.init, state.params, base.id, temporary, task.peft_task, root, base.revision)
    elif isinstance(tuning, Peft):
        installed.load(state.params)
        save_peft(installed, base.id, temporary, task.peft_task, root, base.revision)
    elif isinstance(tuning, Bottleneck):
        save_file(state.params | installed.head_values(state.params), temporary / "params.safetensors")
    else:
        raise ConfigError(
            f"the trained values of `{kind_of(tuning)}` are not a low-rank adapter; use --merge to write the "
            "whole model"
        )
    if task.backbone_only and not alone:
        task.save_head(temporary, _head(installed, state.params))
    if not merge:
        _save_names(temporary, task.label_names)
    task.save_pretrained(temporary)  # a model is unusable without its tokenizer or image processor
    card = model_card(trained, merge) + (task.usage if not alone else "")
    (temporary / "README.md").write_text(card, encoding="utf-8")


def _save_names(folder: Path, names: list[str]) -> None:
    """Writes the classes' names, if there are classes.

    A ``config.json`` beside an adapter would make ``transformers`` take the folder for that of a whole model.
    """
    if names:
        content = json.dumps(dict(enumerate(names)), indent=1, ensure_ascii=False)
        (folder / CLASSES).write_text(content + "\n", encoding="utf-8")


def _save_merged(folder: Path, trained: TrainedRun) -> None:
    if isinstance(trained.recipe.tuning, Peft):
        raise ConfigError("a `peft` tuning is merged by peft itself: load the adapter and call merge_and_unload()")
    learnt = close_phase(trained.workspace, trained.recipe, trained.state)
    # the resident model may hold quantized weights, so the change is applied to a freshly loaded base model
    seed = named_seed(trained.experiment.seed, "head")
    model, _ = trained.task.load_model(seed, "fp32", torch.device("cpu"))
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in learnt.delta.items():
            named[name].add_(value)
        for name, value in learnt.head.items():
            named[name].copy_(value)
    if dtype := stored_dtype(trained.experiment.model):
        model.to(dtype)
    with quiet_transformers():
        if isinstance(model, pooled.PooledClassifier):
            model.save_backbone(folder)
        else:
            model.save_pretrained(str(folder))  # type: ignore[operator]


def _head(installed: Installed, params: Mapping[str, Tensor]) -> Tree:
    """The head's parameters under the names of the untuned model, float32 on the CPU."""
    now = {name.removeprefix(PEFT_PREFIX): value for name, value in installed.model.named_parameters()}
    values = {name: value.detach().to("cpu", torch.float32) for name, value in now.items()}
    # `peft` keeps the head of a model it has wrapped in a module of its own
    head = {name.replace(".modules_to_save.", "."): value for name, value in installed.head_values(params).items()}
    return values | head

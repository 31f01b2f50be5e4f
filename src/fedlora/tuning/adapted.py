"""The adapters that ``peft`` has put into a model: their settings as a tuning, and the model without them."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from torch import nn

from fedlora.core.errors import ConfigError
from fedlora.core.later import peft
from fedlora.tuning.base import Tuning
from fedlora.tuning.lora import LoRA
from fedlora.tuning.peft_names import PEFT_PREFIX, ending_of
from fedlora.tuning.targets import of_ending

_TAKEN = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "modules_to_save", "use_dora"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform"),
)
FURTHER = ("dropout", "rslora", "dora", "rank_pattern", "alpha_pattern", "layers_to_transform")
"""The settings of ``LoRA`` that methods have no arguments for, or few have."""
_RECORDS = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "fan_in_fan_out"),
)
"""Settings that say what a configuration is for, and change nothing that is learnt."""


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is one that ``peft`` wrapped."""
    return isinstance(model, peft.PeftModel)


def lora_of(model: Any) -> LoRA:
    """The tuning of a model with one fresh adapter of LoRA.

    Args:
        model: a ``peft.PeftModel``.

    Raises:
        ConfigError: it has another adapter, or one with settings that ``LoRA`` has not, or a trained one.
    """
    config = model.peft_config[model.active_adapter] if len(model.peft_config) == 1 else None
    if not isinstance(config, peft.LoraConfig):
        kinds = ", ".join(type(one).__name__ for one in model.peft_config.values())
        raise ConfigError(
            f"the model has adapters of {kinds}, but one of LoraConfig was expected: pass the plain model, and "
            "name a method"
        )
    _check_taken(model, config)
    targets, layers = config.target_modules, config.layers_to_transform
    tuning = LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        targets=targets if isinstance(targets, str) else tuple(sorted(targets or ())),
        dropout=config.lora_dropout,
        rslora=config.use_rslora,
        dora=config.use_dora,
        rank_pattern={ending_of(key): rank for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={ending_of(key): alpha for key, alpha in (config.alpha_pattern or {}).items()},
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
    )
    _check_ranks(model, tuning)
    return tuning


def _check_taken(model: Any, config: peft.LoraConfig) -> None:
    """Refuses settings that ``LoRA`` has not, and an adapter that is trained."""
    default = dataclasses.asdict(peft.LoraConfig())
    for name, value in dataclasses.asdict(config).items():
        if name not in (*_TAKEN, *_RECORDS) and (value or None) != (default[name] or None):
            raise ConfigError(
                f"LoraConfig.{name} = {str(value)[:60]!r} has no counterpart in fedlora.LoRA: leave it out, or pass "
                "the plain model and method=fedlora.fedavg(tuning=fedlora.Peft.of(config))"
            )
    if any(bool(value.any()) for name, value in model.named_parameters() if ".lora_B." in name):
        raise ConfigError(
            "the adapter of the model is trained already, but each run starts from fresh ones: save it with "
            "save_pretrained, pass a Trainer with a fresh one, and set init_from to that folder"
        )


def _check_ranks(model: Any, tuning: LoRA) -> None:
    """Refuses patterns that ``peft`` reads in another way: it takes the first key that fits, not the longest."""
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            short = name.removeprefix(PEFT_PREFIX)
            rank = of_ending(short, tuning.rank_pattern, tuning.rank)
            (own,), (scale,) = module.r.values(), module.scaling.values()
            if own != rank or not math.isclose(scale, tuning.scale_of(short, rank)):
                raise ConfigError(
                    f"LoraConfig gives {short} the rank {own} and the scale {scale:g}, but the longest key of "
                    "its patterns that fits gives others: leave only that key for it"
                )


def without_adapters(model: Any) -> Any:
    """A copy of the model that ``peft`` wrapped, without its adapters; the model itself is unchanged."""
    plain = copy.deepcopy(model).unload()
    # `transformers` asks whether a model carries adapters
    plain._hf_peft_config_loaded = False
    return plain


def trained_beside(model: Any) -> frozenset[str]:
    """The parameters that a model with adapters trains besides these, under the names of the plain model."""
    names = (name for name, value in model.named_parameters() if value.requires_grad and ".lora_" not in name)
    return frozenset(name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".") for name in names)


def matches(tuning: Tuning, lora: LoRA) -> bool:
    """Whether a tuning adapts the same matrices with the same rank and scale."""
    return isinstance(tuning, LoRA) and all(
        getattr(tuning, name) == getattr(lora, name) for name in ("rank", "alpha", "targets", *FURTHER)
    )

"""Finding the modules that a tuning changes, in every family of models."""

from __future__ import annotations

import re

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.errors import ConfigError
from fedlora.tuning.base import check_matched

Targets = str | tuple[str, ...]

_OUTPUTS: dict[str, tuple[str, str]] = {
    "bert": (r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
    "roberta": (r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
    "xlm-roberta": (r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
    "electra": (r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
    "deberta": (r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
    "deberta-v2": (r"attention\.output\.dense", r"layer\.\d+\.output\.dense"),
    "distilbert": (r"attention\.out_lin", r"ffn\.lin2"),
    "albert": (r"attention\.dense", r"ffn_output"),
    "gpt2": (r"attn\.c_proj", r"mlp\.c_proj"),
    "llama": (r"self_attn\.o_proj", r"mlp\.down_proj"),
    "mistral": (r"self_attn\.o_proj", r"mlp\.down_proj"),
    "gemma": (r"self_attn\.o_proj", r"mlp\.down_proj"),
    "qwen2": (r"self_attn\.o_proj", r"mlp\.down_proj"),
    "qwen3": (r"self_attn\.o_proj", r"mlp\.down_proj"),
}
"""Per family, the last matrix of the attention block and of the feed-forward block, as regular expressions."""

_MORE_DEFAULTS = {"distilbert": ("q_lin", "v_lin"), "albert": ("query", "value")}
"""Families that PEFT's table lacks."""


def is_matrix(module: nn.Module) -> bool:
    """Whether ``module`` multiplies by one matrix: ``nn.Linear``, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as ``(in, out)``, as GPT-2's ``Conv1D`` does."""
    return isinstance(module, Conv1D)


def oriented(module: nn.Module) -> Tensor:
    """The module's weight as ``(out, in)``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if is_transposed(module) else weight


def family(model: nn.Module) -> str:
    """The model's ``model_type``, such as ``bert``."""
    assert isinstance(model, PreTrainedModel)
    return str(model.config.model_type)


def find(model: nn.Module, targets: Targets, head: frozenset[str]) -> dict[str, nn.Module]:
    """The matrices that ``targets`` names, shared ones once, the task head never.

    Args:
        model: the model to search.
        targets: ``default`` for the family's usual ones (as PEFT has them: query and value), ``all-linear``, a regular
            expression that must match a whole module name, or a tuple of name endings.
        head: names of the head's parameters.

    Raises:
        ConfigError: nothing matches.
    """
    if targets == "default":
        names = _MORE_DEFAULTS.get(family(model)) or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(
            family(model), "all-linear"
        )
        targets = names if isinstance(names, str) else tuple(names)
    matrices = {
        name: module
        for name, module in model.named_modules()
        if is_matrix(module) and not any(f"{name}.{leaf}" in head for leaf, _ in module.named_parameters())
    }
    if isinstance(targets, tuple):
        endings = targets
        found = {n: m for n, m in matrices.items() if any(n == e or n.endswith(f".{e}") for e in endings)}
    elif targets == "all-linear":
        found = matrices
    else:
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError(f"targets = {targets!r} is no regular expression: {error}") from error
        found = {n: m for n, m in matrices.items() if pattern.fullmatch(n)}
    check_matched(len(found), f"targets = {targets!r}", model)
    return found


def block_outputs(model: nn.Module, where: tuple[str, ...], head: frozenset[str]) -> dict[str, nn.Module]:
    """The last matrices of the attention blocks, of the feed-forward blocks, or of both.

    Args:
        model: the model to search.
        where: any of ``attention`` and ``feed_forward``.
        head: names of the head's parameters.

    Raises:
        ConfigError: the family is unknown.
    """
    if family(model) not in _OUTPUTS:
        raise ConfigError(
            f"where bottleneck adapters go is not known for {family(model)!r}, only for {', '.join(sorted(_OUTPUTS))}; "
            "give `targets` as a regular expression over module names"
        )
    patterns = dict(zip(("attention", "feed_forward"), _OUTPUTS[family(model)], strict=True))
    return find(model, "|".join(rf"(?:.*\.)?{patterns[place]}" for place in where), head)


def saved_modules(model: nn.Module, head: frozenset[str]) -> list[str]:
    """The modules that ``peft`` must train as a whole, so that the head moves and the backbone does not.

    Args:
        model: the model; a checkpoint may lack parts of its backbone, such as a pooler, which then belong to the head.
        head: names of the head's parameters.
    """
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    return sorted({name.rsplit(".", 1)[0] if name.startswith(backbone) else name.split(".", 1)[0] for name in head})


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` where ``name`` is; a module that several places share is replaced in all of them."""
    old = model.get_submodule(name)
    for parent in model.modules():
        # named_children() would pass over the second place in one list
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)

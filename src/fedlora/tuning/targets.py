"""Finds the modules that a tuning changes, for every model family."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fedlora.core.errors import ConfigError
from fedlora.core.later import peft, transformers
from fedlora.tuning.matrices import is_linear, is_matrix, obstacle, tied_weights

if TYPE_CHECKING:
    from fedlora.tuning.matrices import Matrix

Targets = str | tuple[str, ...]
Value = TypeVar("Value")
_NAME = re.compile(r"\w+(\.\w+)*")

_BERT = (r"attention\.output\.dense", r"layer\.\d+\.output\.dense")
_LLAMA = (r"self_attn\.o_proj", r"mlp\.down_proj")
_VIT = (r"attention\.o_proj", r"mlp\.(?:fc2|weights_out)")
_OUTPUTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2"), _BERT),
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("vit", "dinov2", "dinov2_with_registers"), _VIT),
    "distilbert": (r"attention\.out_lin", r"ffn\.lin2"),
    "albert": (r"attention\.dense", r"ffn_output"),
    "modernbert": (r"attn\.Wo", r"mlp\.Wo"),
    "gpt2": (r"attn\.c_proj", r"mlp\.c_proj"),
    "t5": (r"(?:SelfAttention|EncDecAttention)\.o", r"DenseReluDense\.wo"),
}
"""The last matrix of the attention block and of the feed-forward block, as regular expressions, by family."""

_MORE_DEFAULTS: dict[str, tuple[str, ...]] = {
    "distilbert": ("q_lin", "v_lin"),
    **dict.fromkeys(("albert", "camembert", "data2vec-vision", "swinv2"), ("query", "value")),
    "modernbert": ("Wqkv",),
    **dict.fromkeys(
        ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "swin", "vit_msn", "ijepa"),
        ("q_proj", "v_proj"),
    ),
}
"""Families missing from PEFT's table, with their names for query and value in transformers 5."""


def family(model: nn.Module) -> str:
    """The model's ``model_type``, such as ``bert``."""
    assert isinstance(model, transformers.PreTrainedModel)
    return str(model.config.model_type)


def find(model: nn.Module, targets: Targets, head: frozenset[str]) -> dict[str, Matrix]:
    """The matrices selected by ``targets``, with shared modules once and without the task head.

    Args:
        model: the model to search.
        targets: ``default`` for the family's usual ones (query and value, as in PEFT; all of them if the family is in
            no table), ``all-linear`` for every linear layer and every ungrouped convolution except the head, a regular
            expression that must match a whole module name, or a tuple of name suffixes. A string that matches no whole
            name is read as a suffix. Only the latter two select embeddings.
        head: names of the head's parameters.

    Raises:
        ConfigError: nothing matches, or a module selected by an expression or a suffix cannot be trained.
    """
    named = targets not in ("default", "all-linear")
    if targets == "default":
        known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | _MORE_DEFAULTS
        usual = known.get(family(model), "all-linear")
        targets = usual if isinstance(usual, str) else tuple(usual)
    every = {name: module for name, module in model.named_modules() if is_matrix(module)}
    chosen = _chosen(list(every), targets)
    matrices = {
        name: every[name]
        for name in chosen
        if not any(f"{name}.{leaf}" in head for leaf, _ in every[name].named_parameters())
    }
    obstacles = _obstacles(model, matrices)
    if named and obstacles:
        name, why = next(iter(obstacles.items()))
        raise ConfigError(f"{name} cannot be a target: {why}; leave it out of `targets`")
    output = _output(model)
    found = {
        name: module
        for name, module in matrices.items()
        if named or not (name in obstacles or module is output or isinstance(module, nn.Embedding))
    }
    if not found:
        raise _nothing(model, targets, chosen if named else [], every)
    return found


def is_pattern(targets: Targets | None) -> bool:
    """Whether ``targets`` is a regular expression."""
    return isinstance(targets, str) and targets not in ("default", "all-linear")


def endings(model: nn.Module, targets: Targets, head: frozenset[str]) -> tuple[str, ...]:
    """The shortest endings of names that select the same matrices as ``targets``.

    Raises:
        ConfigError: see ``find``; or a name is the ending of another one, which ``targets`` does not select.
    """
    matrices = [
        name
        for name, module in model.named_modules()
        if is_matrix(module) and not any(f"{name}.{leaf}" in head for leaf, _ in module.named_parameters())
    ]
    return shortest_endings(find(model, targets, head), matrices)


def shortest_endings(chosen: Collection[str], names: Sequence[str]) -> tuple[str, ...]:
    """Endings that match all ``chosen`` names and no others of ``names``.

    Raises:
        ConfigError: a chosen name is the ending of another one.
    """
    found: list[str] = []
    for name in chosen:
        if _chosen([name], tuple(found)):
            continue
        parts = name.split(".")
        tried = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        fit = (one for one in tried if set(_chosen(names, (one,))) <= set(chosen))
        if (ending := next(fit, None)) is None:
            raise ConfigError(
                f"{name} cannot be distinguished from other modules by its name; give `targets` as endings"
            )
        found.append(ending)
    return tuple(found)


def in_layers(found: Mapping[str, Matrix], layers: tuple[int, ...]) -> dict[str, Matrix]:
    """The matrices of some layers.

    Args:
        found: matrices by name.
        layers: numbers of layers; all if there are none.

    Raises:
        ConfigError: no matrix is in one of them.
    """
    if not layers:
        return dict(found)
    places = {name: next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in found}
    there = sorted({place for place in places.values() if place is not None})
    if absent := [layer for layer in layers if layer not in there]:
        known = f"in the layers {', '.join(map(str, there))} alone" if there else "in no numbered layer"
        raise ConfigError(f"layers_to_transform has {absent[0]}, but the targets are {known}; name others")
    return {name: module for name, module in found.items() if places[name] in layers}


def of_ending(name: str, pattern: Mapping[str, Value], default: Value) -> Value:
    """The value of the longest ending in ``pattern`` that fits a module's name; ``default`` if none does."""
    fitting = [ending for ending in pattern if _chosen([name], (ending,))]
    return pattern[max(fitting, key=len)] if fitting else default


def check_endings(key: str, pattern: Collection[str], names: Collection[str] | None = None) -> None:
    """Refuses keys of a pattern that are no ends of modules' names.

    Args:
        key: the setting.
        pattern: its keys.
        names: the modules, if they are known.

    Raises:
        ConfigError: naming the first key that is none.
    """
    for ending in pattern:
        if not _NAME.fullmatch(ending):
            raise ConfigError(f"{key} has {ending!r}, which is no name: give the end of one, such as 'attn.c_proj'")
        if names is not None and not _chosen(list(names), (ending,)):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ConfigError(
                f"{key} has {ending!r}, in which the name of no adapted module ends; they end in: {', '.join(ends)}"
            )


def _output(model: nn.Module) -> nn.Module | None:
    """The matrix of a language model's output."""
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    found: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return found


def _nothing(model: nn.Module, targets: Targets, chosen: Sequence[str], every: Iterable[str]) -> ConfigError:
    """The error about targets that select nothing but modules of the head, if any."""
    if chosen:
        return ConfigError(
            f"targets = {targets!r} selects {', '.join(chosen[:5])} alone, of the head, which is trained whole: name "
            "other modules"
        )
    endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in every}))
    return ConfigError(
        f"targets = {targets!r} matches nothing in {type(model).__name__}; a string is a regular expression over a "
        f"whole name or the end of names, a list has ends of names, and the matrices there are end in: {endings}"
    )


def _chosen(names: Sequence[str], targets: Targets) -> list[str]:
    """The names that ``targets`` select."""
    if targets == "all-linear":
        return list(names)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError(f"targets = {targets!r} is not a regular expression: {error}") from error
        if found := [name for name in names if pattern.fullmatch(name)]:
            return found
        targets = (targets,)
    return [name for name in names if any(name == ending or name.endswith(f".{ending}") for ending in targets)]


def _obstacles(model: nn.Module, matrices: Mapping[str, nn.Module]) -> dict[str, str]:
    tied = tied_weights(model)
    reasons = {}
    for name, module in matrices.items():
        shared = f"its weight is that of {tied[name]} too, which would change with it" if name in tied else None
        reason = shared or obstacle(module)
        if reason is not None:
            reasons[name] = reason
    return reasons


def block_outputs(model: nn.Module, where: tuple[str, ...], head: frozenset[str]) -> dict[str, Matrix]:
    """The last matrices of the attention blocks, of the feed-forward blocks, or of both.

    Args:
        model: the model to search.
        where: any of ``attention`` and ``feed_forward``.
        head: names of the head's parameters.

    Raises:
        ConfigError: the family is unknown, or has no such blocks.
    """
    if family(model) not in _OUTPUTS:
        if not any(is_linear(module) for module in find(model, "all-linear", head).values()):
            raise ConfigError(
                f"bottleneck adapters follow linear layers, and {family(model)!r} has none outside its head; use `lora`"
            )
        raise ConfigError(
            f"where bottleneck adapters go is not known for {family(model)!r}, only for {', '.join(sorted(_OUTPUTS))}; "
            "give `targets` as a regular expression over module names"
        )
    patterns = dict(zip(("attention", "feed_forward"), _OUTPUTS[family(model)], strict=True))
    return find(model, "|".join(rf"(?:.*\.)?{patterns[place]}" for place in where), head)


def saved_modules(model: nn.Module, head: frozenset[str]) -> list[str]:
    """The modules that ``peft`` must train as a whole, so that the head is trained and the backbone is not.

    Args:
        model: the model; parts of its backbone missing from the checkpoint, such as a pooler, belong to the head.
        head: names of the head's parameters.
    """
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    found = {name.rsplit(".", 1)[0] if name.startswith(backbone) else name.split(".", 1)[0] for name in head}
    # a module saved as a whole includes its submodules
    return sorted(name for name in found if not any(name.startswith(f"{other}.") for other in found))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces module ``name`` by ``new``; a module that occurs in several places is replaced in all of them."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):  # the new module may contain the old one
        # named_children() would skip a second occurrence within one parent
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)

"""Further modules of the pre-trained model that are trained with the task head."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from fedlora.core.errors import ConfigError
from fedlora.tuning.matrices import tied_weights


def parameters_of(model: nn.Module, modules: tuple[str, ...]) -> frozenset[str]:
    """The names of all parameters in the modules that ``modules`` names.

    Args:
        model: the model.
        modules: names of modules, whole or their last parts: ``pooler`` is ``bert.pooler``.

    Raises:
        ConfigError: an entry names no module with parameters, or one whose weight is another module's too.
    """
    tied, known = tied_weights(model), _with_parameters(model)
    found: set[str] = set()
    for entry in modules:
        names = [name for name in known if f".{name}".endswith(f".{entry}")]
        if not names and entry.endswith("pooler"):
            raise ConfigError(
                f"model.head has {entry!r}, but a classifier that reads pooled tokens has no pooler; set "
                "task.pooling = 'model' for the stock class, or leave it out of model.head"
            )
        if not names:
            raise ConfigError(
                f"model.head has {entry!r}, but {type(model).__name__} has no such module with parameters"
                f"{_nearest(known, entry)}"
            )
        for name in names:
            inside = {place for place in tied if f"{place}.".startswith(f"{name}.")}
            shared = next((place for place in sorted(inside) if tied[place] not in inside), None)
            if shared is not None:
                raise ConfigError(
                    f"model.head has {entry!r}, but the weight of {shared} is that of {tied[shared]} too, which would "
                    "change with it; leave it out of model.head"
                )
            found |= {f"{name}.{leaf}" for leaf, _ in model.get_submodule(name).named_parameters()}
    # a module in two places has the names of the first
    return frozenset(name for name, _ in model.named_parameters() if name in found)


def put_in_order(model: nn.Module, head: frozenset[str], held: Sequence[str], wanted: Sequence[str]) -> str:
    """Puts the rows of a checkpoint's classifier in the order of the task's classes.

    Args:
        model: the model.
        head: the names of its head's parameters that the checkpoint has.
        held: the checkpoint's names of classes, in the order of its rows.
        wanted: the task's.

    Returns:
        A sentence if the rows are of other classes; empty if not, or if the checkpoint does not name them.
    """
    values = dict(model.named_parameters())
    rows = [values[name] for name in sorted(head) if values[name].shape[:1] == (len(wanted),)]
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(held))
    if not rows or len(held) != len(wanted) or unnamed or list(held) == list(wanted):
        return ""
    if set(held) != set(wanted):
        return (
            f"the checkpoint's classifier is of other classes ({', '.join(map(str, held[:3]))}, ...): each class "
            "starts from the row of another one"
        )
    places = [held.index(name) for name in wanted]
    with torch.no_grad():
        for value in rows:
            value.copy_(value[places])
    return ""


def _with_parameters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]


def _nearest(known: Sequence[str], entry: str) -> str:
    # endings are names too: `poler` should lead to bert.pooler
    endings = {ending: name for name in reversed(known) for ending in (name, name.rsplit(".", 1)[-1])}
    near = difflib.get_close_matches(entry, list(endings), n=3, cutoff=0.5)
    names = dict.fromkeys(endings[one] for one in near)
    return f"; the nearest names are: {', '.join(names)}" if names else f"; it has: {', '.join(sorted(endings)[:12])}"

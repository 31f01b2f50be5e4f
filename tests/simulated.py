"""A device that does not exist: tensors that are on ``meta`` by their own account, with values kept on the CPU.

An operation over tensors of two devices is refused, as CUDA refuses it, so a test finds tensors that were made on the
CPU and meet the model's. Gradients work, unlike with fake tensors of a device that PyTorch was built without.
Autocast does not reach these tensors, and fused optimisers refuse them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fedlora.workspace import Workspace

DEVICE = torch.device("meta")
_MOVES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")


class Remote(Tensor):
    """A tensor on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Remote = Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **layout)  # type: ignore[attr-defined]
        made.held = held
        return made

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return Remote(self.held.detach())

    @data.setter
    def data(self, value: Remote) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Inside, what is made on or moved to the device is a ``Remote``."""
    with pytest.MonkeyPatch.context() as patch, _Mode():
        # tensors of inference mode have no version, which this class needs
        patch.setattr(torch, "inference_mode", torch.no_grad)
        patch.setattr(Workspace, "autocast", lambda self, compute: nullcontext())
        yield DEVICE


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` on the CPU; where its result is to be follows from its tensors, or from the device asked for."""
    name = func._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    remote = [value for value in tensors if isinstance(value, Remote)]
    # an empty cache of keys is made by a way that no mode sees
    local = [value for value in tensors if not isinstance(value, Remote) and value.device.type == "cpu"]
    if remote and name not in _MOVES and any(value.dim() for value in local):
        shapes = [(tuple(value.shape), "device" if isinstance(value, Remote) else "cpu") for value in tensors]
        raise RuntimeError(f"tensors on two devices in {name}: {shapes}")
    asked = kwargs.get("device")
    there = bool(remote) if asked is None else torch.device(asked).type == DEVICE.type
    kwargs = kwargs if asked is None else {**kwargs, "device": "cpu"}
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name.endswith("_") and not name.endswith("__"):
        return tensors[0] if tensors and not name.startswith("aten::_foreach") else None
    if not there:
        return result
    # what an operation gives back as it got it keeps its identity
    same = {id(value.held): value for value in remote}
    return tree_map(lambda value: same[id(value)] if id(value) in same else _remote(value), result)


def _remote(value: Any) -> Any:
    return Remote(value) if isinstance(value, Tensor) else value


def _held(value: Any) -> Any:
    if isinstance(value, Remote):
        return value.held
    if isinstance(value, Tensor) and value.device.type == DEVICE.type:
        assert not value.numel(), "a tensor without values came from outside the simulation"
        return torch.empty(value.shape, dtype=value.dtype)
    return value

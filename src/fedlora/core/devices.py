"""Names of devices, what a device computes in, and kernels that give the same bits each time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch

from fedlora.core.component import Field
from fedlora.core.errors import ConfigError

DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?|mps)$")]
"""``auto``, ``cpu``, ``cuda``, ``cuda:1`` or another number, or ``mps``."""
_BFLOAT16_SINCE = 8
"""The first major compute capability with bfloat16 matrix units (Ampere)."""
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the current CUDA device if there is one, and the CPU if not.

    For CUDA the workspace of cuBLAS is fixed here, since PyTorch reads the setting at the first product of the process,
    which may come before any block of ``deterministic_kernels``: a model is tried as it is loaded.

    Args:
        name: see ``DeviceName``.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device = 'mps' but this PyTorch has no Metal device; use 'cpu' or 'auto'")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(f"device = {name!r} but this PyTorch sees no GPU; use 'cpu' or 'auto'")
        if device.index is not None and device.index >= count:
            raise ConfigError(
                f"device = {name!r} but this PyTorch sees {count} GPU(s), numbered from 0; use 'cuda:{count - 1}' or "
                "'auto'"
            )
        os.environ.setdefault(_WORKSPACE, ":4096:8")
    return device


def compute_on(device: torch.device) -> Literal["fp32", "bf16"]:
    """What ``local.compute = "auto"`` is on a device: ``bf16`` where CUDA has matrix units for it, else ``fp32``.

    A CPU computes in ``fp32``, whatever its instructions are, so that a configuration gives the same numbers on every
    CPU.
    """
    if device.type != "cuda":
        return "fp32"
    fast = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= _BFLOAT16_SINCE
    return "bf16" if fast else "fp32"


@contextmanager
def deterministic_kernels(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Within the block, CUDA computes with kernels that give the same bits each time; elsewhere nothing changes.

    PyTorch's deterministic algorithms, among them the backward passes of flash and memory-efficient attention; no
    attention by cuDNN, whose backward pass has no such form; cuDNN neither searches for kernels nor rounds to TF32; and
    a fixed workspace of cuBLAS. The former settings return at the end, except ``CUBLAS_WORKSPACE_CONFIG``, which
    PyTorch reads once.

    Args:
        device: where the block computes.
        wanted: False changes nothing.

    Raises:
        ConfigError: an operation of the model has no deterministic kernel, or matrices were multiplied before the
            workspace of cuBLAS was fixed.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    before = _read()
    try:
        products = _UNKNOWN if before[-1] is _UNKNOWN else "highest"
        _write(["error", False, *(value for _, _, value in _FLAGS), products])
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        if _WORKSPACE in str(error):
            raise ConfigError(
                f"this process multiplied matrices on a GPU before fedlora chose its device, with {_WORKSPACE} unset "
                f"or at another value: set {_WORKSPACE}=:4096:8 before the program starts, or deterministic = false"
            ) from error
        operation = str(error).split(" does not have")[0].splitlines()[0]
        raise ConfigError(
            f"the model uses {operation}, which has no deterministic kernel on CUDA, but deterministic = true asks for "
            "the same bits in each run; set deterministic = false, or device = 'cpu'"
        ) from error
    finally:
        _write(before)


_UNKNOWN = object()
"""A value that cannot be read."""


_CUDNN: Any = torch.backends.cudnn
_FLAGS: tuple[tuple[Any, str, Any], ...] = (
    (torch.utils.deterministic, "fill_uninitialized_memory", False),  # a precaution that costs time
    (_CUDNN, "deterministic", True),
    (_CUDNN, "benchmark", False),
    (torch.backends.cuda.matmul, "allow_tf32", False),
    (_CUDNN, "allow_tf32", False),
    # the newer names of the last two; without a value here, one for all of PyTorch or of cuDNN would count
    *(
        (place, "fp32_precision", "ieee")
        for place in (torch.backends.cuda.matmul, getattr(_CUDNN, "conv", None), getattr(_CUDNN, "rnn", None))
        if getattr(place, "fp32_precision", None)
    ),
)


def _read() -> list[Any]:
    own = [torch.get_deterministic_debug_mode(), torch.backends.cuda.cudnn_sdp_enabled()]  # type: ignore[no-untyped-call]
    flags = [_value(getattr, place, name) for place, name, _ in _FLAGS]
    return [*own, *flags, _value(torch.get_float32_matmul_precision)]


def _value(read: Callable[..., Any], *which: Any) -> Any:
    try:
        return read(*which)
    except RuntimeError:  # TF32 was set by its newer name
        return _UNKNOWN


def _write(values: Sequence[Any]) -> None:
    mode, attention, *flags, products = values
    torch.set_deterministic_debug_mode(mode)
    torch.backends.cuda.enable_cudnn_sdp(attention)
    for (place, name, _), value in zip(_FLAGS, flags, strict=True):
        if value is not _UNKNOWN:
            setattr(place, name, value)
    # last, as `allow_tf32` sets it too, but does not know its "medium"
    if products not in (_UNKNOWN, _value(torch.get_float32_matmul_precision)):
        torch.set_float32_matmul_precision(products)

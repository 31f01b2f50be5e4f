"""Batches on their way from the host to a device: many in one copy, without the host waiting for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedlora.tasks.base import Batch

STAGED_BYTES = 2**26
"""The most bytes of batches that are copied ahead of the steps that read them."""
LEARNT = "learnt"
"""The positions with a label that counts, in a flattened batch: known on the host, so that no step looks for them."""


def sent(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``; the host does not wait until it has arrived, except on an Apple GPU."""
    if device.type == "cuda":  # from pageable memory the copy would wait for all that the device has to do
        value = value.pin_memory()
    # Metal reads the memory when its turn comes, even if that holds something else by then (PyTorch's issue 189690)
    return value.to(device, non_blocking=device.type != "mps")


def staged(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on ``device``, ``STAGED_BYTES`` of them in one copy for each number format.

    Args:
        batches: on the host.
        device: any but a CPU.
    """
    waiting: list[Batch] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += sum(value.nbytes for value in batch.values())
        if size >= STAGED_BYTES:
            yield from _together(waiting, device)
            waiting, size = [], 0
    yield from _together(waiting, device)


def without_idle_mask(batch: Batch) -> Batch:
    """``batch`` without a mask of ones, which selects slower kernels of attention and has no other effect.

    Args:
        batch: on the host, where looking at the mask is free.
    """
    mask = batch.get("attention_mask")
    if mask is None or not bool(mask.all()):
        return batch
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def allow_no_mask(model: nn.Module) -> None:
    """Has some families not look for padding, which they warn of and a device is waited for, where no mask is given."""
    for module in model.modules():
        if getattr(module, "warn_if_padding_and_no_attention_mask", None) is not None:
            module.warn_if_padding_and_no_attention_mask = _look_away  # type: ignore[assignment]


def learnt_places(batch: Batch, width: int) -> tuple[Tensor, Tensor] | None:
    """Row and column of each position in ``LEARNT``; None if the batch does not list them.

    Args:
        batch: as it reaches a loss.
        width: the columns of the table in which the positions count.
    """
    places = batch.get(LEARNT)
    return None if places is None else (places // width, places % width)


def _look_away(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Nothing; batches have a mask wherever there is padding to be hidden."""


def _together(batches: list[Batch], device: torch.device) -> Iterator[Batch]:
    parts: dict[torch.dtype, list[Tensor]] = {}
    for batch in batches:
        for value in batch.values():
            parts.setdefault(value.dtype, []).append(value)
    arrived: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype, values in parts.items():
        flat = sent(torch.cat([value.reshape(-1) for value in values]), device)
        cut = torch.split(flat, [value.numel() for value in values])
        arrived[dtype] = (part.view(value.shape) for part, value in zip(cut, values, strict=True))
    for batch in batches:
        yield {name: next(arrived[value.dtype]) for name, value in batch.items()}

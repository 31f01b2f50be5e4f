"""Token sequences of different lengths in flat arrays: cached on disk, padded into batches, grouped by length."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from fedlora.core.files import new_file
from fedlora.core.later import transformers
from fedlora.core.progress import LOG, counted, stage
from fedlora.tasks.models.objects import forget_last_call

if TYPE_CHECKING:
    from fedlora.tasks.base import Batch, Positions

Arrays = dict[str, NDArray[Any]]


class Ragged(NamedTuple):
    """Sequences one after the other.

    Args:
        values: all entries.
        offsets: ``(sequences + 1,)`` int64; sequence ``i`` is ``values[offsets[i]:offsets[i + 1]]``.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], dtype: type[np.generic] = np.int32) -> Ragged:
        """Lays ``sequences`` one after the other."""
        offsets = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])]).astype(np.int64)
        values = np.fromiter((entry for sequence in sequences for entry in sequence), dtype, int(offsets[-1]))
        return cls(values, offsets)

    def lengths(self, rows: Positions) -> NDArray[np.int64]:
        """Lengths of the sequences ``rows``."""
        lengths: NDArray[np.int64] = self.offsets[rows + 1] - self.offsets[rows]
        return lengths

    def longest(self) -> int:
        """The length of the longest sequence; 0 without any."""
        return int(np.diff(self.offsets).max(initial=0))

    def padded(self, rows: Positions, width: int, fill: int) -> Tensor:
        """``(rows, width)`` int64, filled on the right."""
        mask = np.arange(width) < self.lengths(rows)[:, None]
        result = np.full(mask.shape, fill, dtype=np.int64)
        result[mask] = np.concatenate([self.values[self.offsets[row] : self.offsets[row + 1]] for row in rows])
        return torch.from_numpy(result)


def ranges(offsets: NDArray[np.int64], rows: Positions) -> Positions:
    """The numbers ``offsets[row]`` to ``offsets[row + 1] - 1`` of each row, one row after the other."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(offsets[row], offsets[row + 1]) for row in rows)])


def chunks(values: Positions, size: int) -> Iterator[Positions]:
    """``size`` of ``values`` at a time, with progress reported."""
    return counted([values[first : first + size] for first in range(0, len(values), size)])


def width_of(longest: int, limit: int, pad_to: int | None) -> int:
    """The width of a batch, rounded to multiples of eight, because kernels are compiled once per width."""
    return min(-8 * (longest // -8), limit) if pad_to is None else pad_to


GROUP_COST = 64
"""The fixed cost of a forward pass, in tokens."""


def group_lengths(lengths: list[int]) -> list[tuple[int, int]]:
    """Cuts ascending lengths into groups so that tokens, padding included, and passes cost least.

    Args:
        lengths: tokens of each sequence, ascending.

    Returns:
        First and last position (exclusive) of each group, in order.

    >>> group_lengths([10, 10, 100, 100])
    [(0, 2), (2, 4)]
    >>> group_lengths([90, 95, 100, 100])
    [(0, 4)]
    """
    best, cut = [0], [0]
    for last in range(1, len(lengths) + 1):
        costs = [best[first] + (last - first) * lengths[last - 1] + GROUP_COST for first in range(last)]
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    groups: list[tuple[int, int]] = []
    last = len(lengths)
    while last:
        groups.append((cut[last], last))
        last = cut[last]
    return groups[::-1]


def by_length(batch: Batch) -> list[Batch]:
    """On a CPU, splits a batch into groups of similar length, which saves most padding; elsewhere returns it whole.

    The order of examples changes; a loss that is one mean over all of them stays the same but for rounding.

    Args:
        batch: tensors of ``(examples, ...)``; those of ``(examples, width)`` are cut; on a CPU ``attention_mask`` is
            among them.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.device.type != "cpu":
        return [batch]
    lengths, order = mask.sum(1).sort(stable=True)
    groups = []
    for first, last in group_lengths(lengths.tolist()):
        chosen, width = order[first:last], int(lengths[last - 1])
        groups.append(
            {
                name: value[chosen, :width] if value.shape[:2] == mask.shape else value[chosen]
                for name, value in batch.items()
            }
        )
    return groups


def cache_folder() -> Path:
    """The cache folder of encoded data: ``$FEDLORA_CACHE``, or ``~/.cache/fedlora``."""
    return Path(os.environ.get("FEDLORA_CACHE") or Path.home() / ".cache" / "fedlora")


def cached(tokenizer: Any, content: str, settings: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """Arrays made from a tokenizer and data: read from disk where they were made before.

    Args:
        tokenizer: its class and whole vocabulary name the file.
        content: a digest of the data.
        settings: everything else that decides the arrays, as JSON values.
        make: makes them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forget_last_call(tokenizer)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    # tokenizers of one vocabulary may differ in what they give a model
    own = {
        "inputs": list(getattr(tokenizer, "model_input_names", [])),
        "cut": getattr(tokenizer, "truncation_side", ""),
    }
    settings = {**settings, **own}
    parts = [tokenizer.__class__.__name__, transformers.__version__, json.dumps(settings, sort_keys=True)]
    key = xxhash.xxh3_128_hexdigest("/".join([content, *parts, vocabulary]).encode())
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, SafetensorError):
        made_anew(path)
    stage("tokenising the texts")
    result = make()
    # failing to write the cache only costs time
    with contextlib.suppress(OSError), new_file(path) as temporary:
        save_file(result, temporary, {"digest": _digest(result)})
    return result


def made_anew(path: Path) -> None:
    """Reports that a cached file is damaged, and is made anew."""
    LOG.warning("the cached file %s is damaged, and is made anew", path)


def _read(path: Path) -> Arrays:
    with safe_open(path, "np") as file:
        digest = (file.metadata() or {}).get("digest")
        result = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    # files of older versions have no digest
    if digest not in (None, _digest(result)):
        raise ValueError("it differs from what was written")
    return result


def _digest(arrays: Arrays) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()

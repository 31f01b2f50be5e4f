"""Next-token prediction: sequences with their learnt tokens, packing, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedlora.core.errors import TrainingError
from fedlora.tasks.base import Batch, Positions
from fedlora.tasks.models.encoded import Arrays, Ragged, by_length, ranges
from fedlora.tasks.models.modes import evaluation_mode
from fedlora.tasks.models.staged import LEARNT, learnt_places

IGNORED = -100
"""The label of a token that is not learnt."""
CHUNK_ENTRIES = 2**24
"""Number of logits per chunk of the loss, whose copies dominate memory for large vocabularies."""


class Examples(NamedTuple):
    """Examples as token sequences.

    Args:
        tokens: int32, all sequences; each has two tokens at least.
        learnt: int8, in the same places: one where a token is to be predicted from those before it. The first token
            of a sequence has nothing before it, so it never is.
        offsets: ``(examples + 1,)`` int64; example ``i`` is the sequences from ``offsets[i]`` to ``offsets[i + 1]``.
        kept: ``(examples,)`` int64, the rows that they were made of; one with nothing to learn makes none.
        num_cut: rows that lost tokens.
    """

    tokens: Ragged
    learnt: Ragged
    offsets: Positions
    kept: Positions
    num_cut: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], num_cut: int = 0) -> Examples:
        """Lays the sequences of ``rows`` one after the other; those with nothing to learn are left out.

        Args:
            rows: for each row its sequences as ``(tokens, learnt)``.
            num_cut: rows that lost tokens.
        """
        found = [[(tokens, [0, *learnt[1:]]) for tokens, learnt in row if any(learnt[1:])] for row in rows]
        kept = np.asarray([number for number, row in enumerate(found) if row], dtype=np.int64)
        sequences = [one for row in found for one in row]
        tokens = Ragged.of([tokens for tokens, _ in sequences])
        learnt = Ragged.of([learnt for _, learnt in sequences], np.int8)
        offsets = np.concatenate([[0], np.cumsum([len(found[row]) for row in kept])]).astype(np.int64)
        return cls(tokens, learnt, offsets, kept, num_cut)

    @classmethod
    def read(cls, arrays: Arrays) -> Examples:
        """The inverse of ``arrays``."""
        tokens, learnt = (Ragged(arrays[name], arrays["sequences"]) for name in ("tokens", "learnt"))
        return cls(tokens, learnt, arrays["examples"], arrays["kept"], int(arrays["num_cut"][0]))

    def arrays(self) -> Arrays:
        """Everything as flat arrays, for the cache."""
        return {
            "tokens": self.tokens.values,
            "learnt": self.learnt.values,
            "sequences": self.tokens.offsets,
            "examples": self.offsets,
            "kept": self.kept,
            "num_cut": np.asarray([self.num_cut], dtype=np.int64),
        }

    def sequences(self, rows: Positions) -> Positions:
        """The sequences of the examples ``rows``, in their order."""
        return ranges(self.offsets, rows)

    def num_learnt(self, sequences: Positions) -> Positions:
        """How many tokens of each of ``sequences`` are learnt."""
        parts = (self.learnt.values[slice(*self.learnt.offsets[one : one + 2])] for one in sequences)
        return np.asarray([int(part.sum()) for part in parts], dtype=np.int64)


def pack(lengths: Positions, limit: int) -> list[list[int]]:
    """Packs sequences into blocks by first-fit decreasing.

    Args:
        lengths: number of tokens in each sequence, at most ``limit``.
        limit: capacity of a block.

    Returns:
        The numbers of the sequences in each block.

    >>> pack(np.array([3, 8, 5, 2]), 8)
    [[1], [2, 0], [3]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        place = next((place for place, free in enumerate(room) if free >= length), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(limit)
        bins[place].append(number)
        room[place] -= length
    return bins


def joined(ragged: Ragged, bins: Sequence[Positions]) -> Ragged:
    """The sequences of each of ``bins`` as one."""
    parts = [ragged.values[ragged.offsets[number] : ragged.offsets[number + 1]] for one in bins for number in one]
    offsets = np.concatenate([[0], np.cumsum([ragged.lengths(one).sum() for one in bins])]).astype(np.int64)
    return Ragged(np.concatenate(parts), offsets)


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The cross entropy ``-log p(token | tokens before it)``, the mean over all learnt tokens of the batch, in float32.

    On a CPU the sequences are processed in groups of similar length. Where logits are many, the last matrix is applied
    in chunks of ``CHUNK_ENTRIES`` logits, which are computed again in the backward pass, so that no more are held.

    Args:
        model: gives ``logits``.
        batch: of ``input_ids``, ``attention_mask`` and ``labels``.

    Raises:
        TrainingError: no token of the batch is learnt.
    """
    sums, count = [], 0
    for part in by_length(batch):
        places = _places(part)
        sums.append(_summed_loss(model, part, places))
        count += len(places.targets)
    if not count:
        raise TrainingError("no token of a batch is to be learnt: give examples with answers, or a larger max_length")
    return torch.stack(sums).sum() / count


def target_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits that predict each learnt token.

    The model's last matrix is applied only at these positions.

    Args:
        model: a causal language model.
        batch: of ``input_ids``, ``attention_mask`` and ``labels``.

    Returns:
        Logits ``(learnt, vocabulary)`` in the model's number format, and the tokens ``(learnt,)`` int64.
    """
    places = _places(batch)
    return _logits(model, batch, places.choose), places.targets


class _Places(NamedTuple):
    """Where a batch's learnt tokens are predicted, and the tokens; ``width`` is that of the batch."""

    row: Tensor
    place: Tensor
    targets: Tensor
    width: int

    def choose(self, values: Tensor) -> Tensor:
        """The values at these places; tokens prepended by a tuning are not part of the batch."""
        return values[:, values.shape[1] - self.width :][self.row, self.place]


def _places(batch: Batch) -> _Places:
    labels = batch["labels"]
    listed = learnt_places(batch, labels.shape[1] - 1)
    row, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True) if listed is None else listed
    return _Places(row, place, labels[row, place + 1], labels.shape[1])


def _logits(model: nn.Module, batch: Batch, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits of what ``choose`` takes of the last hidden states."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", LEARNT)}
    last = _last_matrix(model)
    if last is None:
        return choose(model(**inputs, use_cache=False).logits)
    handle = last.register_forward_pre_hook(lambda _, given: (choose(given[0]).unsqueeze(0), *given[1:]))
    try:
        found: Tensor = model(**inputs, use_cache=False).logits.squeeze(0)
        return found
    finally:
        handle.remove()


def _last_matrix(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _summed_loss(model: nn.Module, batch: Batch, places: _Places) -> Tensor:
    last = _last_matrix(model)
    vocabulary = getattr(last, "out_features", 0)
    if last is None or len(places.targets) * vocabulary <= CHUNK_ENTRIES or not _ends_with(model, last, batch, places):
        return summed_cross_entropy(_logits(model, batch, places.choose), places.targets)
    hidden, _ = _hidden(model, batch, places)

    def loss(part: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(last(part), targets)

    return _in_chunks(loss, hidden, places.targets, vocabulary)


_ENDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _ends_with(model: nn.Module, last: nn.Module, batch: Batch, places: _Places) -> bool:
    """Whether the model returns what its last matrix does, neither capped nor scaled; tried once for each model.

    A matrix with an adapter does not count: its dropout would differ when it is computed again.
    """
    if not {name for name, _ in last.named_parameters()} <= {"weight", "bias"}:
        return False
    if model not in _ENDS:
        with torch.no_grad(), evaluation_mode(model):
            hidden, logits = _hidden(model, batch, places)
            _ENDS[model] = torch.equal(last(hidden[None, :1]), logits[None])
    return _ENDS[model]


def _hidden(model: nn.Module, batch: Batch, places: _Places) -> tuple[Tensor, Tensor]:
    """The last hidden states at the places, and the logits at the first of them."""
    found: list[Tensor] = []

    def first(values: Tensor) -> Tensor:
        found.append(places.choose(values))
        return found[0][:1]

    logits = _logits(model, batch, first)
    return found[0], logits


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of cross entropies in float32, in chunks that are recomputed in the backward pass.

    Args:
        logits: ``(tokens, vocabulary)``.
        targets: ``(tokens,)`` int64.
    """
    if logits.numel() <= CHUNK_ENTRIES:
        return _cross_entropy(logits, targets)
    return _in_chunks(_cross_entropy, logits, targets, logits.shape[-1])


def _in_chunks(loss: Callable[[Tensor, Tensor], Tensor], values: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """The sum of ``loss`` over chunks of rows, computed again in the backward pass."""
    size = max(1, CHUNK_ENTRIES // vocabulary)
    parts = [
        checkpoint(loss, part, wanted, use_reentrant=False, preserve_rng_state=False)
        for part, wanted in zip(torch.split(values, size), torch.split(targets, size), strict=True)
    ]
    return torch.stack(parts).sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")

"""Questions with their contexts as token sequences; a long context is split into overlapping windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import ConfigError
from fedlora.tasks.base import Positions
from fedlora.tasks.models.encoded import Arrays, Ragged, ranges
from fedlora.tasks.qa.spans import Reference

CHUNK = 1000
"""Number of questions tokenised at a time."""


class Passages(NamedTuple):
    """Questions with their contexts, each as one or more sequences.

    Args:
        tokens: the sequences.
        types: the type of each token, where the model takes them.
        chars: ``(entries, 2)`` int32: the characters of the context that each entry of ``tokens`` is; zeros for others.
        contexts: ``(windows, 2)`` int64: first and last (exclusive) position of the context's tokens.
        examples: ``(examples + 1,)`` int64: example ``i`` has the windows ``examples[i]`` to ``examples[i + 1]``.
    """

    tokens: Ragged
    types: Ragged | None
    chars: NDArray[np.int32]
    contexts: NDArray[np.int64]
    examples: NDArray[np.int64]

    @classmethod
    def of(cls, arrays: Arrays) -> Passages:
        """From arrays as ``encode`` makes them."""
        types = Ragged(arrays["types"], arrays["offsets"]) if "types" in arrays else None
        tokens = Ragged(arrays["tokens"], arrays["offsets"])
        return cls(tokens, types, arrays["chars"], arrays["contexts"], arrays["examples"])

    def rows(self, examples: Positions) -> Positions:
        """The windows of ``examples``, in their order."""
        return ranges(self.examples, examples)

    def counts(self, examples: Positions) -> NDArray[np.int64]:
        """Number of windows of each of ``examples``."""
        counts: NDArray[np.int64] = self.examples[examples + 1] - self.examples[examples]
        return counts

    def places(self, window: int) -> NDArray[np.int32]:
        """``(tokens, 2)``: the characters that the context's tokens in a window are."""
        first, last = self.tokens.offsets[window] + self.contexts[window]
        return self.chars[first:last]

    def targets(self, references: Sequence[Sequence[Reference]]) -> NDArray[np.int64]:
        """First and last token of each example's first answer, in each of its windows.

        Args:
            references: the answers of each example.

        Returns:
            ``(windows, 2)`` int64, counted from the start of the window; zeros where it has not got the whole answer.
        """
        found = np.zeros((len(self.contexts), 2), dtype=np.int64)
        for example, answers in enumerate(references):
            windows = range(self.examples[example], self.examples[example + 1])
            every = np.concatenate([self.places(window) for window in windows])
            every = every[every[:, 0] < every[:, 1]]
            if not answers or not len(every):
                continue
            # a tokenizer may drop characters at the edges
            start, end = max(answers[0].start, every[:, 0].min()), min(answers[0].end, every[:, 1].max())
            for window in windows:
                found[window] = _target(self.places(window), int(self.contexts[window, 0]), start, end)
        return found


def _target(places: NDArray[np.int32], first: int, start: int, end: int) -> tuple[int, int]:
    real = places[:, 0] < places[:, 1]
    inside = np.flatnonzero(real & (places[:, 0] < end) & (places[:, 1] > start))
    if not len(inside) or places[real, 0].min() > start or places[real, 1].max() < end:
        return 0, 0
    return first + int(inside[0]), first + int(inside[-1])


def check_stride(tokenizer: Any, max_length: int, stride: int) -> None:
    """Refuses windows that cannot be made.

    Args:
        tokenizer: of the model.
        max_length: tokens of a window.
        stride: tokens of the context that a window shares with the next one.

    Raises:
        ConfigError: the tokenizer does not say where tokens lie, or ``stride`` leaves no step between windows.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            "the model's tokenizer does not map its tokens to characters, but answers are located by "
            "characters: use a model with a fast tokenizer, a tokenizer.json"
        )
    question, own = max_length // 2, tokenizer.num_special_tokens_to_add(pair=True)
    room = max_length - question - own
    if stride >= room:
        raise ConfigError(
            f"task.stride = {stride} leaves no step between windows: of max_length = {max_length} tokens a question "
            f"may take {question} and the tokenizer takes {own}, so set stride below {room}, or max_length higher"
        )


def encode(questions: list[str], contexts: list[str], tokenizer: Any, max_length: int, stride: int) -> Arrays:
    """Questions with their contexts as windows.

    A question of more than ``max_length // 2`` tokens is cut to so many.

    Args:
        questions: texts.
        contexts: the context of each.
        tokenizer: of the model.
        max_length: tokens of a window.
        stride: tokens of the context that a window shares with the next one.

    Returns:
        ``tokens``, ``offsets``, ``chars``, ``contexts``, ``examples``, and ``types`` where the model takes them; see
        ``Passages``.
    """
    tokens: list[list[int]] = []
    types: list[list[int]] = []
    chars: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    counts = np.zeros(len(questions), dtype=np.int64)
    for first in range(0, len(questions), CHUNK):
        encoded = tokenizer(
            _cut(questions[first : first + CHUNK], tokenizer, max_length // 2),
            contexts[first : first + CHUNK],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        tokens += encoded["input_ids"]
        types += encoded.get("token_type_ids", [])
        for window, offsets in enumerate(encoded["offset_mapping"]):
            counts[first + encoded["overflow_to_sample_mapping"][window]] += 1
            inside = [place for place, side in enumerate(encoded.sequence_ids(window)) if side == 1]
            low, high = (inside[0], inside[-1] + 1) if inside else (0, 0)
            places.append((low, high))
            chars += [pair if low <= place < high else (0, 0) for place, pair in enumerate(offsets)]
    ragged = Ragged.of(tokens)
    arrays: Arrays = {
        "tokens": ragged.values,
        "offsets": ragged.offsets,
        "chars": np.array(chars, dtype=np.int32),
        "contexts": np.array(places, dtype=np.int64),
        "examples": np.concatenate([[0], np.cumsum(counts)]),
    }
    return arrays | ({"types": Ragged.of(types, np.int8).values} if types else {})


def _cut(questions: list[str], tokenizer: Any, limit: int) -> list[str]:
    """The questions, each one's characters up to the end of its token number ``limit``."""
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    return [
        question if len(offsets) <= limit else question[: offsets[limit - 1][1]]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]

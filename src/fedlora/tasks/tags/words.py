"""Words as sub-word tokens, in windows; each word is scored once."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import ConfigError
from fedlora.tasks.base import Positions
from fedlora.tasks.models.encoded import Arrays, Ragged, ranges
from fedlora.tasks.models.loading import quiet_transformers

_WORD = re.compile(r"\w+|[^\w\s]")


class Windows(NamedTuple):
    """Examples as sequences of tokens; a long one makes several.

    Args:
        tokens: the sequences.
        places: as ``tokens``: the number of a word, counted over all examples, where a piece is scored for it, else -1.
        examples: ``(examples + 1,)`` int64; example ``i`` is the sequences ``examples[i]`` to ``examples[i + 1] - 1``.
        tags: a class number for each word, by example.
    """

    tokens: Ragged
    places: Ragged
    examples: NDArray[np.int64]
    tags: Ragged

    @classmethod
    def over(cls, arrays: Arrays, tags: Ragged) -> Windows:
        """What ``cut`` made, with a tag for each word."""
        offsets = arrays["offsets"]
        return cls(Ragged(arrays["tokens"], offsets), Ragged(arrays["places"], offsets), arrays["examples"], tags)

    def of(self, rows: Positions) -> Positions:
        """The sequences of the examples ``rows``, in order."""
        return ranges(self.examples, rows)

    def num_scored(self, sequences: Positions) -> Positions:
        """How many words are scored in each of ``sequences``."""
        places, offsets = self.places
        return np.asarray([int((places[offsets[one] : offsets[one + 1]] >= 0).sum()) for one in sequences], np.int64)


def cut(examples: Sequence[Sequence[str]], tokenizer: Any, max_length: int, stride: int) -> Arrays:
    """Words as pieces, in windows of at most ``max_length``; of each word the first piece is scored, in one window.

    Args:
        examples: the words of each.
        tokenizer: a fast one.
        max_length: tokens of a window, special ones included.
        stride: tokens that a window shares with the one before.

    Returns:
        What ``Windows`` is made of: ``tokens``, ``places`` int32, ``offsets`` of sequences, ``examples`` int64.

    Raises:
        ConfigError: ``stride`` leaves no room in a window.
    """
    room = max_length - int(tokenizer.num_special_tokens_to_add())
    if stride >= room:
        raise ConfigError(
            f"task.stride = {stride} leaves no room in windows of max_length = {max_length} tokens: set stride to "
            f"{max(0, room - 1)} or less, or max_length to {max_length - room + stride + 1} or more"
        )
    before = " " * _joins_words(tokenizer)
    asked = [[before + word if word and not word[0].isspace() else word for word in words] for words in examples]
    with quiet_transformers():  # it would warn of sentences that are cut below
        encoded = tokenizer(asked, is_split_into_words=True, return_special_tokens_mask=True)
    tokens: list[list[int]] = []
    places: list[list[int]] = []
    sequences, base = [0], 0
    for number, words in enumerate(examples):
        ids, special = encoded["input_ids"][number], encoded["special_tokens_mask"][number]
        inner = [place for place, is_special in enumerate(special) if not is_special]
        first, last = (inner[0], inner[-1] + 1) if inner else (0, 0)
        owners = encoded.word_ids(number)[first:last]
        scored = [
            -1 if owner is None or (place and owners[place - 1] == owner) else base + owner
            for place, owner in enumerate(owners)
        ]
        spans = window_spans(len(owners), room, stride)
        chosen = best_windows(len(owners), spans)
        for window, (start, end) in enumerate(spans):
            sequence = [*ids[:first], *ids[first + start : first + end], *ids[last:]]
            kept = [scored[place] if chosen[place] == window else -1 for place in range(start, end)]
            # a model takes no empty sequence
            tokens.append(sequence or [int(tokenizer.pad_token_id)])
            places.append([-1] * first + kept + [-1] * (len(tokens[-1]) - first - len(kept)))
        sequences.append(len(tokens))
        base += len(words)
    flat = Ragged.of(tokens)
    return {
        "tokens": flat.values,
        "offsets": flat.offsets,
        "places": Ragged.of(places).values,
        "examples": np.asarray(sequences, np.int64),
    }


def words_of(given: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of an input, and the characters that each of its words is."""
    if given.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            words = json.loads(given)
            if words and all(isinstance(word, str) for word in words):
                ends = list(accumulate(len(word) + 1 for word in words))
                return " ".join(words), [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
    return given, [match.span() for match in _WORD.finditer(given)]


def window_spans(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First and last position (exclusive) of the windows that cover ``length`` pieces.

    >>> window_spans(10, 6, 2)
    [(0, 6), (4, 10)]
    >>> window_spans(11, 6, 2)
    [(0, 6), (4, 10), (8, 11)]
    """
    spans = [(0, min(room, length))]
    while spans[-1][1] < length:
        start = spans[-1][0] + room - stride
        spans.append((start, min(start + room, length)))
    return spans


def best_windows(length: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each piece the window in which the nearer cut is farthest; the first of equals.

    A text's own ends are no cuts, but counting them as such chooses the same windows.

    >>> best_windows(10, [(0, 6), (4, 10)])
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    """

    def context(window: int, place: int) -> int:
        start, end = spans[window]
        return min(place - start, end - 1 - place)

    chosen, window = [], 0
    for place in range(length):
        while window + 1 < len(spans) and context(window + 1, place) > context(window, place):
            window += 1
        chosen.append(window)
    return chosen


def _joins_words(tokenizer: Any) -> bool:
    """Whether words of a text begin with a piece that has their space in it, and pre-split ones would lack it."""

    def pieces(text: str | list[str]) -> list[int]:
        found = tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)
        return list(found["input_ids"])

    split, spaced = pieces(["a", "a"]), pieces(["a", " a"])
    # a space that is a piece of its own would be scored in place of the word
    return split != spaced and len(split) == len(spaced) and spaced == pieces("a a")

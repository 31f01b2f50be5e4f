"""Whether a tokenizer and a model belong together: an empty vocabulary, ids beyond the embedding, unknown tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.core.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.tasks.models.encoded import Ragged

MOST_UNKNOWN = 0.1
"""The share of unknown tokens above which a note is given."""
_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a local folder has any of the files in which vocabularies are kept."""
    return any((folder / name).exists() for name in _FILES)


def check_vocabulary(tokenizer: Any, path: str) -> None:
    """Refuses the tokenizer that ``transformers`` makes up where a folder has none: special tokens and nothing else.

    Raises:
        ConfigError: there is no ordinary token.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    ordinary = [token for token in tokenizer.get_vocab() if token not in added | {*tokenizer.all_special_tokens}]
    if len(ordinary) < 2:
        raise ConfigError(
            f"{path!r} holds no vocabulary, so every word would be the same unknown token: put the model's "
            "tokenizer.json and tokenizer_config.json there, as tokenizer.save_pretrained writes them"
        )


def check_ids(largest: int, rows: int | None, path: str, tokenizer: Any) -> None:
    """Refuses token ids that the model's embedding has no row for.

    Args:
        largest: the largest id that the model is to read.
        rows: rows of the embedding; None if unknown.
        path: the model's, for the message.
        tokenizer: what gave the ids.

    Raises:
        ConfigError: an id is too large.
    """
    if rows is not None and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"the tokenizer of {path!r} gives the token {token!r} the number {largest}, but the model's embedding has "
            f"{rows} rows, for the numbers below {rows}: put the tokenizer there that belongs to the model, or enlarge "
            f"the model with resize_token_embeddings({max(largest + 1, len(tokenizer))}) and save it"
        )


def unknown_notes(tokens: Iterable[Ragged], tokenizer: Any, path: str) -> tuple[str, ...]:
    """A sentence if more than a tenth of the tokens of data are unknown to a tokenizer.

    Args:
        tokens: the encoded data, which are not padded.
        tokenizer: what encoded them.
        path: the model's, for the sentence.
    """
    unknown = tokenizer.unk_token_id
    others = [number for number in tokenizer.all_special_ids if number != unknown]
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    # where one token has several uses (GPT-2), its count says nothing
    if unknown is None or unknown in [getattr(tokenizer, name) for name in names]:
        return ()
    values = [one.values for one in tokens]
    count = sum(int((one == unknown).sum()) for one in values)
    total = sum(int((~np.isin(one, others)).sum()) for one in values)
    if not total or count / total <= MOST_UNKNOWN:
        return ()
    return (
        f"{count / total:.0%} of the tokens are unknown to the tokenizer of {path!r} ({tokenizer.unk_token}): "
        "the model cannot distinguish these words; check that the tokenizer is the model's own, or choose a "
        "model for the language and script of the texts",
    )

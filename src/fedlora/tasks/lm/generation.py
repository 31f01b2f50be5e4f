"""Greedy generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fedlora.core.errors import ConfigError
from fedlora.core.later import transformers
from fedlora.core.progress import counted
from fedlora.tasks.models.loading import positions, quiet_transformers


def cut_left(tokens: Sequence[int], size: int, bos: int | None) -> list[int]:
    """The last ``size`` tokens; a leading ``bos`` stays.

    >>> cut_left([1, 5, 6, 7], 3, bos=1), cut_left([1, 5, 6, 7], 3, bos=None)
    ([1, 6, 7], [5, 6, 7])
    """
    if len(tokens) <= size:
        return list(tokens)
    head = list(tokens[:1]) if tokens[0] == bos and size > 1 else []
    return head + list(tokens[len(tokens) - size + len(head) :])


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
) -> list[list[int]]:
    """Generates greedily up to an end token or ``max_new_tokens``; the end token is not included.

    End tokens are the tokenizer's and those in the model's generation settings.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids, at least one in each; truncated from the left if they do not fit the model.
        max_new_tokens: maximum number of new tokens.
        batch_size: number of prompts per batch, padded on the left.
        device: the model's device.

    Raises:
        ConfigError: the model's context is too short for that many new tokens.
    """
    limit = positions(model)
    if limit is not None and max_new_tokens >= limit:
        raise ConfigError(
            f"task.max_new_tokens = {max_new_tokens} leaves no room for a prompt in a model that reads {limit} tokens; "
            "make it smaller"
        )
    if limit is not None:
        prompts = [cut_left(prompt, limit - max_new_tokens, tokenizer.bos_token_id) for prompt in prompts]
    stops = stop_tokens(model, tokenizer)
    settings = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    result: list[list[int]] = [[] for _ in prompts]
    for chosen in counted([order[first : first + batch_size] for first in range(0, len(order), batch_size)]):
        width = len(prompts[chosen[-1]])
        gaps = [width - len(prompts[number]) for number in chosen]
        inputs = [[tokenizer.pad_token_id] * gap + list(prompts[n]) for gap, n in zip(gaps, chosen, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        with quiet_transformers(), _settings(model, settings):
            found = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(inputs, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
        for number, tokens in zip(chosen, found[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
            result[number] = tokens[:end]
    return result


@contextlib.contextmanager
def _settings(model: nn.Module, settings: Any) -> Iterator[None]:
    """Puts ``settings`` in the place of the model's own, of which ``transformers`` would take all that they lack."""
    inner: Any = next(one for one in model.modules() if isinstance(one, transformers.GenerationMixin))
    own = inner.generation_config
    inner.generation_config = settings
    try:
        yield
    finally:
        inner.generation_config = own


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those in the model's generation settings."""
    settings = getattr(model, "generation_config", None)
    declared = getattr(settings, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [tokenizer.eos_token_id, *declared] if token is not None})


def without_end(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """A prompt's tokens without an end token added by the tokenizer, so that the text can be continued."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return list(tokens[:-1]) if len(tokens) > 1 and tokens[-1] in ends else list(tokens)

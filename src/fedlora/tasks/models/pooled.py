"""A linear classifier over pooled token states, in place of the head that the stock class has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fedlora.core.errors import ConfigError
from fedlora.core.state import generator, named_seed
from fedlora.tasks.models.cpu import Dropout
from fedlora.tasks.models.modes import evaluation_mode
from fedlora.tasks.models.pooling import Pooling
from fedlora.tasks.models.rounded import mixed

_FLAGS = (
    *("base_model_prefix", "main_input_name", "supports_gradient_checkpointing", "_no_split_modules"),
    *("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"),
)
_DROPOUTS = (
    *("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "cls_dropout"),
    *("hidden_dropout_prob", "hidden_dropout"),
)
"""Where families keep the dropout rate before their classifier, the most specific first."""


class PooledClassifier(PreTrainedModel):  # type: ignore[no-untyped-call]
    """``logits = W dropout(p) + b`` with ``p`` the mean of the attended tokens' last hidden states, or the first one.

    The backbone keeps its name and its parameters, less its pooler, which nothing would read.

    Args:
        stock: the model to take the backbone and the configuration from.
        pooling: ``mean`` or ``cls``.
        seed: of the classifier, where the stock class has no plain linear one of the right size.

    Raises:
        ConfigError: the backbone is no encoder with a state for each token.
    """

    def __init__(self, stock: PreTrainedModel, pooling: Pooling, seed: int) -> None:
        # the checks of the base class read these, which differ between families
        for flag in _FLAGS:
            setattr(self, flag, getattr(stock, flag))
        super().__init__(stock.config)
        backbone = _encoder(stock, pooling)
        pooler = getattr(backbone, "pooler", None)
        # in a tuple it is no part of the model, yet there for exports
        self._pooler = (pooler,)
        if isinstance(pooler, nn.Module):
            backbone.pooler = nn.Identity()  # some families call it unasked
        setattr(self, self.base_model_prefix, backbone)
        self.pooling = pooling
        rates = (getattr(stock.config, name, None) for name in _DROPOUTS)
        self.dropout = Dropout(next((float(rate) for rate in rates if rate is not None), 0.0))
        self.classifier = _classifier(stock, _hidden_size(stock, backbone, pooling), seed)
        self.train(stock.training)

    def save_backbone(self, folder: Path) -> None:
        """Writes the backbone, its pooler as it was pre-trained, for ``AutoModel``."""
        backbone: Any = self.base_model
        (own,) = self._pooler
        if own is None:
            backbone.save_pretrained(str(folder))
            return
        spare, backbone.pooler = backbone.pooler, own.to(backbone.dtype)
        backbone.save_pretrained(str(folder))
        backbone.pooler = spare

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: None = None,
        return_dict: None = None,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Logits for a batch of token ids.

        Args:
            input_ids: ``(batch, length)``.
            attention_mask: ``(batch, length)``; one where there is a token. None if there is one everywhere.
            labels: none; losses are computed elsewhere.
            return_dict: ignored.
            others: what else the backbone takes, such as ``token_type_ids``; None is left out.
        """
        others = {name: value for name, value in others.items() if value is not None}
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
        pooled = pool(states, attention_mask, self.pooling)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


def pool(states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """``(batch, size)``: the first of the states, or the mean of the attended ones, summed in float32.

    Args:
        states: ``(batch, length, size)``.
        attention_mask: ``(batch, length)``.
        pooling: ``mean`` or ``cls``.
    """
    if pooling == "cls":
        return states[:, 0]
    mask = attention_mask.to(states.dtype).unsqueeze(2)
    total = (states * mask).sum(1, dtype=torch.float32)
    return (total / attention_mask.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)


def _encoder(stock: PreTrainedModel, pooling: Pooling) -> nn.Module:
    backbone = getattr(stock, str(stock.base_model_prefix), None)
    paired = isinstance(getattr(backbone, "decoder", None), nn.Module)
    if paired or not isinstance(backbone, PreTrainedModel):
        raise _refusal(stock, pooling, "has no encoder of its own beneath its head")
    return backbone


def _hidden_size(stock: PreTrainedModel, backbone: nn.Module, pooling: Pooling) -> int:
    """The size of a token's state, from two texts that differ in their last token alone."""
    device = next(backbone.parameters()).device
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=device)
    with torch.no_grad(), mixed(backbone, device), evaluation_mode(backbone):
        found = backbone(input_ids=ids, attention_mask=torch.ones_like(ids))
    states = getattr(found, "last_hidden_state", None)
    if states is None or states.shape[:2] != ids.shape:
        raise _refusal(stock, pooling, "gives no last hidden state for each token")
    if torch.equal(states[0, 0], states[1, 0]):
        raise _refusal(stock, pooling, "reads from left to right, so that the first tokens do not see the rest")
    return int(states.shape[2])


def _refusal(stock: PreTrainedModel, pooling: Pooling, why: str) -> ConfigError:
    return ConfigError(
        f"task.pooling = {pooling!r} needs an encoder, but {type(stock).__name__} {why}; set task.pooling = 'model'"
    )


def _classifier(stock: PreTrainedModel, size: int, seed: int) -> nn.Linear:
    """The stock class's own where it is one matrix over the states, else a fresh one, drawn as families draw theirs."""
    own = getattr(stock, "classifier", None)
    if type(own) is nn.Linear and own.in_features == size:
        return own
    outputs = stock.config.num_labels
    assert outputs is not None
    fresh = nn.Linear(size, outputs)
    scale = float(getattr(stock.config, "initializer_range", None) or 0.02)
    with torch.no_grad():
        fresh.weight.normal_(0.0, scale, generator=generator(named_seed(seed, "classifier")))
        fresh.bias.zero_()
    return fresh.to(next(stock.parameters()).device)

"""Embeddings of examples by the pre-trained backbone, for clustering."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.core.errors import ConfigError
from fedlora.tasks.models.encoded import chunks

if TYPE_CHECKING:
    from fedlora.tasks.base import Batch, Prepared, Split

CHUNK = 32


def embed(task: Prepared, split: Split, device: torch.device) -> NDArray[np.float32]:
    """The mean of the backbone's last hidden state over each example.

    Args:
        task: model and data.
        split: whose examples.
        device: where to compute.

    Returns:
        ``(examples, size)`` float32.

    Raises:
        ConfigError: the model has no backbone of its own.
    """
    model, _ = task.load_model(0, "fp32", device)
    backbone = getattr(model, str(model.base_model_prefix), None)
    if backbone is None:
        raise ConfigError(
            f"embeddings are those of a model's backbone, and {type(model).__name__} has none of the name "
            f"{model.base_model_prefix!r}: cluster by other features, or use another model"
        )
    accepted = set(inspect.signature(backbone.forward).parameters)
    backbone.eval()
    rows, result = np.arange(task.num_examples(split)), []
    with torch.inference_mode():
        for chunk in chunks(rows, CHUNK):
            found = _means(backbone, accepted, task.batch(chunk, device, split))
            if len(found) != len(chunk):  # an example may make several sequences
                parts = (
                    _means(backbone, accepted, task.batch(chunk[[row]], device, split)) for row in range(len(chunk))
                )
                found = torch.stack([part.mean(0) for part in parts])
            result.append(found.cpu().numpy())
    return np.concatenate(result)


def _means(backbone: nn.Module, accepted: set[str], batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name in accepted}
    hidden = backbone(**inputs).last_hidden_state.float()
    if hidden.dim() == 4:  # a picture's channels come first
        hidden = hidden.flatten(2).transpose(1, 2)
    mask = inputs.get("attention_mask")
    weight = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.float()
    means: Tensor = (hidden * weight.unsqueeze(2)).sum(1) / weight.sum(1, keepdim=True)
    return means

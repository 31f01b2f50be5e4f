"""A pooled classifier as the modules that ``sentence-transformers`` loads, which computes its logits with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

_MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
_STATES = {"mean": "the mean of the attended tokens' last hidden states", "cls": "the first token's last hidden state"}


def save_modules(folder: Path, pooling: Literal["cls", "mean"], max_length: int, weight: Tensor, bias: Tensor) -> None:
    """Writes ``modules.json`` and the modules ``Pooling`` and ``Dense`` beside a backbone or an adapter for one.

    Types and keys are the older ones of ``sentence-transformers``, which release 6 reads too.

    Args:
        folder: the exported folder.
        pooling: what the classifier reads.
        max_length: tokens after which a text is cut.
        weight: the classifier's, ``(outputs, size)``.
        bias: the classifier's, ``(outputs,)``.
    """
    outputs, size = weight.shape
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(_MODULES.items())
    ]
    dense = {
        "in_features": size,
        "out_features": outputs,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": size,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
        },
    )
    _write(folder / "2_Dense" / "config.json", dense)
    tensors = {"linear.weight": weight.contiguous(), "linear.bias": bias.contiguous()}
    save_file(tensors, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})


def usage(pooling: Literal["cls", "mean"], names: Sequence[str]) -> str:
    """How to load what ``save_modules`` wrote, for model cards.

    Args:
        pooling: what the classifier reads.
        names: the classes' names; none for a number.
    """
    columns = f"One column for each class: {', '.join(names)}." if names else "The one column is the number."
    return f"""
This is the backbone alone, since `transformers` has no class for the classifier: it is linear in
{_STATES[pooling]} (`task.pooling = "{pooling}"`).
`sentence-transformers` computes the logits, with the classifier's weights in `2_Dense`. {columns}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("THIS FOLDER")
logits = model.encode(["a text", "another"])
```
"""


def _write(path: Path, content: Mapping[str, object] | Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

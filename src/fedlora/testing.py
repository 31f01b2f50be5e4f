"""Tiny models and data without downloads, for tests of fedlora and of what is built on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from fedlora.clients import Population
from fedlora.tasks.base import Batch, Evaluation, Prepared, Rows, Split
from fedlora.tasks.text import head_names

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SMALL),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "roberta": ("RobertaConfig", {**_SMALL, "max_position_embeddings": 64}),
    "albert": ("AlbertConfig", {**_SMALL, "embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2Config",
        {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32},
    ),
    "deberta-v3": (
        "DebertaV2Config",
        {
            **_SMALL,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_position_embeddings": 32,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "llama": ("LlamaConfig", _DECODER),
    "qwen2": ("Qwen2Config", _DECODER),
    "qwen3": ("Qwen3Config", _DECODER),
}
FAMILIES = tuple(_CONFIGS)
"""Families of which a tiny model can be made."""


def tiny_config(family: str, vocabulary: int = 64, num_labels: int = 3) -> transformers.PretrainedConfig:
    """The configuration of a sequence classifier of two layers and 32 dimensions.

    Args:
        family: one of ``FAMILIES``.
        vocabulary: number of token ids.
        num_labels: classes.
    """
    name, settings = _CONFIGS[family]
    config = getattr(transformers, name)(vocab_size=vocabulary, pad_token_id=0, num_labels=num_labels, **settings)
    assert isinstance(config, transformers.PretrainedConfig)
    return config


def tiny_model(family: str = "bert", seed: int = 0, num_labels: int = 3) -> transformers.PreTrainedModel:
    """A sequence classifier with random weights; its singular values fall off as those of trained ones do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(family, num_labels=num_labels)
        model = transformers.AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    assert isinstance(model, transformers.PreTrainedModel)
    return model


class TensorTask(Prepared):
    """A classification task over token ids that are held in memory.

    Args:
        make_model: gives the pre-trained model, the same one each time.
        tokens: ``(examples, length)`` integers; zero is padding.
        labels: ``(examples,)`` integers.
        attention: whether the model gets an attention mask.
    """

    main_metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self, make_model: Callable[[], nn.Module], tokens: Tensor, labels: Tensor, attention: bool = True
    ) -> None:
        self.make_model = make_model
        self.tokens = tokens
        self.targets = labels
        self.attention = attention

    @property
    def labels(self) -> Rows:
        """See ``Prepared.labels``."""
        return self.targets.numpy()

    @property
    def label_names(self) -> list[str]:
        """See ``Prepared.label_names``."""
        return [f"class {number}" for number in range(int(self.targets.max()) + 1)]

    @property
    def fingerprint(self) -> str:
        """See ``Prepared.fingerprint``."""
        return "tensors"

    def num_examples(self, split: Split) -> int:
        """See ``Prepared.num_examples``; both splits hold the same examples."""
        return len(self.targets)

    def table(self) -> Any:
        """See ``Prepared.table``."""
        return None

    def columns(self, split: Split) -> list[str]:
        """See ``Prepared.columns``."""
        return ["label"]

    def column(self, name: str, split: Split) -> Rows:
        """See ``Prepared.column``."""
        return self.labels

    def load_model(self, seed: int, compute: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """See ``Prepared.load_model``."""
        model = self.make_model().to(device)
        return model, head_names(model, set())

    def batch(self, rows: Rows, device: torch.device, split: Split = "train") -> Batch:
        """See ``Prepared.batch``."""
        batch = {"input_ids": self.tokens[rows].to(device), "labels": self.targets[rows].to(device)}
        if self.attention:
            batch["attention_mask"] = (batch["input_ids"] != 0).long()
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Prepared.loss``."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return functional.cross_entropy(model(**inputs).logits.float(), batch["labels"])

    def evaluate(self, model: nn.Module, rows: Rows, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``."""
        batch = self.batch(rows, device)
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        return Evaluation(
            {
                "accuracy": float((logits.argmax(1) == labels).float().mean()),
                "loss": float(functional.cross_entropy(logits, labels)),
            },
            (),
        )

    def with_test(self, path: Path, text: str | None, label: str | None) -> Prepared:
        """See ``Prepared.with_test``; there are no files here."""
        return self

    def predict(self, model: nn.Module, texts: list[str], device: torch.device) -> list[dict[str, float]]:
        """See ``Prepared.predict``; there is no tokenizer."""
        return []

    def save_pretrained(self, folder: Path) -> None:
        """See ``Prepared.save_pretrained``; there is no tokenizer."""


def toy_task(family: str = "bert", num_examples: int = 48, num_labels: int = 3, seed: int = 0) -> TensorTask:
    """A task that a tiny model can learn: the label is the residue of a token that is repeated in the text.

    Args:
        family: one of ``FAMILIES``.
        num_examples: examples.
        num_labels: classes.
        seed: for data and weights.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % num_labels
    tokens = torch.randint(10, 60, (num_examples, 8), generator=generator)
    tokens[:, 1::2] = (labels + 1).unsqueeze(1)
    return TensorTask(lambda: tiny_model(family, seed, num_labels), tokens, labels)


def equal_population(num_examples: int, num_clients: int) -> Population:
    """Clients that hold equally many rows, in order."""
    offsets = np.linspace(0, num_examples, num_clients + 1).astype(np.int64)
    return Population(tuple(map(str, range(num_clients))), np.arange(num_examples, dtype=np.int64), offsets)

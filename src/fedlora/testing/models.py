"""Tiny models and data without downloads, for tests of fedlora and of code built on it."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.later import transformers
from fedlora.core.schema import Leaf, Schema, factor_leaf
from fedlora.population.clients import Population
from fedlora.tasks.base import Batch, Compute, Evaluation, Model, Positions, Prepared, Split
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.models.loading import head_names
from fedlora.tasks.models.shares import Shares, equal_shares

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_MARKS = {"cls_token_id": 1, "sep_token_id": 2}
_DEBERTA = {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SMALL),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "roberta": ("RobertaConfig", {**_SMALL, "max_position_embeddings": 64}),
    "albert": ("AlbertConfig", {**_SMALL, "embedding_size": 16}),
    "deberta-v2": ("DebertaV2Config", _DEBERTA),
    "deberta-v3": (
        "DebertaV2Config",
        {**_DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **_ENDS}),
    "llama": ("LlamaConfig", _DECODER),
    "qwen2": ("Qwen2Config", _DECODER),
    "qwen3": ("Qwen3Config", _DECODER),
    "gemma": ("GemmaConfig", _DECODER),
    "gemma3": ("Gemma3TextConfig", {**_DECODER, "sliding_window": 8}),
    "modernbert": (
        "ModernBertConfig",
        {**_SMALL, **_ENDS, **_MARKS, "max_position_embeddings": 32, "local_attention": 8},
    ),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 0.3},
    ),
}
_IMAGE_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", {**_SMALL, "patch_size": 8}),
    "dinov2": (
        "Dinov2Config",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "patch_size": 8},
    ),
    "mobilenet_v1": ("MobileNetV1Config", {"depth_multiplier": 0.05, "min_depth": 4, "classifier_dropout_prob": 0.1}),
    "mobilenet_v2": (
        "MobileNetV2Config",
        {"depth_multiplier": 0.05, "min_depth": 4, "depth_divisible_by": 4, "finegrained_output": False},
    ),
}
FAMILIES = tuple(_CONFIGS)
"""Model families available as tiny models over token ids."""
IMAGE_FAMILIES = tuple(_IMAGE_CONFIGS)
"""Model families available as tiny models over images of 16 by 16 pixels."""
Head = Literal["SequenceClassification", "TokenClassification", "QuestionAnswering", "CausalLM", "ImageClassification"]


def tiny_config(family: str, vocabulary: int = 64, num_labels: int = 3) -> transformers.PretrainedConfig:
    """The configuration of a model with two layers and 32 dimensions; convolutional models keep all their layers.

    Args:
        family: one of ``FAMILIES`` or ``IMAGE_FAMILIES``.
        vocabulary: number of token ids.
        num_labels: classes.
    """
    if family in IMAGE_FAMILIES:
        name, settings = _IMAGE_CONFIGS[family]
        config = getattr(transformers, name)(image_size=16, num_labels=num_labels, **settings)
    else:
        name, settings = _CONFIGS[family]
        config = getattr(transformers, name)(vocab_size=vocabulary, pad_token_id=0, num_labels=num_labels, **settings)
    assert isinstance(config, transformers.PretrainedConfig)
    return config


def default_head(family: str) -> Head:
    """The head of a family if none is requested: T5's encoder supports only the token classification head."""
    if family in IMAGE_FAMILIES:
        return "ImageClassification"
    return "TokenClassification" if family == "t5" else "SequenceClassification"


def tiny_model(
    family: str = "bert", seed: int = 0, num_labels: int = 3, head: Head | None = None
) -> transformers.PreTrainedModel:
    """A model with random weights, whose singular values decay like those of trained models.

    Args:
        family: one of ``FAMILIES`` or ``IMAGE_FAMILIES``.
        seed: seed of the weights.
        num_labels: number of classes.
        head: the head, as given by the ``AutoModelFor...`` class of ``transformers``; see ``default_head``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = getattr(transformers, f"AutoModelFor{head or default_head(family)}")
        # an answer span is a start and an end
        labels = 2 if head == "QuestionAnswering" else num_labels
        model = auto.from_config(tiny_config(family, num_labels=labels))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() in (2, 4):
                    parameter.mul_(3.0 if parameter.dim() == 2 else 8.0)
            if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
                # use statistics of random images, or signals would vanish from layer to layer
                model.train()(pixel_values=torch.randn(16, 3, 16, 16))
                model.eval()
    assert isinstance(model, transformers.PreTrainedModel)
    return model


def save_character_model(folder: Path) -> Path:
    """Writes a tiny BERT whose tokenizer reads single characters, so that it takes any text without a download."""
    import tokenizers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    known = [*special, *string.ascii_lowercase, *string.digits, *string.punctuation][:64]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: n for n, c in enumerate(known)}, "[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]
    fast.save_pretrained(str(folder))
    tiny_model().save_pretrained(str(folder))
    return folder


class TensorTask(Prepared):
    """A classification task over token ids or images held in memory.

    For a model with an output per token, the mean over tokens is used.

    Args:
        make_model: returns the pre-trained model, the same one each time.
        tokens: ``(examples, length)`` integers, zero is padding; or ``(examples, 3, height, width)`` pixels.
        labels: ``(examples,)`` integers.
        attention: whether a model over tokens gets an attention mask.
    """

    main_metric = "accuracy"
    higher_is_better = True
    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"

    def __init__(
        self, make_model: Callable[[], nn.Module], tokens: Tensor, labels: Tensor, attention: bool = True
    ) -> None:
        super().__init__(Model(), [f"class {number}" for number in range(int(labels.max()) + 1)], {})
        self.make_model = make_model
        self.tokens = tokens
        self.targets = labels
        self.attention = attention

    @property
    def labels(self) -> Positions:
        return self.targets.numpy()

    @property
    def fingerprint(self) -> str:
        return "tensors"

    def num_examples(self, split: Split) -> int:
        return len(self.targets)

    def table(self) -> Any:
        return None

    def columns(self, split: Split) -> list[str]:
        return ["label"]

    def column(self, name: str, split: Split) -> Positions:
        return self.labels

    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        model = self.make_model().to(device)
        return model, head_names(model, set())

    def batch(self, rows: Positions, device: torch.device, split: Split = "train") -> Batch:
        name = "input_ids" if self.tokens.dim() == 2 else "pixel_values"
        batch = {name: self.tokens[rows].to(device), "labels": self.targets[rows].to(device)}
        if self.attention and name == "input_ids":
            batch["attention_mask"] = (batch["input_ids"] != 0).long()
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.logits(model, batch), batch["labels"])

    def shares(self, rows: Positions, device: torch.device) -> Shares:
        return equal_shares(len(rows))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The outputs of ``model`` for each example, ``(examples, classes)`` float32."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = model(**inputs).logits.float()
        return logits.mean(1) if logits.dim() == 3 else logits

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        batch = self.batch(rows, device)
        labels, logits = batch["labels"], self.logits(model, batch)
        return Evaluation(
            {
                "accuracy": float((logits.argmax(1) == labels).float().mean()),
                "loss": float(functional.cross_entropy(logits, labels)),
            },
            (),
        )

    def with_rows(
        self, path: Path, columns: Mapping[str, str], split: Split = "test", reading: Reading | None = None
    ) -> Prepared:
        return self

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        return []

    def save_pretrained(self, folder: Path) -> None:
        """See ``Prepared.save_pretrained``; there is no tokenizer."""


def toy_task(family: str = "bert", num_examples: int = 48, num_labels: int = 3, seed: int = 0) -> TensorTask:
    """A task that a tiny model can learn: the label is given by a repeated token, or by an image's brightness.

    Args:
        family: one of ``FAMILIES`` or ``IMAGE_FAMILIES``.
        num_examples: number of examples.
        num_labels: number of classes.
        seed: seed of data and weights.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % num_labels
    if family in IMAGE_FAMILIES:
        tokens = torch.randn((num_examples, 3, 16, 16), generator=generator) + labels.view(-1, 1, 1, 1)
    else:
        tokens = torch.randint(10, 60, (num_examples, 8), generator=generator)
        tokens[:, 1::2] = (labels + 1).unsqueeze(1)
    return TensorTask(lambda: tiny_model(family, seed, num_labels), tokens, labels)


def equal_population(num_examples: int, num_clients: int) -> Population:
    """Clients that hold equal numbers of consecutive rows."""
    offsets = np.linspace(0, num_examples, num_clients + 1).astype(np.int64)
    return Population(tuple(map(str, range(num_clients))), np.arange(num_examples, dtype=np.int64), offsets)


def schema_of(groups: Mapping[str, str]) -> Schema:
    """The schema of tensors without a model: factors are identified by their names, ``lora_A`` and ``lora_B``.

    Args:
        groups: ``adapter`` or ``head`` for each name.
    """
    schema = Schema({name: Leaf(group) for name, group in groups.items()})
    for name in groups:
        if name.removesuffix(".weight").endswith("lora_A"):
            other = name.replace("lora_A", "lora_B")
            schema |= {name: factor_leaf("A", other)} | ({other: factor_leaf("B", name)} if other in groups else {})
    return schema

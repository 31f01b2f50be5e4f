"""Text classification: one label for a text or a pair of texts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import transformers
import xxhash
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedlora.component import STRICT
from fedlora.errors import ConfigError, DataError
from fedlora.tasks.base import Batch, Evaluation, Model, Prepared, Rows, Split, Task
from fedlora.tasks.sources import Source, fingerprint


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextClassification(Task):
    """One class for a text, or for a pair of texts.

    Args:
        max_length: tokens after which a text is cut.
        pad_to: ``longest`` pads a batch to its longest text; a number pads every batch to that length.
        eval_batch_size: examples in an evaluation batch; they are sorted by length.
    """

    kind: Literal["text_classification"] = "text_classification"
    max_length: Annotated[int, Field(ge=2)] = 128
    pad_to: Literal["longest"] | Annotated[int, Field(ge=2)] = "longest"
    eval_batch_size: Annotated[int, Field(ge=1)] = 64

    def prepare(self, model: Model, source: Source) -> Prepared:
        """See ``Task.prepare``: reads the data, tokenises once, keeps the tokens on disk.

        Raises:
            DataError: the data cannot be read.
            ConfigError: the model cannot be read.
        """
        splits = source.load()
        tokenizer = load_tokenizer(model)
        encoded = {
            name: _encode(part, tokenizer, self.max_length)
            for name, part in (("train", splits.train), ("test", splits.test))
        }
        return PreparedText(self, model, tokenizer, splits.train, splits.test, encoded)


class PreparedText(Prepared):
    """Encoded texts, their labels, and the model they are for.

    Args:
        settings: the task.
        model: which model.
        tokenizer: its tokenizer.
        train: the training split, with the columns ``label`` and whatever names natural clients.
        test: the test split.
        encoded: tokens and offsets of each split.
    """

    main_metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self, settings: TextClassification, model: Model, tokenizer: Any, train: Any, test: Any, encoded: dict[str, Any]
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self._model = model
        self._splits = {"train": train, "test": test}
        self._encoded = encoded
        self._labels = {name: np.asarray(part["label"], dtype=np.int64) for name, part in self._splits.items()}
        self._names = list(train.features["label"].names)

    @property
    def labels(self) -> Rows:
        """See ``Prepared.labels``."""
        return self._labels["train"]

    @property
    def label_names(self) -> list[str]:
        """See ``Prepared.label_names``."""
        return self._names

    @property
    def fingerprint(self) -> str:
        """See ``Prepared.fingerprint``."""
        return xxhash.xxh3_128_hexdigest("/".join(fingerprint(self._splits[name]) for name in ("train", "test")))

    def num_examples(self, split: Split) -> int:
        """See ``Prepared.num_examples``."""
        return len(self._labels[split])

    def column(self, name: str, split: Split) -> Rows:
        """See ``Prepared.column``."""
        part = self._splits[split]
        if name not in part.column_names:
            raise DataError(f"the data have no column {name!r}; they have {', '.join(sorted(part.column_names))}")
        return np.asarray(part[name])

    def load_model(self, seed: int, compute: str, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        """See ``Prepared.load_model``.

        Whatever the checkpoint lacks starts at random, so it counts as head even where it sits in the backbone.

        Raises:
            ConfigError: there is no such model.
        """
        with torch.random.fork_rng(devices=[]), quiet_transformers(), _readable(self._model):
            torch.manual_seed(seed)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self._model.resolve(),
                revision=self._model.revision,
                trust_remote_code=self._model.trust_remote_code,
                attn_implementation=self._model.kernel(compute, device),
                dtype=torch.float32,
                output_loading_info=True,
                id2label=dict(enumerate(self._names)),
                label2id={name: number for number, name in enumerate(self._names)},
                ignore_mismatched_sizes=True,
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(device), head_names(model, set(report["missing_keys"]))

    def batch(self, rows: Rows, device: torch.device, split: Split = "train") -> Batch:
        """See ``Prepared.batch``."""
        tokens, offsets = self._encoded[split]["tokens"], self._encoded[split]["offsets"]
        lengths = offsets[rows + 1] - offsets[rows]
        width = int(lengths.max()) if self.settings.pad_to == "longest" else self.settings.pad_to
        mask = np.arange(width) < lengths[:, None]
        places = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        batch = {"input_ids": _scatter(mask, tokens[places], self.tokenizer.pad_token_id)}
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if "types" in self._encoded[split]:
            batch["token_type_ids"] = _scatter(mask, self._encoded[split]["types"][places], 0)
        batch["labels"] = torch.from_numpy(self._labels[split][rows])
        return {name: value.to(device) for name, value in batch.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Prepared.loss``: cross entropy of the logits in float32."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return functional.cross_entropy(model(**inputs).logits.float(), batch["labels"])

    def logits(self, model: nn.Module, rows: Rows, split: Split, device: torch.device) -> Tensor:
        """The logits of examples, ``(rows, classes)`` float32, in the order of ``rows``."""
        offsets = self._encoded[split]["offsets"]
        order = np.argsort(offsets[rows + 1] - offsets[rows], kind="stable")
        result = torch.empty(len(rows), len(self._names))
        for first in range(0, len(rows), self.settings.eval_batch_size):
            chosen = order[first : first + self.settings.eval_batch_size]
            batch = self.batch(rows[chosen], device, split)
            del batch["labels"]
            result[torch.from_numpy(chosen)] = model(**batch).logits.float().cpu()
        return result

    def evaluate(self, model: nn.Module, rows: Rows, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: accuracy, macro F1 and loss."""
        logits = self.logits(model, rows, split, device)
        labels = torch.from_numpy(self._labels[split][rows])
        predicted = logits.argmax(1)
        metrics = {
            "accuracy": float((predicted == labels).float().mean()),
            "macro_f1": float(f1_score(labels.numpy(), predicted.numpy(), average="macro", zero_division=0.0)),
            "loss": float(functional.cross_entropy(logits, labels)),
        }
        if len(torch.unique(predicted)) == 1 and len(torch.unique(labels)) > 1:
            name = self._names[int(predicted[0])]
            return Evaluation(metrics, (f"the model predicts one class only, {name!r}: it has learnt nothing useful",))
        return Evaluation(metrics, ())

    def save_pretrained(self, folder: Path) -> None:
        """See ``Prepared.save_pretrained``."""
        self.tokenizer.save_pretrained(str(folder))


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer, padding on the right, with a padding token even where the model has none.

    Raises:
        ConfigError: there is no such model.
    """
    with quiet_transformers(), _readable(model):
        tokenizer = AutoTokenizer.from_pretrained(
            model.resolve(), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def head_names(model: nn.Module, missing: set[str]) -> frozenset[str]:
    """The parameters of the task head: outside the backbone, or not in the checkpoint.

    Args:
        model: a Hugging Face model with a head.
        missing: names that the checkpoint lacked.
    """
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    return frozenset(
        name for name, _ in model.named_parameters() if name in missing or not name.startswith(backbone)
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps reports and bars of ``transformers`` off the screen, and puts its settings back afterwards."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def _readable(model: Model) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the model {model.path!r} cannot be loaded ({reason}); model.path should be a folder with config.json and "
            "model.safetensors, a hub id that can be reached, or 'embedded'"
        ) from error


def _scatter(mask: np.ndarray[Any, Any], values: np.ndarray[Any, Any], fill: int) -> Tensor:
    result = np.full(mask.shape, fill, dtype=np.int64)
    result[mask] = values
    return torch.from_numpy(result)


def cache_folder() -> Path:
    """Where encoded data are kept: ``$FEDLORA_CACHE``, or ``~/.cache/fedlora``."""
    return Path(os.environ.get("FEDLORA_CACHE") or Path.home() / ".cache" / "fedlora")


def _encode(data: Any, tokenizer: Any, max_length: int) -> dict[str, np.ndarray[Any, Any]]:
    texts = [name for name in ("text", "text_pair") if name in data.column_names]
    settings = json.dumps([tokenizer.__class__.__name__, max_length, texts, transformers.__version__])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = xxhash.xxh3_128_hexdigest("/".join([fingerprint(data.select_columns(texts)), settings, vocabulary]))
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):
        return load_file(path)
    encoded = tokenizer(*(list(data[name]) for name in texts), truncation=True, max_length=max_length)
    lengths = [len(tokens) for tokens in encoded["input_ids"]]
    result = {
        "tokens": np.fromiter((t for tokens in encoded["input_ids"] for t in tokens), np.int32, sum(lengths)),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    if len(texts) == 2 and "token_type_ids" in encoded:
        result["types"] = np.fromiter((t for types in encoded["token_type_ids"] for t in types), np.int8, sum(lengths))
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(result, temporary)
        temporary.replace(path)
    return result

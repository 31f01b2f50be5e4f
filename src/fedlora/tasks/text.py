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
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlora.component import STRICT
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import cpu
from fedlora.tasks.base import Batch, Evaluation, Model, Prepared, Rows, Split, Task
from fedlora.tasks.columns import fingerprint
from fedlora.tasks.sources import Source, read_labelled


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextClassification(Task):
    """One class for a text, or for a pair of texts.

    Args:
        max_length: tokens after which a text is cut.
        pad_to: ``longest`` pads a batch to its longest text; a number pads every batch to that length.
        eval_batch_size: examples in an evaluation batch; they are sorted by length.

    Raises:
        ConfigError: ``pad_to`` is below ``max_length``.
    """

    kind: Literal["text_classification"] = "text_classification"
    max_length: Annotated[int, Field(ge=2)] = 128
    pad_to: Literal["longest"] | Annotated[int, Field(ge=2)] = "longest"
    eval_batch_size: Annotated[int, Field(ge=1)] = 64

    def __post_init__(self) -> None:
        if self.pad_to != "longest" and self.pad_to < self.max_length:
            raise ConfigError(
                f"task.pad_to = {self.pad_to} has no room for texts of up to max_length = {self.max_length} tokens; "
                "make max_length as small, or pad_to as large"
            )

    def prepare(self, model: Model, source: Source) -> Prepared:
        """See ``Task.prepare``: reads the data, tokenises once, keeps the tokens on disk.

        Raises:
            DataError: the data cannot be read, or have one class only.
            ConfigError: the model cannot be read.
        """
        splits = source.load()
        names = list(splits.train.features["label"].names)
        if len(names) < 2:
            raise DataError(f"all rows have the class {names[0]!r}, but there must be two or more to tell apart")
        data: dict[Split, Any] = {"train": splits.train, "test": splits.test}
        return PreparedText(self, model, load_tokenizer(model), names, data)

    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        """See ``Task.restore``."""
        return PreparedText(self, model, load_tokenizer(model), label_names, {})


class PreparedText(Prepared):
    """Encoded texts, their labels, and the model they are for.

    Args:
        settings: the task.
        model: which model.
        tokenizer: its tokenizer.
        names: the classes' names.
        splits: a data set per split, with the columns ``text``, maybe ``text_pair``, ``label``, and any others.
    """

    main_metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self, settings: TextClassification, model: Model, tokenizer: Any, names: list[str], splits: dict[Split, Any]
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self._model = model
        self._names = names
        self._splits = splits
        self._encoded = {name: _encode(part, tokenizer, settings.max_length) for name, part in splits.items()}
        self._labels: dict[Split, Rows] = {
            name: np.asarray(part["label"], dtype=np.int64) for name, part in splits.items()
        }

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
        return xxhash.xxh3_128_hexdigest(
            "/".join(fingerprint(self._splits[name]) for name in ("train", "test")).encode()
        )

    def num_examples(self, split: Split) -> int:
        """See ``Prepared.num_examples``."""
        return len(self._labels[split])

    def table(self) -> Any:
        """See ``Prepared.table``."""
        return self._splits["train"]

    def columns(self, split: Split) -> list[str]:
        """See ``Prepared.columns``."""
        return list(self._splits[split].column_names)

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
                attn_implementation=None if self._model.attention == "auto" else self._model.attention,
                dtype=torch.float32,
                output_loading_info=True,
                id2label=dict(enumerate(self._names)),
                label2id={name: number for number, name in enumerate(self._names)},
                ignore_mismatched_sizes=True,
            )
        if device.type == "cpu":
            cpu.speed_up(model, self._model.attention == "auto")
        # decoders find a text's last token by it
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(device), head_names(model, set(report["missing_keys"]))

    def batch(self, rows: Rows, device: torch.device, split: Split = "train") -> Batch:
        """See ``Prepared.batch``."""
        tokens, offsets = self._encoded[split]["tokens"], self._encoded[split]["offsets"]
        lengths = offsets[rows + 1] - offsets[rows]
        # kernels are made once for each width, so widths are few: multiples of eight
        full = min(-8 * (int(lengths.max()) // -8), self.settings.max_length)
        width = full if self.settings.pad_to == "longest" else self.settings.pad_to
        mask = np.arange(width) < lengths[:, None]
        places = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        batch = {"input_ids": _scatter(mask, tokens[places], self.tokenizer.pad_token_id)}
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if "types" in self._encoded[split]:
            batch["token_type_ids"] = _scatter(mask, self._encoded[split]["types"][places], 0)
        batch["labels"] = torch.from_numpy(self._labels[split][rows])
        return {name: value.to(device) for name, value in batch.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Prepared.loss``: cross entropy of the logits in float32.

        On a CPU the texts go through the model in groups of like length, which spares most of the padding; the loss is
        one mean over all of them, so it is the same but for rounding. A fixed ``pad_to`` is kept.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
        if labels.device.type != "cpu" or self.settings.pad_to != "longest":
            return functional.cross_entropy(model(**inputs).logits.float(), labels)
        lengths, order = inputs["attention_mask"].sum(1).sort(stable=True)
        logits = []
        for first, last in group_lengths(lengths.tolist()):
            chosen, width = order[first:last], int(lengths[last - 1])
            part = {name: value[chosen, :width] for name, value in inputs.items()}
            logits.append(model(**part).logits.float())
        return functional.cross_entropy(torch.cat(logits), labels[order])

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

    def with_test(self, path: Path, text: str | None, label: str | None) -> Prepared:
        """See ``Prepared.with_test``."""
        columns = {"text": text or "text", "label": label or "label"}
        return PreparedText(
            self.settings, self._model, self.tokenizer, self._names, {"test": read_labelled(path, columns, self._names)}
        )

    def predict(self, model: nn.Module, texts: list[str], device: torch.device) -> list[dict[str, float]]:
        """See ``Prepared.predict``: each class's probability, the likeliest first."""
        results = []
        for first in range(0, len(texts), self.settings.eval_batch_size):
            part = texts[first : first + self.settings.eval_batch_size]
            batch = self.tokenizer(
                part, truncation=True, max_length=self.settings.max_length, padding=True, return_tensors="pt"
            )
            # a single text has one type, which is what models take where they are told none
            batch.pop("token_type_ids", None)
            shares = model(**{name: value.to(device) for name, value in batch.items()}).logits.float().softmax(1)
            for row in shares.tolist():
                ranked = sorted(zip(self._names, row, strict=True), key=lambda pair: -pair[1])
                results.append(dict(ranked))
        return results

    def save_pretrained(self, folder: Path) -> None:
        """See ``Prepared.save_pretrained``."""
        _forget_last_call(self.tokenizer)
        # whether the Hub could be reached here is no property of the tokenizer
        self.tokenizer.init_kwargs.pop("local_files_only", None)
        self.tokenizer.save_pretrained(str(folder))


GROUP_COST = 64
"""What a pass through the model costs beside its tokens, in tokens."""


def group_lengths(lengths: list[int]) -> list[tuple[int, int]]:
    """Cuts ascending lengths into groups so that tokens, padding included, and passes cost least.

    Args:
        lengths: tokens of each text, ascending.

    Returns:
        First and last position (exclusive) of each group, in order.

    >>> group_lengths([10, 10, 100, 100])
    [(0, 2), (2, 4)]
    >>> group_lengths([90, 95, 100, 100])
    [(0, 4)]
    """
    best, cut = [0], [0]
    for last in range(1, len(lengths) + 1):
        costs = [best[first] + (last - first) * lengths[last - 1] + GROUP_COST for first in range(last)]
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    groups: list[tuple[int, int]] = []
    last = len(lengths)
    while last:
        groups.append((cut[last], last))
        last = cut[last]
    return groups[::-1]


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
    if tokenizer.pad_token is None:
        raise ConfigError(f"the tokenizer of {model.path!r} has no token to pad with; give it a pad_token")
    return tokenizer


def head_names(model: nn.Module, missing: set[str]) -> frozenset[str]:
    """The parameters of the task head: outside the backbone, or not in the checkpoint.

    Args:
        model: a Hugging Face model with a head.
        missing: names that the checkpoint lacked.
    """
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    return frozenset(name for name, _ in model.named_parameters() if name in missing or not name.startswith(backbone))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps reports and bars of ``transformers`` off the screen, and puts its settings back afterwards."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


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


def _forget_last_call(tokenizer: Any) -> None:
    """A fast tokenizer keeps truncation and padding of its last call, and would save them as its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def _encode(data: Any, tokenizer: Any, max_length: int) -> dict[str, np.ndarray[Any, Any]]:
    texts = [name for name in ("text", "text_pair") if name in data.column_names]
    settings = json.dumps([tokenizer.__class__.__name__, max_length, texts, transformers.__version__])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    _forget_last_call(tokenizer)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [fingerprint(data.select_columns(texts)), settings, vocabulary]
    key = xxhash.xxh3_128_hexdigest("/".join(parts).encode())
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):
        return load_file(path)
    encoded = tokenizer(*(list(data[name]) for name in texts), truncation=True, max_length=max_length)
    lengths = [len(tokens) for tokens in encoded["input_ids"]]
    result: dict[str, np.ndarray[Any, Any]] = {
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

"""Text classification: one class, several classes, or a number for a text or a pair of texts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.core.component import MODEL_CONFIG, Count, Field, dataclass
from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import scores
from fedlora.tasks.base import Batch, Compute, Data, Evaluation, Model, Positions, Prepared, Split
from fedlora.tasks.data.columns import Source, Splits, check_rows, check_texts, fingerprint, split, values_of
from fedlora.tasks.data.labels import given_twice, known_labels, label_table, labelled, seldom
from fedlora.tasks.data.notes import blank
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.data.tokenized import PreparedTokenized, TokenizedTask
from fedlora.tasks.models.encoded import Arrays, Ragged, by_length, cached, chunks
from fedlora.tasks.models.loading import class_settings, config_of, load_pretrained, pooling_of, positions
from fedlora.tasks.models.pooling import Pooling
from fedlora.tasks.models.sentence import save_modules, usage
from fedlora.tasks.models.shares import Shares, shares_of

PROBLEM_TYPES: dict[scores.Problem, str] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""The problems' names in ``transformers``, so that other code interprets an exported model correctly."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class TextClassification(TokenizedTask):
    """A class for a text, or for a pair of texts; or several classes, or a number.

    Columns: ``text``, ``label``, and optionally ``text_pair`` and ``label_name``. A label is a word or whole number;
    with ``multi`` a list of these; with ``regression`` a number.

    Args:
        problem: ``single`` class, ``multi`` (any number of classes), or ``regression``.
        max_length: number of tokens to which texts are truncated.
        pad_to: ``longest`` pads a batch to its longest text; a number pads every batch to that length.
        pooling: the classifier's input: ``model`` uses the family's ``transformers`` class as it is; ``auto`` is
            ``mean`` if that class reads a pooler that adapters leave frozen (BERT) or padding (XLNet), else ``model``;
            ``mean`` is the mean of the attended tokens' last hidden states, ``cls`` that of the first token, both
            without the pooler or dense layer of the family's class (encoders only).
        eval_batch_size: examples per evaluation batch; they are sorted by length.

    Raises:
        ConfigError: ``pad_to`` is below ``max_length``.
    """

    kind: Literal["text_classification"] = "text_classification"
    problem: scores.Problem = "single"
    max_length: Annotated[int, Field(ge=2)] = 128
    pad_to: Literal["longest"] | Annotated[int, Field(ge=2)] = "longest"
    pooling: Literal["auto"] | Pooling = "auto"
    eval_batch_size: Count = 64

    def __post_init__(self) -> None:
        if self.pad_to != "longest" and self.pad_to < self.max_length:
            raise ConfigError(
                f"task.pad_to = {self.pad_to} has no room for texts of up to max_length = {self.max_length} tokens; "
                "make max_length as small, or pad_to as large"
            )

    def read(self, source: Source) -> tuple[Splits, list[str]]:
        raw = source.raw()
        # with pairs in one split only, being a pair would reveal the split, regardless of content
        texts = max((_texts(rows) for rows, _ in raw.sides), key=len)
        for rows, which in raw.sides:
            check_rows(rows, [*texts, "label"], which)
            check_texts(rows, texts, which)
            _check_not_all_blank(rows, which)
        raw, names = labelled(raw, self.problem)
        return split(raw, "text"), names

    def known(self, rows: Any, names: list[str], which: str) -> Any:
        check_rows(rows, [*_texts(rows), "label"], which)
        check_texts(rows, _texts(rows), which)
        return known_labels(rows, self.problem, names, which)

    def over(self, model: Model, tokenizer: Any, names: list[str], data: Data) -> Prepared:
        return PreparedText(self, model, tokenizer, names, data)


class PreparedText(PreparedTokenized):
    """Encoded texts, their labels, and the model they are for.

    Args:
        names: the classes' names; none for a number.
        data: a data set per split, with the columns ``text``, optionally ``text_pair``, ``label``, and any others.
    """

    settings: TextClassification
    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    pairs = True  # without data, both are possible

    def __init__(
        self, settings: TextClassification, model: Model, tokenizer: Any, names: list[str], data: Data
    ) -> None:
        super().__init__(settings, model, tokenizer, names, data)
        self.main_metric, self.higher_is_better = scores.MAIN_METRIC[settings.problem]
        self._pooling: Pooling = pooling_of(model, settings.pooling)
        if self._pooling != "model":
            self.auto_class, self.peft_task, self.backbone_only = "AutoModel", "FEATURE_EXTRACTION", True
        if data:
            self.pairs = any(len(_texts(part)) == 2 for part in data.values())
        self._reads_end = bool(config_of(model).is_encoder_decoder)
        arrays = {name: _encode(part, tokenizer, settings.max_length) for name, part in data.items()}
        self._tokens: dict[Split, Ragged] = {}
        self._types: dict[Split, Ragged | None] = {}
        for name, part in arrays.items():
            self._tokens[name], self._types[name] = _ragged(part)
            self._check_ends(self._tokens[name], name)
        self._labels = {name: label_table(part, settings.problem, len(names)) for name, part in data.items()}

    @property
    def load_arguments(self) -> str:
        found, pad = super().load_arguments, self.tokenizer.pad_token_id
        # as in ``load_model``: without it, decoders refuse a batch
        known = not found or getattr(config_of(self._model), "pad_token_id", None) == pad
        return found if known else f"{found}, pad_token_id={pad}"

    @property
    def labels(self) -> Positions:
        """See ``Prepared.labels``; of several classes the first one."""
        labels = self._labels["train"]
        if self.settings.problem == "single":
            return labels
        return labels.argmax(1) if self.settings.problem == "multi" else np.zeros(len(labels), np.int64)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"text", "text_pair", "label", "label_name"})

    @property
    def notes(self) -> tuple[str, ...]:
        empty = (note for name, rows in self.data.items() for note in blank(values_of(rows, "text"), name, "text"))
        return (*super().notes, *empty, *given_twice(self.data), *seldom(self.data, self.settings.problem, self._names))

    def with_rows(
        self, path: Path, columns: Mapping[str, str], split: Split = "test", reading: Reading | None = None
    ) -> Prepared:
        found = super().with_rows(path, columns, split, reading)
        self._check_pairs(found.pairs, split)
        return found

    def texts(self, split: Split) -> list[str]:
        parts = [values_of(self._data[split], name) for name in _texts(self._data[split])]
        return [" ".join(row) for row in zip(*parts, strict=True)]

    @property
    def sequences(self) -> list[Ragged]:
        return list(self._tokens.values())

    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        settings: dict[str, Any] = {"problem_type": PROBLEM_TYPES[self.settings.problem]}
        settings |= class_settings(self._names) if self._names else {"num_labels": 1}
        longest = self.longest()
        model, head = load_pretrained(
            PreparedText.auto_class,
            self._model,
            seed,
            device,
            settings,
            longest=longest,
            pooling=self._pooling,
            compute=compute,
        )
        # decoders use it to find a text's last token
        model.config.pad_token_id = self.tokenizer.pad_token_id  # type: ignore[union-attr]
        return model, head

    def host_batch(self, rows: Positions, split: Split) -> Batch:
        batch = self._padded(self._tokens[split], self._types.get(split), rows, self.settings.max_length)
        return batch | {"labels": torch.from_numpy(self._labels[split][rows])}

    def _padded(self, tokens: Ragged, types: Ragged | None, rows: Positions, limit: int) -> Batch:
        pad_to = None if self.settings.pad_to == "longest" else self.settings.pad_to
        return self.inputs(tokens, rows, limit, types, pad_to)

    def _check_ends(self, tokens: Ragged, which: str) -> None:
        """Refuses texts with the end token of an encoder-decoder, whose classifier reads the one end of each text."""
        if not self._reads_end:
            return
        counts = np.add.reduceat(tokens.values == self.tokenizer.eos_token_id, tokens.offsets[:-1], dtype=np.int64)
        if len(wrong := np.flatnonzero(counts != counts.min())):
            raise DataError(
                f"row {wrong[0]} of the {which} rows has {self.tokenizer.eos_token!r} in its text, the token by which "
                "the model's classifier finds the end: remove it"
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Prepared.loss``: that of ``scores.loss``.

        On a CPU the texts are processed in groups of similar length; a fixed ``pad_to`` is kept.
        """
        parts = by_length(batch) if self.settings.pad_to == "longest" else [batch]
        logits, labels = [], []
        for part in parts:
            labels.append(part["labels"])
            logits.append(model(**{name: value for name, value in part.items() if name != "labels"}).logits.float())
        return scores.loss(torch.cat(logits), torch.cat(labels), self.settings.problem)

    def shares(self, rows: Positions, device: torch.device) -> Shares:
        ones = np.ones(len(rows), np.int64)
        lengths = self._tokens["train"].lengths(rows) if self.settings.pad_to == "longest" else ones[:0]
        return shares_of(ones, ones, lengths, device)

    def logits(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Tensor:
        """The outputs for examples, ``(rows, outputs)`` float32, in the order of ``rows``."""
        order = np.argsort(self._tokens[split].lengths(rows), kind="stable")
        result = torch.empty(len(rows), max(1, len(self._names)))
        for chosen in chunks(order, self.settings.eval_batch_size):
            batch = self.batch(rows[chosen], device, split)
            del batch["labels"]
            result[torch.from_numpy(chosen)] = model(**batch).logits.float().cpu()
        return result

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        labels = torch.from_numpy(self._labels[split][rows])
        return scores.score(self.logits(model, rows, split, device), labels, self.settings.problem, self._names)

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: each class's probability, the most likely first; or ``{"value": number}``.

        An input is a text or, if the data are pairs, also a pair of texts as JSON: ``["a text", "another"]``.
        """
        given = [_text_or_pair(text) if self.pairs else text for text in inputs]
        longest = min(self.settings.max_length, positions(model) or self.settings.max_length)
        results: list[dict[str, Any]] = [{} for _ in given]
        for kind in (str, tuple):  # of each a batch of its own, as in training
            numbers = np.array([n for n, one in enumerate(given) if isinstance(one, kind)], dtype=np.int64)
            for chosen in chunks(numbers, self.settings.eval_batch_size):
                part = [given[number] for number in chosen]
                texts = [part] if kind is str else [list(side) for side in zip(*part, strict=True)]
                arrays = _tokenised(self.tokenizer, texts, longest)
                tokens, types = _ragged(arrays)
                self._check_ends(tokens, "given")
                batch = self._padded(tokens, types, np.arange(len(part)), longest)
                logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
                for number, said in zip(chosen, scores.said(logits, self.settings.problem, self._names), strict=True):
                    results[number] = said
        return results

    def inputs_of(self, rows: Any, which: str) -> list[str]:
        """See ``Prepared.inputs_of``: texts, or pairs where there is a column ``text_pair``."""
        names = _texts(rows)
        self._check_pairs(len(names) == 2, which)
        check_rows(rows, names, which)
        check_texts(rows, names, which)
        texts = [values_of(rows, name) for name in names]
        return texts[0] if len(names) == 1 else [json.dumps(pair) for pair in zip(*texts, strict=True)]

    def _check_pairs(self, pairs: bool, which: str) -> None:
        if pairs and not self.pairs:
            raise DataError(
                f"the {which} rows have a column 'text_pair', but this run was trained on single texts: remove or "
                "rename the column"
            )

    def save_head(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        if self._pooling != "model":
            weight, bias = weights["classifier.weight"], weights["classifier.bias"]
            save_modules(folder, self._pooling, self.settings.max_length, weight, bias)

    @property
    def usage(self) -> str:
        return "" if self._pooling == "model" else usage(self._pooling, self._names)


def _check_not_all_blank(rows: Any, which: str) -> None:
    if not any(text.strip() for text in values_of(rows, "text")):
        raise DataError(f"column 'text' of all {len(rows)} {which} rows is blank, so nothing can be learnt: correct it")


def _texts(rows: Any) -> list[str]:
    return [name for name in ("text", "text_pair") if name == "text" or name in rows.column_names]


def _text_or_pair(given: str) -> str | tuple[str, str]:
    if given.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(given):
                case [str(first), str(second)]:
                    return first, second
    return given


def _encode(rows: Any, tokenizer: Any, max_length: int) -> Arrays:
    texts = _texts(rows)

    def make() -> Arrays:
        return _tokenised(tokenizer, [list(rows[name]) for name in texts], max_length)

    settings = {"task": "text", "max_length": max_length, "columns": texts, "blank": "padding"}
    return cached(tokenizer, fingerprint(rows.select_columns(texts)), settings, make)


def _tokenised(tokenizer: Any, texts: Sequence[Sequence[Any]], max_length: int) -> Arrays:
    """The tokens of texts, or of pairs of them, and then the types of tokens where there are such."""
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    # a model takes no empty sequence
    tokens = Ragged.of([ids or [tokenizer.pad_token_id] for ids in encoded["input_ids"]])
    arrays: Arrays = {"tokens": tokens.values, "offsets": tokens.offsets}
    if len(texts) == 2 and "token_type_ids" in encoded:
        arrays["types"] = Ragged.of([types or [0] for types in encoded["token_type_ids"]], np.int8).values
    return arrays


def _ragged(arrays: Arrays) -> tuple[Ragged, Ragged | None]:
    tokens = Ragged(arrays["tokens"], arrays["offsets"])
    return tokens, Ragged(arrays["types"], arrays["offsets"]) if "types" in arrays else None

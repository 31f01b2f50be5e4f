"""Rows that are encoded already: a collator makes batches of them, and the model's own loss is trained."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from fedlora.core.component import MODEL_CONFIG, Count, Field, Part, dataclass
from fedlora.core.errors import ConfigError, DataError, TrainingError, first_line
from fedlora.core.handed import HandedField, with_keywords
from fedlora.core.later import transformers
from fedlora.core.state import named_seed
from fedlora.tasks import scores
from fedlora.tasks.base import Batch, Compute, Data, Evaluation, Model, Positions, Prepared, Split, Task
from fedlora.tasks.collated.code import handed_code
from fedlora.tasks.collated.models import Family, family_of
from fedlora.tasks.data.columns import Source, check_rows, rename, split, values_of
from fedlora.tasks.data.files import read_rows
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.models.encoded import chunks
from fedlora.tasks.models.loading import load_pretrained, save_tokenizer

IGNORED = -100
"""The label of a token that no loss reads, as in ``transformers``."""
CODE = ("collator", "loss_function", "metrics", "preprocess_logits")
"""The settings that are functions."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Collated(Task):
    """Rows that are encoded for the model already, as a ``Trainer`` of ``transformers`` takes them.

    The model is one that was passed from Python and has a loss; its head keeps the values that it has. Functions are
    recorded by a fingerprint of their source.

    Args:
        collator: makes a batch, a mapping of tensors, of a list of rows, such as ``DataCollatorWithPadding``.
        columns: the columns that it gets; all of them if absent.
        labels: the names of the labels in a batch.
        loss_function: computes the mean loss, called as a ``Trainer`` calls its ``compute_loss_func``; the model's own
            loss if absent.
        label_smoothing: the share of the label that is spread over all classes, as in ``Trainer``; needs no
            ``loss_function``.
        metrics: computes metrics by name from a ``transformers.EvalPrediction``; only the loss if absent.
        preprocess_logits: changes the logits of a batch before they are kept for ``metrics``.
        main_metric: the metric shown in tables.
        higher_is_better: whether a higher one is better.
        eval_batch_size: examples per evaluation batch.

    Raises:
        ConfigError: a function cannot be called, or a main metric is named that nothing computes.
    """

    kind: Literal["collated"] = "collated"
    collator: HandedField
    columns: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    labels: Annotated[tuple[str, ...], Field(min_length=1)] = ("labels",)
    loss_function: HandedField | None = None
    label_smoothing: Part = 0.0
    metrics: HandedField | None = None
    preprocess_logits: HandedField | None = None
    main_metric: str = "loss"
    higher_is_better: bool = False
    eval_batch_size: Count = 8

    @model_validator(mode="before")
    @classmethod
    def _converted(cls, given: Any) -> Any:
        return with_keywords(given, _converted)

    def __post_init__(self) -> None:
        if self.main_metric != "loss" and self.metrics is None:
            raise ConfigError(
                f"task.main_metric = {self.main_metric!r} is computed by no function: pass metrics, or leave it out"
            )
        if self.label_smoothing and self.loss_function is not None:
            raise ConfigError(
                f"task.label_smoothing = {self.label_smoothing:g} changes the model's own loss, but loss_function "
                "replaces it: give one of the two"
            )

    def prepare(self, model: Model, source: Source) -> Prepared:
        family, raw = _family(model), source.raw()
        for rows, which in raw.sides:
            check_rows(rows, self.columns or (), which)
        names = self.columns or tuple(raw.train.column_names)
        splits = split(raw, family.content if family.content in names else names[0])
        return PreparedCollated(self, model, family.classes, {"train": splits.train, "test": splits.test})

    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        return PreparedCollated(self, model, label_names, {})


class PreparedCollated(Prepared):
    """Encoded rows, and the model they are for.

    Args:
        settings: the task.
        model: the model.
        names: the classes' names, if each example has a class.
        data: a data set per split.
    """

    def __init__(self, settings: Collated, model: Model, names: Sequence[str], data: Data) -> None:
        super().__init__(model, names, data)
        self.settings, self._family = settings, _family(model)
        self.main_metric, self.higher_is_better = settings.main_metric, settings.higher_is_better
        self.auto_class, self.peft_task = self._family.auto_class, self._family.peft_task
        self._encoded = {
            name: rows.select_columns(list(settings.columns)) if settings.columns else rows
            for name, rows in data.items()
        }
        for name, rows in self._encoded.items():
            self._collated([rows[0], rows[len(rows) - 1]], f"the {name} rows")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(self.settings.columns or super().reads)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        tokenizer = self._model.tokenizer
        return super().fingerprints | ({"tokenizer": tokenizer.fingerprint} if tokenizer else {})

    @functools.cached_property
    def labels(self) -> Positions:
        """See ``Prepared.labels``: those of the first column of labels that holds a class for each row."""
        rows = self._data["train"]
        for name in (*self.settings.labels, "label", "labels", "label_ids") if self._names else ():
            if name in rows.column_names:
                return np.asarray(values_of(rows, name), dtype=np.int64)
        return super().labels

    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        return load_pretrained(
            self.auto_class, self._model, seed, device, fresh_head=self._family.fresh_head, compute=compute
        )

    def batch(self, rows: Positions, device: torch.device, split: Split = "train") -> Batch:
        chosen = self._encoded[split].__getitems__(rows.tolist())
        return {name: value.to(device) for name, value in self._collated(chosen, f"the {split} rows").items()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._losses(model, batch)[0]

    def num_terms(self, batch: Batch) -> int:
        """See ``Prepared.num_terms``: the labels that are not masked, or the rows if there are no such labels."""
        count = self._count(batch)
        return super().num_terms(batch) if count is None else int(count)

    @property
    def _shifts(self) -> bool:
        """Whether outputs are compared with the next label."""
        return self.auto_class == "AutoModelForCausalLM"

    def _count(self, batch: Batch) -> Tensor | None:
        """The number of labels that are not masked; None without labels that can be."""
        labels = batch.get("labels")
        read = labels[..., 1:] if labels is not None and self._shifts else labels
        return None if read is None or read.is_floating_point() else read.ne(IGNORED).sum()

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """The mean loss of a batch, computed as ``Trainer.compute_loss`` does, and the model's outputs."""
        settings, labels = self.settings, batch.get("labels")
        count = self._count(batch)
        if count is not None and not int(count):
            raise TrainingError(
                f"every label of a batch is {IGNORED}, so nothing can be learnt of it: correct the data"
            )
        if settings.loss_function is None and not settings.label_smoothing:
            outputs = model(**batch)
            if outputs.get("loss") is None:
                raise ConfigError(
                    f"{type(model).__name__} gave no loss for batches with {', '.join(batch)}: give the rows labels "
                    f"under a name that it reads, or task.loss_function"
                )
            return outputs["loss"].float(), outputs
        if labels is None:
            raise DataError(
                f"a batch has {', '.join(batch)}, but task.loss_function and label_smoothing read 'labels': give "
                "the rows labels, or leave both out"
            )
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        if settings.loss_function is None:
            smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=settings.label_smoothing)
            return smoother(outputs, labels, shift_labels=self._shifts).float(), outputs
        own = settings.loss_function.here("task.loss_function")
        return own(outputs, labels, num_items_in_batch=count).float(), outputs

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        settings, total, kept = self.settings, 0.0, None
        computes = settings.metrics and settings.metrics.here("task.metrics")
        # a collator may draw, such as which tokens are masked
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(named_seed(0, "evaluate"))
            for chosen in chunks(rows, settings.eval_batch_size):
                batch = self.batch(chosen, device, split)
                loss, outputs = self._losses(model, batch)
                total += float(loss) * len(chosen)
                if computes:
                    kept = self._kept(kept, model, batch, outputs)
        return Evaluation({"loss": total / len(rows)} | (self._scored(computes, kept) if computes else {}), ())

    def _kept(self, before: Any, model: nn.Module, batch: Batch, outputs: Any) -> Any:
        """The predictions and labels so far and those of a batch, each padded to the longest, on the CPU."""
        utils: Any = transformers.trainer_pt_utils
        ignored = {"loss", *getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"])}
        logits = _alone([value for name, value in outputs.items() if name not in ignored])
        labels = _alone([batch[name] for name in self.settings.labels if name in batch])
        if self.settings.preprocess_logits is not None:
            logits = self.settings.preprocess_logits.here("task.preprocess_logits")(logits, labels)
        pair = utils.nested_numpify((logits, labels))
        return pair if before is None else utils.nested_concat(before, pair, padding_index=IGNORED)

    def _scored(self, computes: Any, kept: Any) -> dict[str, float]:
        predictions, labels = kept
        found = computes(transformers.EvalPrediction(predictions=predictions, label_ids=labels))
        try:
            metrics = {str(name).removeprefix("eval_"): float(value) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"task.metrics gave {str(found)[:80]!r}, but a mapping of names to numbers was expected: return one"
            ) from error
        if self.main_metric not in ("loss", *metrics):
            raise ConfigError(
                f"task.main_metric = {self.main_metric!r} is not among the metrics that task.metrics gives: "
                f"{', '.join(metrics)}; name one of these, or loss"
            )
        return metrics

    def with_rows(
        self, path: Path, columns: Mapping[str, str], split: Split = "test", reading: Reading | None = None
    ) -> Prepared:
        rows = rename(read_rows(str(path), reading or Reading(), split), columns, str(path))
        check_rows(rows, self.settings.columns or (), str(path))
        return PreparedCollated(self.settings, self._model, self._names, {split: rows})

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: each class's probability, the most likely first; or ``{"logits": [...]}``.

        An input is a row as a JSON object, such as ``{"input_ids": [2, 7, 3]}``, or a text for the tokenizer.
        """
        results: list[dict[str, Any]] = []
        for given in inputs:
            batch = self._collated([self._row(given)], f"the input {given[:40]!r}")
            batch = {name: value.to(device) for name, value in batch.items() if name not in self.settings.labels}
            logits = model(**batch).logits.float()
            results += scores.said(logits, "single", self._names) if self._names else [{"logits": logits[0].tolist()}]
        return results

    def inputs_of(self, rows: Any, which: str) -> list[str]:
        """See ``Prepared.inputs_of``: each row as a JSON object."""
        wanted = [name for name in self.settings.columns or rows.column_names if name in rows.column_names]
        return [json.dumps({name: row[name] for name in wanted}) for row in rows.select_columns(wanted)]

    def save_pretrained(self, folder: Path) -> None:
        own = self._model.tokenizer.here("model.tokenizer") if self._model.tokenizer else None
        if isinstance(own, transformers.PreTrainedTokenizerBase):
            save_tokenizer(copy.deepcopy(own), folder)
        elif own is not None:
            own.save_pretrained(folder)

    def _row(self, given: str) -> dict[str, Any]:
        try:
            row = json.loads(given)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            return row
        tokenizer = self._model.tokenizer.here("model.tokenizer") if self._model.tokenizer else None
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise DataError(f"the input {given[:40]!r} is no row: give a JSON object with the collator's columns")
        return dict(copy.deepcopy(tokenizer)(given, truncation=True))

    def _collated(self, rows: list[dict[str, Any]], which: str) -> Batch:
        """The collator's batch of some rows.

        Raises:
            DataError: the collator fails, or gives anything but tensors.
        """
        collator = self.settings.collator.here("task.collator")
        try:
            batch = dict(collator([dict(row) for row in rows]))
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
            raise DataError(
                f"task.collator makes no batch of {which} ({first_line(error)}): pass rows that are encoded as it "
                "reads them, and name their columns in task.columns"
            ) from error
        if wrong := [name for name, value in batch.items() if not isinstance(value, Tensor)]:
            raise DataError(
                f"{wrong[0]!r} of a batch of {which} is of type {type(batch[wrong[0]]).__name__}, but a model reads "
                "tensors: leave the column out of task.columns, or let the collator convert it"
            )
        return batch


def _converted(values: dict[str, Any]) -> dict[str, Any]:
    found = {name: handed_code(values[name], f"task.{name}") for name in CODE if values.get(name) is not None}
    return values | found


def _family(model: Model) -> Family:
    if model.object is None:
        raise ConfigError(
            "task.kind = 'collated' reads rows that are encoded for a model in memory: give model.object, as "
            "fedlora.from_trainer does"
        )
    return family_of(model.object.here("model.object"))


def _alone(values: Sequence[Any]) -> Any:
    """The one value that there is; several as a tuple, and None without any."""
    return tuple(values) if len(values) > 1 else next(iter(values), None)

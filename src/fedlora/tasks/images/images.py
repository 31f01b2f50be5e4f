"""Image classification: one class or several classes for an image."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.component import MODEL_CONFIG, Count, Field, dataclass
from fedlora.core.errors import ConfigError, first_line
from fedlora.tasks import scores
from fedlora.tasks.base import Batch, Compute, Data, Evaluation, Model, Positions, Prepared, Split, Task
from fedlora.tasks.data.columns import Source, check_rows, check_texts, rename, split, values_of
from fedlora.tasks.data.files import is_saved, read_rows
from fedlora.tasks.data.folders import read_folder
from fedlora.tasks.data.labels import given_twice, known_labels, label_table, labelled, seldom
from fedlora.tasks.data.opening import Reading
from fedlora.tasks.images.pixels import Pixels, Processor, decode, encode_pictures, load_processor, read_picture
from fedlora.tasks.models.encoded import chunks
from fedlora.tasks.models.loading import class_settings, config_of, load_pretrained
from fedlora.tasks.models.objects import fingerprint_of_tokenizer
from fedlora.tasks.models.shares import Shares, equal_shares
from fedlora.tasks.models.staged import sent

Augmentation = Literal["none", "flip", "crop_flip"]
"""The random augmentation of each training image: none, a horizontal flip, or a flip and a crop."""

_PLACE = "fedlora: place"


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class ImageClassification(Task):
    """Assigns one class, or several classes, to an image.

    Columns: ``image`` (a picture file's bytes, its path, or both as ``datasets`` has them), ``label``, and where it is
    there ``label_name``. A label is a word or whole number; with ``multi`` a list of these.

    Args:
        problem: ``single`` class, or ``multi`` (any number of classes).
        size: height of the model's input images, to reduce work; None for the image processor's. The processor's other
            sizes change in proportion.
        augmentation: random augmentation of each training image, see ``augment``.
        eval_batch_size: examples per evaluation batch.
    """

    kind: Literal["image_classification"] = "image_classification"
    problem: Literal["single", "multi"] = "single"
    size: Annotated[int, Field(ge=8)] | None = None
    augmentation: Augmentation = "none"
    eval_batch_size: Count = 64

    def prepare(self, model: Model, source: Source) -> Prepared:
        processor = load_processor(model, self.size)
        raw = source.raw()
        for rows, which in raw.sides:
            check_rows(rows, ["image", "label"], which)
        raw, names = labelled(raw, self.problem)
        train, pixels = _encode(raw.train, processor, "training")
        test, test_pixels = (None, pixels) if raw.test is None else _encode(raw.test, processor, "test")
        # held out by the digests, so equal pictures fall on one side
        sides = split(raw._replace(train=train, test=test), "image")
        placed: dict[Split, tuple[Any, Pictures]] = {
            "train": _placed(sides.train, pixels),
            "test": _placed(sides.test, test_pixels),
        }
        data, pictures = ({name: pair[part] for name, pair in placed.items()} for part in (0, 1))
        return PreparedImages(self, model, processor, names, data, pictures)

    def restore(self, model: Model, label_names: list[str]) -> Prepared:
        return PreparedImages(self, model, load_processor(model, self.size), label_names, {}, {})


class Pictures(NamedTuple):
    """The pictures of a split.

    Args:
        pixels: ``(pictures, height, width, 3)`` uint8, maybe mapped from disk.
        places: ``(examples,)`` int64, which of them each example is.
    """

    pixels: Pixels
    places: NDArray[np.int64]


class PreparedImages(Prepared):
    """Resized pictures, their labels, and the model they are for.

    Args:
        settings: the task.
        model: which model.
        processor: its image processor.
        names: the classes' names.
        data: a data set per split, with the columns ``image`` (a digest of the file), ``label``, and any others.
        pictures: the pictures of each split.
    """

    auto_class = "AutoModelForImageClassification"
    peft_task = None

    def __init__(
        self,
        settings: ImageClassification,
        model: Model,
        processor: Processor,
        names: list[str],
        data: Data,
        pictures: Mapping[Split, Pictures],
    ) -> None:
        super().__init__(model, names, data)
        self.settings = settings
        self.processor = processor
        self.main_metric, self.higher_is_better = scores.MAIN_METRIC[settings.problem]
        self._pictures = dict(pictures)
        self._labels = {name: label_table(part, settings.problem, len(names)) for name, part in data.items()}

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        return {**super().fingerprints, "processor": fingerprint_of_tokenizer(self.processor.own)}

    @property
    def labels(self) -> Positions:
        """See ``Prepared.labels``; of several classes the first one."""
        labels = self._labels["train"]
        return labels if self.settings.problem == "single" else labels.argmax(1)

    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        model, head = load_pretrained(self.auto_class, self._model, seed, device, class_settings(self._names))
        _interpolate_positions(model, self.processor.size, device)
        return model, head

    @property
    def usage(self) -> str:
        size = self.processor.size
        if _fits(config_of(self._model), size):
            return ""
        return (
            f"\nIts pictures have {size[0]} x {size[1]} pixels, and those of the base model another size. If the "
            "model's `forward` takes\n`interpolate_pos_encoding`, as a ViT's, pass `interpolate_pos_encoding=True` in "
            "each call.\n"
        )

    def batch(self, rows: Positions, device: torch.device, split: Split = "train") -> Batch:
        """See ``Prepared.batch``: ``pixel_values`` ``(rows, 3, height, width)`` float32 and ``labels``."""
        pixels, places = self._pictures[split]
        chosen = sent(torch.from_numpy(np.asarray(pixels[places[rows]])), device)
        labels = sent(torch.from_numpy(self._labels[split][rows]), device)
        return {"pixel_values": self.processor.normalise(chosen), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Prepared.loss``: that of ``scores.loss``, over augmented pictures where gradients are computed."""
        pixels = batch["pixel_values"]
        # a client may train with the model's dropout off, so ``model.training`` is not reliable
        if torch.is_grad_enabled():
            pixels = augment(pixels, self.settings.augmentation)
        return scores.loss(model(pixel_values=pixels).logits, batch["labels"], self.settings.problem)

    def shares(self, rows: Positions, device: torch.device) -> Shares | None:
        """See ``Prepared.shares``; None with augmentation, whose draws make no two passes equal."""
        return equal_shares(len(rows)) if self.settings.augmentation == "none" else None

    def logits(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Tensor:
        """The outputs for examples, ``(rows, classes)`` float32, in the order of ``rows``."""
        parts = (self.batch(part, device, split) for part in chunks(rows, self.settings.eval_batch_size))
        return torch.cat([model(pixel_values=part["pixel_values"]).logits.float().cpu() for part in parts])

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: the metrics of ``scores.score``, pictures as they are."""
        labels = torch.from_numpy(self._labels[split][rows])
        return scores.score(self.logits(model, rows, split, device), labels, self.settings.problem, self._names)

    def with_rows(
        self, path: Path, columns: Mapping[str, str], split: Split = "test", reading: Reading | None = None
    ) -> Prepared:
        """See ``Prepared.with_rows``; ``path`` may also be a folder of classes."""
        path = path.expanduser()
        of_classes = path.is_dir() and not is_saved(path)
        rows = read_folder(path, self._names) if of_classes else read_rows(str(path), reading or Reading(), split)
        rows = rename(rows, columns, str(path))
        check_rows(rows, ["image", "label"], str(path))
        rows = known_labels(rows, self.settings.problem, self._names, str(path))
        data, pictures = _placed(*_encode(rows, self.processor, str(path)))
        return PreparedImages(self.settings, self._model, self.processor, self._names, {split: data}, {split: pictures})

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: paths of pictures; each class's probability, the likeliest first."""
        results: list[dict[str, Any]] = []
        for chosen in chunks(np.arange(len(inputs)), self.settings.eval_batch_size):
            paths = [inputs[number] for number in chosen]
            pixels = [self.processor.resize(decode(read_picture(path, f"'{path}'"), f"'{path}'")) for path in paths]
            batch = self.processor.normalise(torch.from_numpy(np.stack(pixels)).to(device))
            results += scores.said(model(pixel_values=batch).logits, self.settings.problem, self._names)
        return results

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"image", "label", "label_name"})

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, *given_twice(self.data), *seldom(self.data, self.settings.problem, self._names))

    def contents(self, split: Split) -> list[str]:
        return [str(digest) for digest in values_of(self.data[split], "image")]

    def inputs_of(self, rows: Any, which: str) -> list[str]:
        """See ``Prepared.inputs_of``: the column ``image`` with the paths of pictures."""
        check_rows(rows, ["image"], which)
        check_texts(rows, ["image"], which)
        return [str(path) for path in values_of(rows, "image")]

    def save_pretrained(self, folder: Path) -> None:
        """See ``Prepared.save_pretrained``: the image processor, with the size that the task has."""
        self.processor.own.save_pretrained(str(folder))


def augment(pixels: Tensor, how: Augmentation) -> Tensor:
    """Random changes to normalised pictures, drawn from PyTorch's default generator.

    ``flip``: mirrored left to right with probability 1/2. ``crop_flip``: also moved by up to an eighth of the height
    and width, each distance alike, the gap filled with zeros, which is about the mean colour.

    Args:
        pixels: ``(pictures, 3, height, width)``.
        how: which of these.
    """
    if how == "none":
        return pixels
    count, _, height, width = pixels.shape
    pads = (height // 8, width // 8) if how == "crop_flip" else (0, 0)
    top, left = (torch.randint(0, 2 * pad + 1, (count, 1)) for pad in pads)
    mirrored = torch.rand(count, 1) < 0.5
    across = torch.arange(width)
    columns = left + torch.where(mirrored, across.flip(0), across)
    lines = top + torch.arange(height)
    padded = functional.pad(pixels, (pads[1], pads[1], pads[0], pads[0])).permute(0, 2, 3, 1)
    chosen = (torch.arange(count)[:, None, None], lines[:, :, None], columns[:, None, :])
    return padded[tuple(sent(index, pixels.device) for index in chosen)].permute(0, 3, 1, 2)


def _encode(rows: Any, processor: Processor, which: str) -> tuple[Any, Pixels]:
    """Rows with digests for pictures and the column ``_PLACE``, and the pixels of all of them."""
    digests, pixels = encode_pictures(rows, processor, which)
    rows = rows.remove_columns("image").add_column("image", digests)
    return rows.add_column(_PLACE, list(range(len(digests)))), pixels


def _placed(rows: Any, pixels: Pixels) -> tuple[Any, Pictures]:
    places = np.asarray(values_of(rows, _PLACE), dtype=np.int64)
    return rows.remove_columns(_PLACE), Pictures(pixels, places)


def _interpolate_positions(model: nn.Module, size: tuple[int, int], device: torch.device) -> None:
    """Has position encodings interpolated where pictures are not of the size that the model was made for.

    Raises:
        ConfigError: the model takes no pictures of this size.
    """
    if _fits(model.config, size):
        return
    for module in model.modules():
        known = getattr(module, "interpolate_pos_encoding", None) is not None
        if known and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(_interpolate, with_kwargs=True)
    try:
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, 3, *size, device=device))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the model does not accept images of {size[0]} x {size[1]} ({first_line(error)}): leave task.size "
            "out, or choose one that the model accepts"
        ) from error


def _fits(config: Any, size: tuple[int, int]) -> bool:
    """Whether a model was made for pictures of this size, or does not say for which."""
    return tuple(np.broadcast_to(getattr(config, "image_size", size), 2)) == size


def _interpolate(module: nn.Module, args: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, settings | {"interpolate_pos_encoding": True}

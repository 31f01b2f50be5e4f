"""Images as integers: decoded once, resized as by the model's image processor, cached on disk."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.errors import ConfigError, DataError, first_line
from fedlora.core.files import new_file
from fedlora.core.later import transformers
from fedlora.tasks.base import Model
from fedlora.tasks.models.encoded import cache_folder, made_anew
from fedlora.tasks.models.loading import quiet_transformers, readable
from fedlora.tasks.models.objects import processor_folder
from fedlora.tasks.models.staged import sent

if TYPE_CHECKING:
    import datasets
    from PIL import Image

Pixels = NDArray[np.uint8]

_PROBES = ((512, 512), (512, 384))
_READ_AT_ONCE = 64

MOST_PIXELS = 89_478_485
"""The most pixels of a picture that is decoded: what Pillow warns of, a quarter of a gigabyte in RGB."""


class Processor(NamedTuple):
    """A model's image processor in two steps: resizing to whole numbers, and ``scale * x + shift`` per channel.

    Args:
        own: the image processor of ``transformers``.
        size: height and width of what it gives.
        scale: ``(3,)`` float32.
        shift: ``(3,)`` float32.
    """

    own: Any
    size: tuple[int, int]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]

    def resize(self, picture: Image.Image) -> Pixels:
        """An RGB picture as ``(height, width, 3)`` uint8, cut and resized as the processor does."""
        return _whole_numbers(self.own, picture)

    def normalise(self, pixels: Tensor) -> Tensor:
        """``(pictures, height, width, 3)`` uint8 as ``(pictures, 3, height, width)`` float32.

        The memory keeps its order, channels last, in which convolutions on a CPU are faster.
        """
        scale, shift = (
            sent(torch.from_numpy(value), pixels.device)[:, None, None] for value in (self.scale, self.shift)
        )
        return pixels.permute(0, 3, 1, 2).float() * scale + shift


def load_processor(model: Model, size: int | None) -> Processor:
    """The model's own image processor, in its form without torchvision, which gives the same bits everywhere.

    Args:
        model: which model.
        size: height of the pictures it is to give, everything else in proportion; its own height where None.

    Raises:
        ConfigError: there is none, or it is not of the form that is needed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError("images are read with Pillow, which is not installed: pip install 'fedlora[images]'")
    own = _load(model, {})
    height, width = _size_of(own, model)
    if size is not None and size != height:
        factor = size / height
        own = _load(model, _resized(own, factor))
        if _size_of(own, model) != (size, round(width * factor)):
            raise ConfigError(
                f"the image processor of {model.path!r} cannot be set to give images of height {size}: leave "
                f"task.size out, which gives {height}"
            )
        height, width = size, round(width * factor)
    scale, shift = _normalisation(own, model)
    return Processor(own, (height, width), scale, shift)


def decode(raw: bytes, which: str) -> Image.Image:
    """A picture file's content in RGB, turned upright; transparent parts white, of an animation the first picture.

    Args:
        raw: the file's bytes.
        which: what it is, for messages.

    Raises:
        DataError: it is no picture, has more than ``MOST_PIXELS``, or numbers of unknown range.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(raw))
        with picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise Image.DecompressionBombError
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{which} has more than {MOST_PIXELS:,} pixels, which is the most that is decoded: make it smaller or "
            "remove it"
        ) from error
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if unknown else first_line(error)
        raise DataError(f"{which} cannot be read as an image ({reason}): correct or remove it") from error
    if upright.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode in ("I", "F"):
        raise DataError(
            f"{which} has 32-bit pixels, whose range of values is not defined: save it with 8 or 16 bits a channel"
        )
    if "A" in upright.getbands() or "transparency" in upright.info:
        clear = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return upright.convert("RGB")


def read_picture(path: str, which: str) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise DataError(f"{which} is no plain file, but an image was to be read from it: name a file")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{which} cannot be read ({error.strerror or error}): correct the path") from error


def encode_pictures(rows: datasets.Dataset, processor: Processor, which: str) -> tuple[list[str], Pixels]:
    """A digest of each picture file, and all of them resized, mapped from disk where the cache can be written.

    Args:
        rows: with the column ``image``: bytes, paths, or both as ``datasets`` has them.
        processor: resizes.
        which: what the rows are, for messages.

    Returns:
        ``rows`` texts, and ``(rows, height, width, 3)`` uint8.

    Raises:
        DataError: a row's picture cannot be read, named by its number.
    """
    import PIL

    digests = [xxhash.xxh3_128_hexdigest(raw) for _, raw in _raw(rows, which)]
    settings = json.dumps(processor.own.to_dict(), sort_keys=True, default=str)
    versions = [transformers.__version__, PIL.__version__]
    key = xxhash.xxh3_128_hexdigest("/".join([*digests, settings, *versions]).encode())
    shape = (len(digests), *processor.size, 3)

    def make() -> Iterator[Pixels]:
        return (processor.resize(decode(raw, name)) for name, raw in _raw(rows, which))

    return digests, _cached(cache_folder() / "pictures" / f"{key}.npy", shape, make)


def _cached(path: Path, shape: tuple[int, ...], make: Callable[[], Iterator[Pixels]]) -> Pixels:
    """The pictures in a file, made first where it is not there; in memory where it cannot be written."""
    try:
        return _mapped(path, shape)
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        made_anew(path)
    try:
        # written, not mapped: on a full disk a write fails, while a mapped page ends the process
        with new_file(path) as temporary, temporary.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            digest = xxhash.xxh3_64()
            for picture in make():
                file.write(picture.tobytes())
                digest.update(picture.tobytes())
            file.write(digest.digest())
        return _mapped(path, shape)
    except OSError:
        return np.stack(list(make()))


def _mapped(path: Path, shape: tuple[int, ...]) -> Pixels:
    found: Pixels = np.lib.format.open_memmap(path, mode="r")
    if found.shape != shape or found.dtype != np.uint8:
        raise ValueError(f"{path} holds something else")
    with path.open("rb") as file:
        file.seek(found.offset + found.size)  # type: ignore[attr-defined]
        held = file.read()
    digest = xxhash.xxh3_64()
    for picture in found:
        digest.update(picture.data)
    # files of older versions end without a digest
    if held not in (b"", digest.digest()):
        raise ValueError(f"{path} differs from what was written")
    return found


def _raw(rows: datasets.Dataset, which: str) -> Iterator[tuple[str, bytes]]:
    """The bytes of each row's picture, and what to call it."""
    # nothing is decoded, and a few rows at a time are in memory
    table = rows.select_columns(["image"]).with_format("arrow")
    for first in range(0, len(rows), _READ_AT_ONCE):
        for number, value in enumerate(table[first : first + _READ_AT_ONCE].column("image").to_pylist(), first):
            if not isinstance(value, dict):
                value = {"path": value} if isinstance(value, str) else {"bytes": value}
            raw, path = value.get("bytes"), value.get("path")
            name = f"row {number} of the {which} rows" + (f" ('{path}')" if path else "")
            if isinstance(raw, bytes):
                yield name, raw
            elif isinstance(path, str):
                yield name, read_picture(path, name)
            else:
                raise DataError(
                    f"{name} holds no image, which needs the bytes or the path of a file: correct or remove it"
                )


def _load(model: Model, settings: dict[str, Any]) -> Any:
    place = processor_folder(model) if model.object else contextlib.nullcontext(model.resolve())
    with place as folder, quiet_transformers(), readable(model):
        return transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            backend="pil",
            **settings,
        )


def _resized(own: Any, factor: float) -> dict[str, Any]:
    """The processor's settings for pictures that are ``factor`` as large."""
    settings = own.to_dict()
    found: dict[str, Any] = {}
    for name in ("size", "crop_size"):
        if settings.get(name):
            found[name] = {key: round(value * factor) for key, value in dict(settings[name]).items() if value}
    return found


def _size_of(own: Any, model: Model) -> tuple[int, int]:
    from PIL import Image

    sizes = {_whole_numbers(own, Image.new("RGB", size)).shape for size in _PROBES}
    if len(sizes) > 1:
        raise ConfigError(
            f"the image processor of {model.path!r} keeps the proportions of images, but those of a batch need "
            "one size: set do_center_crop and crop_size in its preprocessor_config.json"
        )
    height, width, _ = sizes.pop()
    return height, width


def _whole_numbers(own: Any, picture: Image.Image) -> Pixels:
    steps = {"do_rescale": False, "do_normalize": False}
    if "include_top" in own.to_dict():  # EfficientNet normalises a second time by this name
        steps["include_top"] = False
    result: Pixels = own(images=picture, return_tensors="np", **steps)["pixel_values"][0]
    if result.dtype != np.uint8 or result.ndim != 3 or len(result) != 3:
        raise ConfigError(
            f"{type(own).__name__} gives {result.dtype} of shape {result.shape} where images of three channels "
            "and 8 bits were expected: use a model with another image processor"
        )
    return np.ascontiguousarray(result.transpose(1, 2, 0))


def _normalisation(own: Any, model: Model) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``scale`` and ``shift`` as the processor's own answers to pictures of one grey show them."""
    from PIL import Image

    def answer(grey: int) -> NDArray[np.float32]:
        found = own(images=Image.new("RGB", _PROBES[0], (grey, grey, grey)), return_tensors="np")["pixel_values"][0]
        middle: NDArray[np.float32] = np.asarray(found[:, found.shape[1] // 2, found.shape[2] // 2], np.float64)
        return middle

    black, grey, white = answer(0), answer(51), answer(255)
    scale = (white - black) / 255
    if not np.allclose(black + 51 * scale, grey, atol=1e-4 * float(np.abs(white - black).max())):
        raise ConfigError(
            f"the image processor of {model.path!r} does not scale and shift the channels of images, as was "
            "expected: use a model with another image processor"
        )
    return scale.astype(np.float32), black.astype(np.float32)

"""Names what is wrong with the files of a local model that ``transformers`` could not read."""

from __future__ import annotations

import contextlib
import json
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedlora.core.digests import DIGESTS, damaged
from fedlora.core.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.tasks.base import Model

_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHERS = ("config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which ``transformers`` looks for them."""
_MOST_OPERATIONS = 1000
_LONGEST_HEADER = 100_000_000
"""The most bytes that ``safetensors`` accepts for a header."""


def damage(folder: Path, error: Exception) -> str | None:
    """What is wrong with the first file of a model that cannot be read, and the remedy; None if nothing is found.

    Args:
        folder: the model's folder.
        error: what was raised when it was read.
    """
    for file in (*(folder / name for name in _OTHERS), *weight_files(folder)):
        fault = _fault(file, error)
        if fault:
            return f"{file} {fault}"
    return None


def no_model(folder: Path) -> str | None:
    """Why a local folder holds no model but an adapter, and the remedy; None if it does not."""
    try:
        if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
            return None
        base = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return (
        f"{folder} holds an adapter, not a whole model: set model.path to the model that it was trained on"
        f"{f' ({base})' if base else ''}, and init_from to this folder to start from the adapter"
    )


def check_digests(folder: Path) -> None:
    """Refuses a model that fedlora exported and of which a file is not the one that was written.

    Raises:
        ConfigError: naming the file.
    """
    if wrong := damaged(folder):
        raise ConfigError(
            f"{folder / wrong} is missing or differs from what was written: export the model again, or remove "
            f"{folder / DIGESTS} if you changed it on purpose"
        )


def check_finite(loaded: nn.Module, fresh: Collection[str], model: Model) -> None:
    """Refuses pre-trained weights that are NaN or infinite; one pass over the weights, without a copy.

    Args:
        loaded: the model.
        fresh: parameters that the checkpoint lacked.
        model: where it was loaded from.

    Raises:
        ConfigError: naming the first such tensor, and its file.
    """
    with torch.no_grad():
        for name, value in loaded.state_dict().items():
            # a sum is not finite if one of its terms is not; the contrary is rare, and settled by counting
            if name in fresh or not value.is_floating_point() or value.is_meta or bool(value.sum().isfinite()):
                continue
            if wrong := int((~value.isfinite()).sum()):
                where = "model.object" if model.object else str(_file_of(name, Path(model.resolve())))
                raise ConfigError(
                    f"the pre-trained weights of {model.path!r} are damaged: {wrong:,} of {value.numel():,} "
                    f"values of {name} in {where} are NaN or infinite; fetch that file again, or save the model "
                    "again"
                )


def _file_of(name: str, folder: Path) -> Path:
    """The file that a tensor lies in, as far as an index of shards says so; the model may name it with a prefix."""
    files = weight_files(folder)
    for index in folder.glob("*.index.json"):
        for tensor, shard in shards(index).items():
            if f".{name}".endswith(f".{tensor}") or f".{tensor}".endswith(f".{name}"):
                return folder / shard
    return files[0] if files else folder


def weight_files(folder: Path) -> list[Path]:
    """The files from which ``transformers`` reads the weights of a local model; missing shards included."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in sorted({*shards(index).values()})]
    return []


def shards(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards names them; empty if it cannot be read."""
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _fault(file: Path, error: Exception) -> str | None:
    try:
        with file.open("rb") as opened:
            start = opened.read(200)
    except FileNotFoundError:
        return None if file.name in _OTHERS else "is missing, but the index of the weights names it: fetch it too"
    except OSError as failure:
        return f"cannot be read ({failure.strerror}); make it readable"
    if not start:
        return "is empty: fetch it again"
    if start.startswith(_POINTER):
        return (
            "is a git-LFS pointer that stands for the real file: run `git lfs pull` in that folder, or download the "
            "model with `hf download`"
        )
    if file.suffix != ".txt" and re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        return "is a web page, as a failed download leaves it: fetch it again"
    if file.suffix == ".safetensors":
        return _of_safetensors(file)
    if file.suffix in _PICKLES:
        return _of_pickle(file, error)
    return next(_of_json(file), None)


def _of_json(file: Path) -> Iterator[str]:
    if file.suffix == ".json":
        try:
            json.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            yield f"is not JSON ({error}): fetch it again"


def _of_safetensors(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LONGEST_HEADER:
            return "does not begin with the header of a safetensors file: fetch it again"
        header = opened.read(length)
    if size < 8 + length:
        return f"is truncated ({size:,} bytes, its header alone needs {8 + length:,}): fetch it again"
    try:
        ends = [one["data_offsets"][1] for name, one in json.loads(header).items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "has a damaged header for a safetensors file: fetch it again"
    if size != wanted:
        what = "is truncated" if size < wanted else "has bytes too many"
        return f"{what} ({size:,} bytes, its header describes {wanted:,}): fetch it again"
    return None


def _of_pickle(file: Path, error: Exception) -> str | None:
    """What PyTorch's restricted unpickler, which runs no code of a file, said of it; it is not read again."""
    with file.open("rb") as opened:
        if opened.read(2) == b"PK" and not zipfile.is_zipfile(file):
            return f"is truncated (it breaks off after {file.stat().st_size:,} bytes): fetch it again"
    refused = type(error).__name__ == "UnpicklingError"
    if not refused and not isinstance(error, RuntimeError | EOFError | zipfile.BadZipFile):
        return None
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    code = named.group(1) if named else _code_in(file) if refused else None
    if code:
        return (
            f"holds more than weights: reading it would run code ({code}), so it is refused; use a model in the format "
            "safetensors"
        )
    return "is damaged or no file of PyTorch weights: fetch it again, or use a model in the format safetensors"


def _code_in(file: Path) -> str | None:
    """The first function or class that a pickle refers to; parsed without running anything."""
    strings: list[str] = []
    with file.open("rb") as opened, contextlib.suppress(Exception):  # whatever bytes an unpickler may meet
        for number, (code, value, _) in enumerate(pickletools.genops(opened)):
            if number > _MOST_OPERATIONS:
                return None
            strings += str(value).split(" ") if code.name == "GLOBAL" else [value] if isinstance(value, str) else []
            named = ".".join(strings[-2:])
            if code.name in ("GLOBAL", "STACK_GLOBAL") and not named.startswith(("torch.", "collections.")):
                return named
    return None

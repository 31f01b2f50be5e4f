"""Models and tokenizers passed in from Python: their fingerprints, and working copies of them."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from fedlora.core.errors import ConfigError, first_line
from fedlora.core.handed import Handed
from fedlora.core.later import transformers

if TYPE_CHECKING:
    from fedlora.tasks.base import Model

IN_MEMORY = "in memory"
"""The path of a model passed as an object."""

_NO_PART_OF_THE_MODEL = (
    *("_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("attn_implementation", "_attn_implementation", "_commit_hash"),
)
"""Settings of a model that describe its origin or storage, not what it computes."""


def converted(values: dict[str, Any]) -> dict[str, Any]:
    """The keywords of ``Model`` with the objects passed in replaced by fingerprinted ones.

    Raises:
        ConfigError: an object is not a model or tokenizer that can be copied, or conflicts with a setting.
    """
    model, tokenizer = values.get("object"), values.get("tokenizer")
    if model is None:
        if tokenizer is not None:
            raise ConfigError(
                "model.tokenizer goes with model.object, but there is none; a model that is read from model.path "
                "brings its own tokenizer: give both, or leave the tokenizer out"
            )
        return values
    if isinstance(tokenizer, str):
        tokenizer = Handed(tokenizer)
    if isinstance(model, str):
        model = Handed(model)
    elif not isinstance(model, Handed):
        _check_model(model)
        if tokenizer is None:
            tokenizer = _tokenizer_from(str(getattr(model, "name_or_path", "")))
        model = Handed(_name_of(model, _state(model)), model)
    if tokenizer is not None and not isinstance(tokenizer, Handed):
        tokenizer = Handed(fingerprint_of_tokenizer(tokenizer), tokenizer)
    values = {"path": IN_MEMORY, **values, "object": model, "tokenizer": tokenizer}
    defaults = {"path": IN_MEMORY, "revision": None, "load": "full", "trust_remote_code": False}
    for name, default in defaults.items():
        if values.get(name, default) != default:
            raise ConfigError(
                f"model.{name} = {values[name]!r} controls how a model is loaded, but model.object is loaded "
                "already: give one of the two"
            )
    return values


def fresh_copy(auto_class: str, model: Model, settings: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a model passed as an object, as ``from_pretrained`` would load it; the object is unchanged.

    Args:
        auto_class: such as ``AutoModelForSequenceClassification``.
        model: which model.
        settings: entries of its configuration, and what else ``from_pretrained`` takes.

    Returns:
        The copy in float32 on the CPU, and what it found missing or mismatched.

    Raises:
        ConfigError: the object is not here, or was changed since it was handed over, or has no such class.
    """
    from transformers.models.auto.auto_factory import _get_model_class

    assert model.object is not None
    own = model.object.here("model.object")
    state = {name: value.to("cpu", copy=True) for name, value in _state(own).items()}
    if _name_of(own, state) != model.object.fingerprint:
        raise ConfigError(
            "the weights or settings of model.object have changed since it was passed, and runs of it would "
            "differ: create a new fedlora.Model, and do not train its model during a run"
        )
    # what is left is for `from_pretrained`
    configuration, others = type(own.config).from_dict(own.config.to_dict(), return_unused_kwargs=True, **settings)
    known = getattr(transformers, auto_class)._model_mapping
    if type(configuration) not in known:
        raise ConfigError(
            f"transformers has no {auto_class} for a {type(own).__name__}: pass a model of another family, or "
            "choose another task"
        )
    cls: Any = _get_model_class(configuration, known)  # type: ignore[no-untyped-call]
    loaded, report = cls.from_pretrained(
        None,
        config=configuration,
        state_dict=state,
        attn_implementation=None if model.attention == "auto" else model.attention,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **others,
    )
    if loaded.can_generate():
        loaded.generation_config = copy.deepcopy(own.generation_config)
    return loaded, report


def copy_of_tokenizer(model: Model) -> Any:
    """An independent copy of the tokenizer that was passed in.

    Raises:
        ConfigError: it is not here, or is an image processor.
    """
    own = _passed_tokenizer(model)
    if not isinstance(own, transformers.PreTrainedTokenizerBase):
        raise ConfigError(
            f"model.tokenizer is of type {type(own).__name__}, but this task reads text: pass a tokenizer"
        )
    own = copy.deepcopy(own)
    forget_last_call(own)
    return own


@contextlib.contextmanager
def processor_folder(model: Model) -> Iterator[str]:
    """A temporary folder with the image processor that was passed in, as ``from_pretrained`` reads it.

    Raises:
        ConfigError: it is not here, or is none.
    """
    own = _passed_tokenizer(model)
    if not isinstance(own, transformers.ImageProcessingMixin):
        raise ConfigError(
            f"model.tokenizer is of type {type(own).__name__}, but this task reads images: pass the model's "
            "image processor instead"
        )
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        yield folder


def origin_of(held: Handed | None) -> str:
    """The origin that a model or tokenizer records, if it is available and records one; empty otherwise."""
    return str(getattr(held.value, "name_or_path", None) or "") if held else ""


def loaded_again(fingerprints: Mapping[str, str], origins: Mapping[str, str]) -> dict[str, Any] | None:
    """``object`` and ``tokenizer`` reloaded from their original local folders, or None if the contents differ.

    Args:
        fingerprints: of both, as in a configuration.
        origins: the folders of both, as returned by ``origin_of``.
    """
    name, folder = fingerprints["object"].partition(":")[0], origins.get("object", "")
    cls = getattr(transformers, name, None)
    if cls is None or not folder or not Path(folder).is_dir():
        return None
    try:
        model = cls.from_pretrained(folder)
        tokenizer = _tokenizer_from(origins.get("tokenizer") or folder)
    except (OSError, ValueError, ConfigError):
        return None
    found = converted({"object": model, "tokenizer": tokenizer})
    same = all(found[part].fingerprint == fingerprints[part] for part in ("object", "tokenizer"))
    return {"object": found["object"], "tokenizer": found["tokenizer"]} if same else None


def forget_last_call(tokenizer: Any) -> None:
    """Resets truncation and padding of the last call, which a fast tokenizer would otherwise save."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def _check_model(model: Any) -> None:
    """Refuses what ``from_pretrained`` could not build again from a configuration and a state."""
    if not isinstance(model, transformers.PreTrainedModel):
        wrapped = ": call merge_and_unload()" if type(model).__module__.startswith("peft.") else ""
        raise ConfigError(
            f"model.object is of type {type(model).__name__}, but a model of transformers was expected, such as "
            f"AutoModel.from_pretrained(...) gives{wrapped}"
        )
    if not type(model).__module__.startswith("transformers."):
        raise ConfigError(
            f"model.object is of type {type(model).__module__}.{type(model).__name__}, and copies are made "
            "with the classes of transformers alone: write it with save_pretrained, and give model.path and "
            "model.trust_remote_code"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "model.object is quantised or carries adapters, but the plain model was expected: load it without "
            "them, or give model.path and model.load"
        )
    if any(value.is_meta for value in _state(model).values()):
        raise ConfigError(
            "some weights of model.object are not in memory (device 'meta'), but all were expected: load it without "
            "device_map, or give model.path"
        )


def _state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


def _name_of(model: Any, state: Mapping[str, Tensor]) -> str:
    """The class of a model, and a hash of its settings and of names, types, shapes and values of its weights."""
    # what all families have is left out at its default, so that fewer versions of transformers differ
    settings = model.config.to_diff_dict()
    settings = {name: value for name, value in settings.items() if name not in _NO_PART_OF_THE_MODEL}
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(state.items()):
        digest.update(ascii((name, str(value.dtype), tuple(value.shape))).encode())
        plain: Any = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(plain)
    return f"{type(model).__name__}:{digest.hexdigest()}"


def fingerprint_of_tokenizer(given: Any) -> str:
    """A hash of all that decides what a tokenizer or image processor gives a model."""
    if isinstance(given, transformers.ImageProcessingMixin):
        return f"processor:{_hash(given.to_dict())}"
    if not isinstance(given, transformers.PreTrainedTokenizerBase):
        raise ConfigError(
            f"model.tokenizer is of type {type(given).__name__}, but a tokenizer of transformers was expected, "
            "or for images an image processor, such as AutoTokenizer.from_pretrained(...) gives"
        )
    own = copy.deepcopy(given)
    forget_last_call(own)
    backend = getattr(own, "backend_tokenizer", None)
    facts = {
        "vocabulary": backend.to_str() if backend is not None else [type(own).__name__, own.get_vocab()],
        "special": {name: str(value) for name, value in own.special_tokens_map.items()},
        "inputs": list(own.model_input_names),
        "chat": own.chat_template,
        "truncation_side": own.truncation_side,
    }
    return f"tokenizer:{_hash(facts)}"


def _hash(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())


def _passed_tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise ConfigError("model.object needs its tokenizer: fedlora.Model(object=..., tokenizer=...)")
    return model.tokenizer.here("model.tokenizer")


def _tokenizer_from(origin: str) -> Any:
    """The tokenizer, or else the image processor, that lies where a model was loaded from."""
    reason = "it does not record where it was loaded from"
    for auto_class in (transformers.AutoTokenizer, transformers.AutoImageProcessor) if origin else ():
        try:
            return auto_class.from_pretrained(origin)
        except (OSError, ValueError, ImportError) as error:
            reason = f"none can be loaded from {origin!r}: {first_line(error)}"
    raise ConfigError(
        f"the model came without its tokenizer, and {reason}; give fedlora.Model(object=..., tokenizer=...)"
    )

"""Any tuning that the ``peft`` library supports, used unchanged."""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal

import torch
from torch import nn

from fedlora.core.component import MODEL_CONFIG, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.later import peft
from fedlora.core.schema import Leaf, Schema, factor_leaf
from fedlora.core.tree import Tree
from fedlora.tuning.base import Installed, Tuning
from fedlora.tuning.matrices import copy_attributes
from fedlora.tuning.targets import saved_modules, shortest_endings

EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of the initialisations of `peft` that decompose the weights, and change these."""
_SVD_INITS = (*EDITS_BASE, "eva", "mica")
_SVD_TYPES = ("ADAMSS", "FROD", "OSF", "PSOFT", "TINYLORA")

_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields with module names, or a regular expression over them."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Peft(Tuning):
    """The modules that ``peft`` installs for a configuration.

    Args:
        config: the fields of a ``peft`` config object, ``peft_type`` among them; ``Peft.of(config)`` makes it from one.
    """

    kind: Literal["peft"] = "peft"
    config: dict[str, Any]

    @staticmethod
    def of(config: peft.PeftConfig) -> Peft:
        """The tuning for a ``peft`` config object."""
        fields = {key: value for key, value in config.to_dict().items() if value is not None}
        return Peft(config={key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()})

    def build(self, modules: list[str]) -> peft.PeftConfig:
        """The ``peft`` config object.

        Args:
            modules: the saved modules, unless the configuration names its own.

        Raises:
            ConfigError: ``peft`` refuses the configuration, or its initialisation computes a decomposition on each
                client.
        """
        init, kind = str(self.config.get("init_lora_weights", True)), str(self.config.get("peft_type", "")).upper()
        if init.lower().startswith(_SVD_INITS) or kind in _SVD_TYPES:
            what = f"peft_type = {kind!r}" if kind in _SVD_TYPES else f"init_lora_weights = {init!r}"
            raise ConfigError(
                f"{what} would let each client decompose the weights by itself, and "
                "machines disagree on signs and order; use the tuning `lora` with init = { kind = 'svd_of_weight' }"
            )
        try:
            config: Any = peft.get_peft_config(dict(self.config))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"peft refuses this configuration: {error}; `peft_type` and its fields are needed"
            ) from error
        if getattr(config, "modules_to_save", ...) is None:
            config.modules_to_save = modules
        assert isinstance(config, peft.PeftConfig)
        return config

    @property
    def has_pattern(self) -> bool:
        return any(_is_pattern(self.config.get(key)) for key in _PATTERNS)

    def without_pattern(self, model: nn.Module, head: frozenset[str]) -> Peft:
        names = [name for name, _ in model.named_modules()]
        spelled = {
            key: list(shortest_endings([name for name in names if re.fullmatch(self.config[key], name)], names))
            for key in _PATTERNS
            if _is_pattern(self.config.get(key))
        }
        return Peft(config={**self.config, **spelled})

    @property
    def has_factors(self) -> bool:
        """See ``Tuning.has_factors``: the parameters that ``peft`` calls ``lora_A`` and ``lora_B``."""
        return str(self.config.get("peft_type", "")).upper() == "LORA"

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        config = self.build(saved_modules(model, head))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft reads a name that transformers 5 changed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            torch.manual_seed(seed)
            try:
                wrapped = peft.get_peft_model(model, config)
            except KeyError as error:  # in its table of wrappers by task
                raise ConfigError(
                    f"peft cannot put {config.peft_type} into this model without a task ({error}); set task_type in "
                    "the configuration, such as 'SEQ_CLS', or choose another peft_type"
                ) from error
            except (ValueError, TypeError) as error:
                raise ConfigError(f"peft cannot put {config.peft_type} into this model: {error}") from error
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                copy_attributes(module.get_base_layer(), module)
        parameters, schema = {}, Schema()
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".default", "")
                parameters[short] = parameter
                schema[short] = Leaf("head") if "modules_to_save" in name else _leaf(short)
        return Installed(wrapped, parameters, schema)

    def changes(self, installed: Installed, init: Tree, params: Tree) -> Tree:
        """See ``Tuning.changes``.

        Raises:
            ConfigError: always; modules installed by ``peft`` are opaque to fedlora.
        """
        raise ConfigError("a `peft` tuning cannot be handed to a next phase; use `lora` for that")


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and value != "all-linear"


def _leaf(name: str) -> Leaf:
    """The leaf for a tensor named by ``peft``; factors get no pair, as rules about products ``B A`` do not apply."""
    found = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.|$)", name)
    return factor_leaf(found[1]) if found else Leaf()

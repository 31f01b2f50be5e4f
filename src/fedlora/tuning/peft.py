"""Any tuning that the library ``peft`` knows, as it is."""

from __future__ import annotations

from typing import Any, Literal

import peft
import torch
from pydantic.dataclasses import dataclass
from torch import nn

from fedlora.component import STRICT
from fedlora.errors import ConfigError
from fedlora.tree import Tree
from fedlora.tuning.base import Installed, Tuning


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Peft(Tuning):
    """Whatever ``peft`` installs for a configuration.

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

    def build(self, head: frozenset[str]) -> peft.PeftConfig:
        """The ``peft`` config object, with the task head among the saved modules unless they are named.

        Raises:
            ConfigError: ``peft`` refuses it, or it starts from an SVD on each client.
        """
        if str(self.config.get("init_lora_weights", True)).startswith(("pissa", "olora", "corda", "loftq", "eva")):
            raise ConfigError(
                f"init_lora_weights = {self.config['init_lora_weights']!r} would let each client make its own SVD, and "
                "machines disagree on signs and order; use the tuning `lora` with init = { kind = 'svd_of_weight' }"
            )
        try:
            config = peft.get_peft_config(dict(self.config))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"peft refuses this configuration: {error}; `peft_type` and its fields are needed") from error
        if getattr(config, "modules_to_save", ...) is None:
            config.modules_to_save = sorted({name.split(".")[0] for name in head})
        return config

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """See ``Tuning.install``."""
        config = self.build(head)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                wrapped = peft.get_peft_model(model, config)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"peft cannot put {config.peft_type} into this model: {error}") from error
        parameters, groups = {}, {}
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".default", "")
                parameters[short] = parameter
                groups[short] = "head" if "modules_to_save" in name else "adapter"
        return Installed(wrapped, parameters, groups)

    def changes(self, installed: Installed, init: Tree, params: Tree) -> Tree:
        """See ``Tuning.changes``.

        Raises:
            ConfigError: always; what ``peft`` installed is opaque here.
        """
        raise ConfigError("a `peft` tuning cannot be handed to a next phase; use `lora` for that")

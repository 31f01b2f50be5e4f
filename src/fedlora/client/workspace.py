"""A process's single resident model: parameters are swapped in place, and the model is never copied."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from xxhash import xxh3_128_digest

from fedlora.core.devices import deterministic_kernels
from fedlora.core.errors import ConfigError, TrainingError
from fedlora.core.slots import kind_of
from fedlora.core.state import Fold, Folds, named_seed
from fedlora.core.tree import Tree
from fedlora.recipe import Recipe
from fedlora.tasks.base import Compute, Evaluation, Positions, Prepared, Split
from fedlora.tasks.models.complete import NOTES
from fedlora.transport import wire
from fedlora.transport.base_updates import FoldMessage, received
from fedlora.tuning import InitialParams, Installed
from fedlora.tuning.lora import lora_layers
from fedlora.tuning.lora_layer import LoRALayer


class Workspace:
    """A model, the tuning installed in it, and the setup applied to its frozen part.

    ``notes`` are sentences about the model for the ledger.

    Args:
        task: the task of the model.
        seed: seed of the head's initial values.
        device: the model's device.
        deterministic: whether CUDA uses kernels that give the same bits each time.
    """

    def __init__(self, task: Prepared, seed: int, device: torch.device, deterministic: bool = True) -> None:
        self.task = task
        self.device = device
        self.deterministic = deterministic
        self._seed = seed
        self._phase: int | None = None
        self._setup: bytes | None = None
        self._installed: Installed | None = None
        self._decoded: tuple[tuple[bytes, int], Tree] | None = None
        self._folds: tuple[tuple[bytes, int], Folds] | None = None
        self.init: Tree = {}
        self.personal: Tree = {}
        self.notes: tuple[str, ...] = ()
        self.batches_examples: dict[frozenset[str], bool] = {}
        """Whether a batch gives the gradients of single examples, by the names of the trained parameters."""

    @property
    def seed(self) -> int:
        """Seed of the head's initial values."""
        return self._seed

    @property
    def setup(self) -> bytes | None:
        """The setup message applied to the frozen part, if there is one."""
        return self._setup

    @property
    def installed(self) -> Installed:
        """The model with its tuning."""
        if self._installed is None:
            raise TrainingError("no phase has been opened in this process yet")
        return self._installed

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.installed.model

    def open(self, phase: int, recipe: Recipe) -> Installed:
        """Loads the pre-trained model with its published weights and installs ``recipe``'s tuning.

        Args:
            phase: number of the phase.
            recipe: the recipe whose tuning is installed.

        Raises:
            ConfigError: nothing would be trained, or rounds would fold into quantised weights.
        """
        if self._installed is not None:
            self._installed = self._decoded = self._folds = None  # free the old model first
            gc.collect()  # cycles may hold it: hooks of packed values, and frames of an error as it was loaded
        model, head = self.task.load_model(named_seed(self._seed, "head"), _as_loaded(recipe), self.device)
        self.notes = getattr(model, NOTES, ())
        self._installed = recipe.tuning.install(model, head, named_seed(self._seed, "install", phase))
        if not self.task.train_head:
            self._installed.freeze_head()
            if not self._installed.parameters:
                raise ConfigError(
                    f"{kind_of(recipe.tuning)} would train nothing: model.train_head = false freezes the head; "
                    "use `lora`, `bitfit` or `full`, or set model.train_head = true"
                )
        for parameter in self._installed.parameters.values():  # fused optimisers ignore strides
            parameter.data = parameter.data.contiguous()
        if recipe.aggregator.edits_base:
            for name, layer in lora_layers(model).items():
                if layer.packed:
                    raise ConfigError(
                        f"aggregator {kind_of(recipe.aggregator)!r} edits the values of {name}, which are stored "
                        "quantised; load the model unquantised, or use another aggregator"
                    )
        self._phase, self._setup, self.init, self.batches_examples = phase, None, {}, {}
        return self._installed

    def apply_setup(self, phase: int, recipe: Recipe, setup: bytes | None) -> None:
        """Applies the server's setup message to the frozen part; does nothing if it is applied already.

        Args:
            phase: number of the phase.
            recipe: its recipe.
            setup: the setup message as received; None if the client should have it already.

        Raises:
            WireError: the setup message is malformed.
            TrainingError: ``setup`` is None and none has been applied.
        """
        if phase == self._phase and self._setup is not None and setup in (None, self._setup):
            return
        if setup is None:
            raise TrainingError(
                f"phase {phase} was never announced to this client, and no announcement came with the job"
            )
        if phase != self._phase or self._setup is not None:
            self.open(phase, recipe)
        installed = self.installed
        like = setup_parts(recipe, installed, InitialParams(installed.read(), Fold(), 0, {}))
        parts = wire.unpack(setup, like, recipe.down.precisions) if like else {}
        self.personal = parts.get("personal", {})
        self.init = recipe.tuning.apply_setup(installed, parts)
        if recipe.local.compute == "bf16":
            _to_bfloat16(installed, keep=recipe.aggregator.edits_base)
        self._setup = setup

    def load(self, recipe: Recipe, params: Tree, folds: Folds) -> None:
        """Loads trained parameters, and the folds of rounds into frozen weights, into the model."""
        recipe.tuning.fold(self.installed, folds)
        self.installed.load(params)

    def evaluate(self, rows: Positions, split: Split, compute: str) -> Evaluation:
        """Metrics of the model in its current state, in evaluation mode."""
        self.model.eval()
        with self.predicting(compute):
            return self.task.evaluate(self.model, rows, split, self.device)

    def decode(self, payload: bytes, round: int, read: Callable[[], Tree]) -> Tree:
        """The decoded ``payload``, cached until different bytes arrive: a cohort receives the same bytes.

        Args:
            payload: the parameters of a round.
            round: the round of the phase; the reference may differ between rounds.
            read: decodes it; called if the bytes are new, or if they are relative to a client's last round, which
                differs between clients.

        Returns:
            A read-only tree.
        """
        if wire.reference_of(payload) == "last_round":
            return read()
        key = xxh3_128_digest(payload), round  # the bytes themselves would be one copy more
        if self._decoded is None or self._decoded[0] != key:
            self._decoded = None  # free the old tree first
            self._decoded = key, read()
        return self._decoded[1]

    def folds(self, update: FoldMessage | None, known: Folds) -> Folds:
        """The folds that a client has after a message, cached until different bytes arrive.

        Args:
            update: the message, if there is one.
            known: the folds that the client had before.

        Raises:
            WireError: the message is malformed.
        """
        if update is None:
            return known
        if self._folds is None or self._folds[0] != (update.raw, known.version):
            shapes = {name: (layer.rows, layer.columns) for name, layer in lora_layers(self.model).items()}
            self._folds = (update.raw, known.version), received(update, known, shapes)
        return self._folds[1]

    @contextmanager
    def predicting(self, compute: str) -> Iterator[None]:
        """Within the block, forward passes compute in this number format and keep nothing for gradients."""
        with self.kernels(), torch.inference_mode(), self.autocast(compute):
            yield

    def kernels(self) -> AbstractContextManager[None]:
        """The kernels of the device; see ``deterministic_kernels``."""
        return deterministic_kernels(self.device, self.deterministic)

    def autocast(self, compute: str) -> torch.autocast:
        """The number format of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=compute == "bf16")


def setup_parts(recipe: Recipe, installed: Installed, start: InitialParams) -> dict[str, Tree]:
    """The parts of ``recipe``'s setup message; for any start of the right shapes, its template."""
    parts = recipe.tuning.setup(installed, start, recipe.down.reference == "init")
    personal = {name: start.params[name] for name in installed.parameters if name in installed.schema.personal}
    return parts | ({"personal": personal} if personal else {})


def _as_loaded(recipe: Recipe) -> Compute:
    """The number format in which frozen weights can be read already, with the same bits as rounding them later."""
    if recipe.local.compute != "bf16" or recipe.aggregator.edits_base or not recipe.tuning.freezes_base:
        return "fp32"
    return "stored" if recipe.tuning.reads_base else "bf16"


def _to_bfloat16(installed: Installed, keep: bool) -> None:
    """Casts frozen weights to bfloat16; with ``keep``, weights that rounds edit keep what rounding would lose."""
    # a head that is not trained cannot compensate for rounding
    trained = {id(parameter) for parameter in (*installed.parameters.values(), *installed.frozen_head.values())}
    for module in installed.model.modules():
        own = list(module.parameters(recurse=False))
        if keep and isinstance(module, LoRALayer):
            continue
        # running statistics are float32, and their kernel needs a single format
        if isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        # normalisation kernels need the same format for weight and bias
        if isinstance(module, nn.LayerNorm) and any(id(parameter) in trained for parameter in own):
            continue
        for parameter in own:
            if id(parameter) not in trained and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)

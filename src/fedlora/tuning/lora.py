"""Low-rank adapters (arXiv 2106.09685): ``y = W x + b + scale * B A x`` with ``W`` frozen."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedlora.core.component import MODEL_CONFIG, Count, Part, Positive, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.schema import Schema, factor_leaf
from fedlora.core.slots import kind_of
from fedlora.core.state import Fold, Folds, PhaseHandover, named_seed
from fedlora.core.tree import Tree
from fedlora.tuning.base import InitialParams, Installed, Tuning, freeze_all_but, grouped, seed_from_tree, seed_to_tree
from fedlora.tuning.lora_init import AnyLoRAInit, Kaiming, SvdOfDelta
from fedlora.tuning.lora_layer import LoRAConv, LoRAEmbedding, LoRALayer, lora_layer
from fedlora.tuning.matrices import is_quantized, matrix_shape
from fedlora.tuning.targets import Targets, endings, find, is_pattern, replace_module

PEFT_PREFIX = "base_model.model."
"""The prefix that ``peft`` adds to the names of a model's parameters."""
_FACTOR = re.compile(r"(?P<module>.*)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class LoRA(Tuning):
    """Low-rank adapters on selected matrices, and the head.

    Args:
        rank: rank of every adapter.
        alpha: ``scale = alpha / rank``.
        targets: see ``tuning.targets.find``.
        init: the initialisation of the factors.
        dropout: dropout probability on the adapters' input during training.
        train: which factors are trained: ``both``; ``B`` alone (FFA-LoRA, arXiv 2403.12313), so that the mean of the
            products is the product of the means; or ``alternate``, ``B`` in the first round, ``A`` in the next (RoLoRA,
            arXiv 2409.02346).
    """

    kind: Literal["lora"] = "lora"
    rank: Count = 16
    alpha: Positive = 16.0
    targets: Targets = "default"
    init: AnyLoRAInit = Kaiming()
    dropout: Part = 0.0
    train: Literal["both", "B", "alternate"] = "both"
    has_factors: ClassVar[bool] = True

    @property
    def adapter_rank(self) -> int:
        return self.rank

    @property
    def moving(self) -> str:
        return self.train

    @property
    def init_from_seed(self) -> bool:
        return self.init.from_seed

    def in_round(self, schema: Schema, round: int) -> Schema:
        """See ``Tuning.in_round``: the factor that ``train`` excludes is frozen."""
        if self.train == "both":
            return schema
        frozen = "B" if self.train == "alternate" and round % 2 else "A"
        return Schema(
            {n: leaf._replace(role="frozen") if leaf.factor == frozen else leaf for n, leaf in schema.items()}
        )

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @property
    def zero_is_neutral(self) -> bool:
        """See ``Tuning.zero_is_neutral``: false if the factors start from an SVD."""
        return not (self.init.residual or isinstance(self.init, SvdOfDelta))

    @property
    def folds(self) -> str:
        """The part folded into the base at the start: ``none``, ``biases`` or ``rest``."""
        return self.init.fold if isinstance(self.init, SvdOfDelta) else "none"

    @property
    def residual(self) -> bool:
        """Whether the initial product is subtracted from the frozen weight."""
        return self.init.residual or self.folds == "rest"

    @property
    def freezes_base(self) -> bool:
        return True

    @property
    def reads_base(self) -> bool:
        return self.residual or self.folds != "none" or not self.init.from_seed

    @property
    def has_pattern(self) -> bool:
        return is_pattern(self.targets)

    def without_pattern(self, model: nn.Module, head: frozenset[str]) -> LoRA:
        return replace(self, targets=endings(model, self.targets, head)) if self.has_pattern else self

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """See ``Tuning.install``; a rank above a matrix's smaller dimension is refused.

        Raises:
            ConfigError: nothing matches, the rank is too large, or the initialisation would edit a quantised weight.
        """
        found = find(model, self.targets, head)
        for name, module in found.items():
            smaller = min(matrix_shape(module))
            if self.rank > smaller:
                raise ConfigError(
                    f"rank = {self.rank} is above the smaller side of {name} ({smaller}); "
                    f"choose a rank up to {smaller}, or other targets"
                )
            if self.residual and is_quantized(module):
                raise ConfigError(
                    f"init = {kind_of(self.init)!r} edits the values of {name}, which are stored quantised; "
                    "load the model unquantised, or start with init = { kind = 'kaiming' }"
                )
        for name, module in found.items():
            replace_module(model, name, lora_layer(module, self.rank, self.scale, self.dropout))
        adapters = {f"{name}.{factor}" for name in found for factor in ("lora_A", "lora_B")}
        parameters = freeze_all_but(model, adapters | head)
        schema = grouped(parameters, head)
        for name in found:
            a, b = f"{name}.lora_A", f"{name}.lora_B"
            schema |= {a: factor_leaf("A", b), b: factor_leaf("B", a)}
        return Installed(model, parameters, schema)

    def start(self, installed: Installed, seed: int, carry: PhaseHandover | None) -> InitialParams:
        """See ``Tuning.start``.

        The ledger's ``energy_kept`` is ``||scale B A||^2 / ||delta||^2`` over everything learnt: the share taken over
        by the adapters, before any fold. An initialisation that ignores the delta keeps nothing.
        """
        params = installed.read()
        deltas = carry.delta if carry else {}
        kept = 0.0
        for name, layer in lora_layers(installed.model).items():
            b, a = self._factors(name, layer, deltas.get(f"{name}.weight"), seed)
            params[f"{name}.lora_A"], params[f"{name}.lora_B"] = a, b
            if isinstance(self.init, SvdOfDelta) and f"{name}.weight" in deltas:
                kept += float((self.scale * b @ a).square().sum())
        if carry is None:
            return InitialParams(params, Fold(), seed, {})
        params.update({name: value for name, value in carry.head.items() if name in params})
        if self.folds == "rest":
            fold = Fold(dense={name: value.to_dense() for name, value in deltas.items()})
        elif self.folds == "biases":
            fold = Fold(dense={name: value for name, value in deltas.items() if value.dim() < 2})
        else:
            fold = Fold()
        total = sum(float(value.square().sum()) for value in deltas.values())
        return InitialParams(params, fold, seed, {"energy_kept": kept / total if total else 1.0})

    def setup(self, installed: Installed, start: InitialParams, reference: bool) -> dict[str, Tree]:
        """See ``Tuning.setup``: a seed if the init can be redrawn from one, otherwise its values; and the fold."""
        head = installed.schema.split(start.params).get("head", {})
        parts: dict[str, Tree] = {}
        if reference and self.init.from_seed:
            parts = {"seed": seed_to_tree(start.seed), "init": head}
        elif reference:
            parts = {"init": start.params}
        elif self.residual:
            parts = {"init": {name: value for name, value in start.params.items() if name not in head}}
        if self.folds != "none":
            parts["fold"] = {
                name: start.fold.dense.get(name, torch.zeros_like(value, dtype=torch.float32, device="cpu"))
                for name, value in installed.model.named_parameters()
                if name not in installed.parameters
                and name not in installed.frozen_head
                and (self.folds == "rest" or value.dim() < 2)
            }
        return parts

    def apply_setup(self, installed: Installed, parts: Mapping[str, Tree]) -> Tree:
        """See ``Tuning.apply_setup``: the residual is computed from the factors *received*, never from a local SVD."""
        init = dict(parts.get("init", {}))
        layers = lora_layers(installed.model)
        if "seed" in parts:
            installed.seed = seed = seed_from_tree(parts["seed"])
            for name, layer in layers.items():
                init[f"{name}.lora_B"], init[f"{name}.lora_A"] = self._factors(name, layer, None, seed)
        named = dict(installed.model.named_parameters())
        installed.folded = {name: value for name, value in parts.get("fold", {}).items() if bool(value.any())}
        with torch.no_grad():
            for name, value in installed.folded.items():
                named[name].add_(value.to(named[name].device))
            if self.residual:
                for name, layer in layers.items():
                    product = self.scale * init[f"{name}.lora_B"] @ init[f"{name}.lora_A"]
                    weight = layer.frozen[0]
                    weight.sub_(layer.as_weight(product).to(weight.device))
        return {name: init[name] for name in installed.parameters if name in init}

    def fold(self, installed: Installed, folds: Folds) -> None:
        """See ``Tuning.fold``: always starts from the base, so the folds applied before do not matter."""
        if folds.total is installed.folds.total:
            return
        layers = lora_layers(installed.model)
        with torch.no_grad():
            for name in {**installed.folds.total, **folds.total}:
                weight = layers[name].frozen[0]
                base = installed.base.setdefault(name, weight.detach().clone())
                if name in folds.total:
                    edit = layers[name].as_weight(self.scale * folds.total[name]).to(weight.device)
                    weight.copy_(base.float() + edit)
                else:
                    weight.copy_(base)
        installed.folds = folds

    def size_of(self, fold: Fold) -> float:
        """See ``Tuning.size_of``: ``scale ||B A||``, computed from small matrices."""
        squares = sum(
            float(((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum()) for b, a in fold.factors.values()
        )
        return self.scale * math.sqrt(max(0.0, squares))

    def redraw_init(self, schema: Schema, init: Tree, seed: int) -> Tree:
        """See ``Tuning.redraw_init``: as at the start of a phase, with another seed."""
        result = dict(init)
        for a, b, name in schema.pairs:
            shape = torch.empty(init[b].shape[0], init[a].shape[1], device="meta")
            result[b], result[a] = self.init.factors(shape, None, self.rank, self.scale, named_seed(seed, name))
        return result

    def changes(self, installed: Installed, init: Tree, params: Tree) -> Tree:
        """See ``Tuning.changes``: the folds plus ``scale (B A - B0 A0)``, without ``B0 A0`` if the base kept it.

        The folds of rounds are those currently in the model.

        Raises:
            ConfigError: a weight is quantised.
        """
        result = dict(installed.folded)
        for name, layer in lora_layers(installed.model).items():
            if layer.packed:
                raise ConfigError(
                    f"the update of {name} cannot be added to its weight, which is stored quantised; export the "
                    "adapter, without --merge"
                )
            product = params[f"{name}.lora_B"] @ params[f"{name}.lora_A"]
            if self.residual:
                product = product - init[f"{name}.lora_B"] @ init[f"{name}.lora_A"]
            product = product + installed.folds.total.get(name, 0.0)
            change = self.scale * layer.as_weight(product)
            result[f"{name}.weight"] = result.get(f"{name}.weight", torch.zeros(())) + change
        return result

    def _factors(self, name: str, layer: LoRALayer, delta: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        weight = layer.matrix().detach()
        weight = weight if layer.packed else weight.to("cpu", torch.float32)
        delta = None if delta is None else layer.as_matrix(delta)
        return self.init.factors(weight, delta, self.rank, self.scale, named_seed(seed, name))


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapters in ``model`` by module name, with shared ones listed once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def from_peft(state: Mapping[str, Tensor]) -> Tree:
    """Converts a PEFT LoRA state dict to fedlora's names, with every factor as a matrix.

    Args:
        state: as in ``adapter_model.safetensors`` or ``PeftModel.state_dict()``: names such as
            ``base_model.model.<module>.lora_A[.default].weight``, ``...<module>.lora_embedding_A[.default]`` and
            ``...<head>.modules_to_save.default.weight``; a convolution's factors are ``(rank, in, height, width)`` and
            ``(out, rank, 1, 1)``.

    Raises:
        ConfigError: a name is not a PEFT name of a LoRA factor or a saved module.
    """
    result = {}
    for key, value in state.items():
        if not key.startswith(PEFT_PREFIX):
            raise ConfigError(f"{key!r} is not a name of a PEFT state dict: it should start with {PEFT_PREFIX!r}")
        name = key.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        factor = _FACTOR.fullmatch(name)
        if factor is not None:
            name = f"{factor['module']}.lora_{factor['side']}"
            value = value.flatten(1) if value.dim() > 2 else value
        result[name] = value.to(torch.float32)
    return result


def to_peft(params: Mapping[str, Tensor], model: nn.Module | None = None) -> Tree:
    """The inverse of ``from_peft``, with the names of ``adapter_model.safetensors``.

    Args:
        params: the trained parameters.
        model: the model that contains the adapters; needed if some of them are on convolutions or embeddings, whose
            factors have other shapes and names.
    """
    layers = lora_layers(model) if model is not None else {}
    result = {}
    for name, value in params.items():
        module, _, leaf = name.rpartition(".")
        layer = layers.get(module)
        if leaf in ("lora_A", "lora_B"):
            if isinstance(layer, LoRAEmbedding):
                name = f"{module}.{leaf.replace('lora_', 'lora_embedding_')}"
            else:
                name = f"{name}.weight"
            if isinstance(layer, LoRAConv):
                value = layer.kernel(value, leaf)
        result[PEFT_PREFIX + name] = value
    return result

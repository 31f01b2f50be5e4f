"""Low-rank adapters (arXiv 2106.09685): ``y = W x + b + scale * B A x`` with ``W`` frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from fedlora.core.component import MODEL_CONFIG, Count, Part, Positive, Whole, dataclass, without_defaults
from fedlora.core.errors import ConfigError
from fedlora.core.schema import Schema, factor_leaf
from fedlora.core.slots import kind_of
from fedlora.core.state import Fold, Folds, PhaseHandover, named_seed
from fedlora.core.tree import Tree
from fedlora.tuning.base import InitialParams, Installed, Tuning, freeze_all_but, grouped, seed_from_tree, seed_to_tree
from fedlora.tuning.dora import MAGNITUDE, DoRALinear, check_dora
from fedlora.tuning.lora_init import AnyLoRAInit, Kaiming, SvdOfDelta
from fedlora.tuning.lora_layer import LoRALayer, lora_layer
from fedlora.tuning.matrices import is_quantized, matrix_shape
from fedlora.tuning.targets import (
    Targets,
    check_endings,
    endings,
    find,
    in_layers,
    is_pattern,
    of_ending,
    replace_module,
)

if TYPE_CHECKING:
    from fedlora.tuning.matrices import Matrix

_LATER = ("rslora", "dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "strict_rank")


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class LoRA(Tuning):
    """Low-rank adapters on selected matrices, and the head.

    Further modules that are trained whole, ``modules_to_save`` in ``peft``, are ``Model.head``.

    Args:
        rank: rank of every adapter.
        alpha: ``scale = alpha / rank``, with the rank that the layer has.
        targets: see ``tuning.targets.find``.
        init: the initialisation of the factors.
        dropout: dropout probability on the adapters' input during training.
        train: which factors are trained: ``both``; ``B`` alone (FFA-LoRA, arXiv 2403.12313), so that the mean of the
            products is the product of the means; or ``alternate``, ``B`` in the first round, ``A`` in the next (RoLoRA,
            arXiv 2409.02346).
        rslora: ``scale = alpha / sqrt(rank)`` (rsLoRA, arXiv 2312.03732).
        dora: whether the length of each row of a weight is trained apart from its direction (DoRA, arXiv 2402.09353);
            for linear layers alone.
        rank_pattern: other ranks, by the end of a module's name, the longest that fits.
        alpha_pattern: other values of ``alpha``, in the same way.
        layers_to_transform: the layers that get adapters, by the first number in a module's name; all if absent.
        strict_rank: whether a rank above the smaller side of a matrix is refused, instead of lowered to that side.

    Raises:
        ConfigError: a key of a pattern is no name.
    """

    kind: Literal["lora"] = "lora"
    rank: Count = 16
    alpha: Positive = 16.0
    targets: Targets = "default"
    init: AnyLoRAInit = Kaiming()
    dropout: Part = 0.0
    train: Literal["both", "B", "alternate"] = "both"
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, Count] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, Positive] = field(default_factory=dict, hash=False)
    layers_to_transform: tuple[Whole, ...] = ()
    strict_rank: bool = False
    has_factors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_endings("rank_pattern", self.rank_pattern)
        check_endings("alpha_pattern", self.alpha_pattern)

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, write, _LATER)

    @property
    def adapter_rank(self) -> int:
        return max((self.rank, *self.rank_pattern.values()))

    @property
    def sums_products(self) -> bool:
        return not self.dora

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

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of a module's ``B A``.

        Args:
            module: its name.
            rank: the rank of its adapter.
        """
        alpha = of_ending(module, self.alpha_pattern, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @property
    def zero_is_neutral(self) -> bool:
        """See ``Tuning.zero_is_neutral``: false if the factors start from an SVD, and for DoRA's lengths of rows."""
        return self.lost_ranks_are_neutral and not self.dora

    @property
    def lost_ranks_are_neutral(self) -> bool:
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
        return self.residual or self.folds != "none" or not self.init.from_seed or self.dora

    @property
    def has_pattern(self) -> bool:
        return is_pattern(self.targets)

    def without_pattern(self, model: nn.Module, head: frozenset[str]) -> LoRA:
        return replace(self, targets=endings(model, self.targets, head)) if self.has_pattern else self

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """See ``Tuning.install``; a rank above a matrix's smaller side is lowered to it, or refused.

        Raises:
            ConfigError: nothing matches, the rank is too large, or a quantised weight would be edited.
        """
        found = in_layers(find(model, self.targets, head), self.layers_to_transform)
        check_endings("rank_pattern", self.rank_pattern, found)
        check_endings("alpha_pattern", self.alpha_pattern, found)
        for name, module in found.items():
            if self.dora:
                check_dora(name, module)
            if self.residual and is_quantized(module):
                raise ConfigError(
                    f"init = {kind_of(self.init)!r} edits the values of {name}, which are stored quantised; "
                    "load the model unquantised, or start with init = { kind = 'kaiming' }"
                )
        ranks, notes = self._ranks(found)
        make = DoRALinear if self.dora else lora_layer
        for name, module in found.items():
            layer = make(module, ranks[name], self.scale_of(name, ranks[name]), self.dropout)
            replace_module(model, name, layer)
        trained = ("lora_A", "lora_B", MAGNITUDE) if self.dora else ("lora_A", "lora_B")
        adapters = {f"{name}.{leaf}" for name in found for leaf in trained}
        parameters = freeze_all_but(model, adapters | head)
        schema = grouped(parameters, head)
        for name in found:
            a, b = f"{name}.lora_A", f"{name}.lora_B"
            schema |= {a: factor_leaf("A", b), b: factor_leaf("B", a)}
        if self.train == "B":  # in every round alike
            schema = self.in_round(schema, 0)
        return Installed(model, parameters, schema, notes=notes)

    def _ranks(self, found: Mapping[str, Matrix]) -> tuple[dict[str, int], tuple[str, ...]]:
        """The rank of each adapter, and a sentence about those that are lower than asked for."""
        asked = {name: of_ending(name, self.rank_pattern, self.rank) for name in found}
        sides = {name: min(matrix_shape(module)) for name, module in found.items()}
        over = [name for name in found if asked[name] > sides[name]]
        if not over:
            return asked, ()
        first = over[0]
        if self.strict_rank:
            raise ConfigError(
                f"rank = {asked[first]} is above the smaller side of {first} ({sides[first]}); choose a rank up to "
                f"{sides[first]}, other targets, or strict_rank = false, which lowers it there"
            )
        note = (
            f"the rank of {len(over)} of {len(found)} adapters is the smaller side of their matrix, which is below the "
            f"rank asked for, such as {sides[first]} instead of {asked[first]} at {first}; strict_rank = true refuses "
            "this"
        )
        return {name: min(rank, sides[name]) for name, rank in asked.items()}, (note,)

    def start(self, installed: Installed, seed: int, carry: PhaseHandover | None) -> InitialParams:
        """See ``Tuning.start``.

        The ledger's ``energy_kept`` is ``||scale B A||^2 / ||delta||^2`` over everything learnt: the share taken over
        by the adapters, before any fold. An initialisation that ignores the delta keeps nothing.
        """
        params = installed.read()
        deltas = carry.delta if carry else {}
        kept = 0.0
        for name, layer in lora_layers(installed.model).items():
            delta = deltas.get(f"{name}.weight")
            b, a = self._factors(name, layer, delta, seed)
            params[f"{name}.lora_A"], params[f"{name}.lora_B"] = a, b
            product = layer.scale * b @ a
            if isinstance(self.init, SvdOfDelta) and delta is not None:
                kept += float(product.square().sum())
            if isinstance(layer, DoRALinear):
                params[f"{name}.{MAGNITUDE}"] = layer.lengths(self._edit(layer, product, delta))
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
        factors = {name: value for name, value in start.params.items() if installed.schema[name].factor}
        parts: dict[str, Tree] = {}
        if reference and self.init.from_seed:
            rest = {name: value for name, value in start.params.items() if name not in factors}
            parts = {"seed": seed_to_tree(start.seed), "init": rest}
        elif reference:
            parts = {"init": start.params}
        elif self.residual:
            parts = {"init": factors}
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
                    product = layer.scale * init[f"{name}.lora_B"] @ init[f"{name}.lora_A"]
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
                    edit = layers[name].as_weight(layers[name].scale * folds.total[name]).to(weight.device)
                    weight.copy_(base.float() + edit)
                else:
                    weight.copy_(base)
        installed.folds = folds

    def size_of(self, fold: Fold, params: Tree) -> float:
        """See ``Tuning.size_of``: ``scale ||B A||``, computed from small matrices."""
        squares = 0.0
        for name, (b, a) in fold.factors.items():
            scale = self.scale_of(name, len(params[f"{name}.lora_A"]))
            squares += scale**2 * float(((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum())
        return math.sqrt(max(0.0, squares))

    def redraw_init(self, schema: Schema, init: Tree, seed: int) -> Tree:
        """See ``Tuning.redraw_init``: as at the start of a phase, with another seed."""
        result = dict(init)
        for a, b, name in schema.pairs:
            shape = torch.empty(init[b].shape[0], init[a].shape[1], device="meta")
            rank = len(init[a])
            scale = self.scale_of(name, rank)
            result[b], result[a] = self.init.factors(shape, None, rank, scale, named_seed(seed, name))
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
            change = layer.scale * layer.as_weight(product)
            if isinstance(layer, DoRALinear):
                trained = (params[f"{name}.{leaf}"] for leaf in ("lora_A", "lora_B", MAGNITUDE))
                change = change + layer.as_weight(layer.rescaling(*trained))
            result[f"{name}.weight"] = result.get(f"{name}.weight", torch.zeros(())) + change
        return result

    def _edit(self, layer: LoRALayer, product: Tensor, delta: Tensor | None) -> Tensor:
        """The difference of the weight from the pre-trained one at the start, its fold and its product included."""
        if not self.residual:
            return product
        if delta is None or self.folds != "rest":
            return torch.zeros(())
        return layer.as_matrix(delta.to_dense())

    def _factors(self, name: str, layer: LoRALayer, delta: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        weight = layer.matrix().detach()
        weight = weight if layer.packed else weight.to("cpu", torch.float32)
        delta = None if delta is None else layer.as_matrix(delta)
        return self.init.factors(weight, delta, len(layer.lora_A), layer.scale, named_seed(seed, name))


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapters in ``model`` by module name, with shared ones listed once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}

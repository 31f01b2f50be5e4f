"""Tunings that train existing weights: all of them, the biases, a random mask, or the head alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedlora.core.component import MODEL_CONFIG, Count, Share, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.state import Fold, PhaseHandover, generator, named_seed
from fedlora.core.tree import Tree
from fedlora.tuning.base import (
    InitialParams,
    Installed,
    Tuning,
    check_matched,
    check_trainable,
    freeze_all_but,
    grouped,
    seed_from_tree,
    seed_to_tree,
)
from fedlora.tuning.matrices import matrix_shape
from fedlora.tuning.targets import Targets, endings, find, is_pattern

_DENSITY = 0.01
_LARGE = 1 << 22
"""Entries from which on a matrix's mask and change are never held dense."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Full(Tuning):
    """Full fine-tuning: every weight is trained."""

    kind: Literal["full"] = "full"

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        return _installed(model, {name for name, _ in model.named_parameters()}, head)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class HeadOnly(Tuning):
    """Linear probe: only the task head is trained."""

    kind: Literal["head_only"] = "head_only"
    freezes_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = False

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """See ``Tuning.install``; a model without a separate head, such as a language model, is refused."""
        if not head:
            raise ConfigError(
                f"head_only would train nothing: {type(model).__name__} has no task head of its own; "
                "use `lora`, `bitfit` or `full`"
            )
        return _installed(model, set(), head)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class BitFit(Tuning):
    """BitFit (arXiv 2106.10199): the bias terms and the head are trained."""

    kind: Literal["bitfit"] = "bitfit"

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """See ``Tuning.install``; a model without biases is refused."""
        biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
        check_matched(len(biases - head), "bitfit (parameters named bias)", model)
        return _installed(model, biases, head)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class SparseMask(Tuning):
    """SLoRA's first phase (arXiv 2308.06522, Sec. 3): a random, data-independent subset of the weights is trained.

    Every client draws the same mask from a seed of a few bytes, so values are sent packed, without indices. The trained
    parameter *is* the packed vector: optimiser state, weight decay and proximal terms exist on the mask only.

    Args:
        density: fraction of each matrix that is trained: ``int(density * entries)``, at least one. 0.01 unless ``rank``
            is set.
        rank: instead of a density: train as many entries of each matrix as a LoRA of this rank has parameters,
            ``min(entries, rank * (out + in))``.
        targets: see ``tuning.targets.find``.
        biases: whether all biases of the targets are trained too.
    """

    kind: Literal["sparse_mask"] = "sparse_mask"
    density: Share | None = None
    rank: Count | None = None
    targets: Targets = "all-linear"
    biases: bool = False

    def __post_init__(self) -> None:
        if self.density is not None and self.rank is not None:
            raise ConfigError(
                f"the size of a sparse mask follows from density = {self.density:g} or from rank = {self.rank}, not "
                "from both; leave one of them out"
            )

    def entries(self, rows: int, columns: int) -> int:
        """The number of trained entries of a matrix."""
        if self.rank is not None:
            return min(rows * columns, self.rank * (rows + columns))
        return max(1, int((_DENSITY if self.density is None else self.density) * rows * columns))

    @property
    def has_pattern(self) -> bool:
        return is_pattern(self.targets)

    def without_pattern(self, model: nn.Module, head: frozenset[str]) -> SparseMask:
        return replace(self, targets=endings(model, self.targets, head)) if self.has_pattern else self

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """See ``Tuning.install``; the mask itself is drawn in ``apply_setup``."""
        found = find(model, self.targets, head)
        weights = {f"{name}.weight": module for name, module in found.items()}
        dense = set(head)
        if self.biases:
            dense |= {f"{name}.bias" for name, module in found.items() if getattr(module, "bias", None) is not None}
        direct = freeze_all_but(model, dense)
        packed: dict[str, nn.Parameter] = {}
        for name, module in weights.items():
            weight = module.weight
            assert isinstance(weight, Tensor)
            check_trainable(name, weight)
            count = self.entries(*matrix_shape(module))
            packed[name] = nn.Parameter(torch.zeros(count, device=weight.device))
        order = [name for name, _ in model.named_parameters() if name in packed or name in direct]
        parameters = {name: packed[name] if name in packed else direct[name] for name in order}
        return Installed(model, parameters, grouped(parameters, head))

    def start(self, installed: Installed, seed: int, carry: PhaseHandover | None) -> InitialParams:
        """See ``Tuning.start``; the part of a delta outside the mask is lost, and ``energy_kept`` is the share that
        remains."""
        named = dict(installed.model.named_parameters())
        places = self._places(installed, seed)
        params = {name: _packed(named[name], places.get(name)) for name in installed.parameters}
        if carry is None:
            return InitialParams(params, Fold(), seed, {})
        kept = 0.0
        for name in params:
            if name in carry.head:
                params[name] = carry.head[name]
            elif name in carry.delta:
                change = _packed(carry.delta[name].to_dense(), places.get(name))
                params[name] = params[name] + change
                kept += float(change.square().sum())
        total = sum(float(value.square().sum()) for value in carry.delta.values())
        return InitialParams(params, Fold(), seed, {"energy_kept": kept / total if total else 1.0})

    def setup(self, installed: Installed, start: InitialParams, reference: bool) -> dict[str, Tree]:
        return {"seed": seed_to_tree(start.seed)} | ({"init": start.params} if reference else {})

    def apply_setup(self, installed: Installed, parts: Mapping[str, Tree]) -> Tree:
        """See ``Tuning.apply_setup``: draws the mask and routes gradients to the packed values only."""
        named = dict(installed.model.named_parameters())
        places = self._places(installed, seed_from_tree(parts["seed"]))
        for name, index in places.items():
            packed, weight = installed.parameters[name], named[name]
            places[name] = index = index.to(weight.device)
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(_gather(packed, index))  # type: ignore[no-untyped-call]

        def refresh() -> None:
            with torch.no_grad():
                for name, index in places.items():
                    weight = named[name]
                    weight.view(-1).index_copy_(0, index, installed.parameters[name].to(weight.dtype))

        installed.places = places
        installed.refresh = refresh
        return dict(parts.get("init", {}))

    def changes(self, installed: Installed, init: Tree, params: Tree) -> Tree:
        """See ``Tuning.changes``: the packed values at their positions, zero elsewhere."""
        named = dict(installed.model.named_parameters())
        result = {}
        for name, change in Tuning.changes(self, installed, init, params).items():
            if name in installed.places:
                change = _scattered(change, installed.places[name].to("cpu"), named[name].shape)
            result[name] = change
        return result

    def _places(self, installed: Installed, seed: int) -> dict[str, Tensor]:
        """The positions of the packed values: name to sorted indices into the flattened weight."""
        named = dict(installed.model.named_parameters())
        places = {}
        for name, packed in installed.parameters.items():
            if packed is not named[name]:
                draws = generator(named_seed(seed, f"mask/{name}"))
                places[name] = _draw(named[name].numel(), packed.numel(), draws)
        return places


def _draw(entries: int, count: int, draws: torch.Generator) -> Tensor:
    """``count`` of ``entries`` positions, uniformly, sorted; of a large matrix, in memory proportional to ``count``."""
    if entries < _LARGE or count * 8 > entries:
        return torch.randperm(entries, generator=draws)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:  # never overshoots, so all subsets of this size are equally likely
        found = torch.unique(torch.cat([found, torch.randint(entries, (count - len(found),), generator=draws)]))
    return found


def _scattered(values: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape with ``values`` at the flat positions ``index``; sparse if large and mostly zero."""
    if shape.numel() < _LARGE or len(index) * 8 > shape.numel() or len(shape) != 2:
        dense = torch.zeros(shape.numel())
        dense[index] = values
        return dense.view(shape)
    places = torch.stack([index // shape[1], index % shape[1]])
    return torch.sparse_coo_tensor(places, values, shape, is_coalesced=True, check_invariants=True)


def _packed(value: Tensor, index: Tensor | None) -> Tensor:
    flat = value.detach().to("cpu", torch.float32, copy=True)
    return flat if index is None else flat.reshape(-1)[index]


def _gather(packed: nn.Parameter, index: Tensor) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        values = weight.grad.reshape(-1)[index].to(torch.float32)
        packed.grad = values if packed.grad is None else packed.grad + values
        weight.grad = None  # no more than one matrix's dense gradient is alive at a time

    return hook


def _installed(model: nn.Module, trained: set[str], head: frozenset[str]) -> Installed:
    parameters = freeze_all_but(model, trained | head)
    return Installed(model, parameters, grouped(parameters, head))

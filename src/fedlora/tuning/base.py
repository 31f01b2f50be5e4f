"""The ``Tuning`` slot: which weights are trained, and how they are installed in the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedlora.core import tree
from fedlora.core.errors import ConfigError
from fedlora.core.schema import Leaf, Schema
from fedlora.core.state import SEED_BITS, Fold, Folds, PhaseHandover
from fedlora.core.tree import Tree
from fedlora.tuning.matrices import holds_numbers


class InitialParams(NamedTuple):
    """The initial state of a phase.

    Args:
        params: the initial values of the trained parameters.
        fold: an edit of the frozen weights that every client must apply.
        seed: the seed from which a client redraws random parts.
        facts: figures for the ledger, such as the energy kept by a phase hand-over.
    """

    params: Tree
    fold: Fold
    seed: int
    facts: dict[str, float]


def _nothing() -> None:
    return None


@dataclass
class Installed:
    """A model with a tuning installed.

    Args:
        model: the model, changed in place; everything that is not in ``parameters`` is frozen.
        parameters: the trained parameters, by name, in the model's order.
        schema: the leaf of each of them.
        places: for packed parameters, their positions in the flattened weight.
        folded: edits applied to frozen weights, dense, by parameter name.
        folds: the folds of this phase's rounds that are currently in the frozen weights.
        base: the weights that these folds edit, as they were before, by module name.
        seed: the seed from which random parts were redrawn, if the setup contained one.
        frozen_head: the head's parameters if it is not trained, by name; exports include their values.
        refresh: copies ``parameters`` into the weights that the forward pass reads, if those are different tensors.
        notes: sentences about settings that the model does not allow as they are; they are warnings of the ledger.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    schema: Schema
    places: dict[str, Tensor] = field(default_factory=dict)
    folded: Tree = field(default_factory=dict)
    folds: Folds = field(default_factory=Folds)
    base: Tree = field(default_factory=dict)
    seed: int = 0
    frozen_head: dict[str, nn.Parameter] = field(default_factory=dict)
    refresh: Callable[[], None] = field(default=_nothing)
    notes: tuple[str, ...] = ()

    def freeze_head(self) -> None:
        """Excludes the head from training: it keeps its values and is not sent."""
        head = self.schema.names("head")
        self.frozen_head = {name: self.parameters.pop(name) for name in self.schema if name in head}
        for parameter in self.frozen_head.values():
            parameter.requires_grad_(False)
        self.schema = Schema({name: leaf for name, leaf in self.schema.items() if name not in head})

    def head_values(self, params: Mapping[str, Tensor]) -> Tree:
        """The values of the whole head for an export: those in ``params``, and the frozen ones."""
        trained = self.schema.split(params).get("head", {})
        return trained | {name: value.detach().to("cpu", torch.float32) for name, value in self.frozen_head.items()}

    def read(self) -> Tree:
        """A copy of the trained parameters, float32 on the CPU."""
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self.parameters.items()}

    def delta_from(self, start: Mapping[str, Tensor]) -> Tree:
        """The current trained parameters minus ``start``; float32 on the CPU, views of one new vector."""
        delta = tree.unflatten(torch.empty(tree.num_entries(self.parameters)), self.parameters)
        for name, value in delta.items():
            torch.sub(self.parameters[name].detach().to("cpu", torch.float32), start[name], out=value)
        return delta

    def load(self, params: Mapping[str, Tensor]) -> None:
        """Writes ``params`` into the model in place."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.parameters.values()), [params[name] for name in self.parameters])
        self.refresh()


class Tuning(ABC):
    """Defines which weights are trained. A value of this slot holds settings only; the model holds the tensors."""

    @property
    def zero_is_neutral(self) -> bool:
        """Whether a trained entry received as zero leaves the pre-trained function unchanged."""
        return False

    @property
    def lost_ranks_are_neutral(self) -> bool:
        """Whether ranks of adapters received as zero in both factors leave the pre-trained function unchanged."""
        return self.zero_is_neutral

    @property
    def sums_products(self) -> bool:
        """Whether a weight changes by the product of its factors alone, so that means of products are of weights."""
        return True

    @property
    def adapter_rank(self) -> int:
        """The largest rank of low-rank adapters that aggregators and links can work on; 0 if there are none."""
        return 0

    @property
    def moving(self) -> str:
        """The factors that are trained: ``both``, ``B``, or ``alternate``."""
        return "both"

    @property
    def init_from_seed(self) -> bool:
        """Whether adapters can be redrawn from a seed and their shapes alone."""
        return False

    def in_round(self, schema: Schema, round: int) -> Schema:
        """``schema`` with the roles in effect in a round of the phase (0-based)."""
        return schema

    @property
    def has_factors(self) -> bool:
        """Whether it trains low-rank factors ``A`` and ``B``."""
        return False

    @property
    def freezes_base(self) -> bool:
        """Whether no pre-trained weight outside the head is trained."""
        return False

    @property
    def reads_base(self) -> bool:
        """Whether it reads or edits frozen weights, whose rounding it would then see."""
        return True

    @property
    def has_pattern(self) -> bool:
        """Whether it selects modules by a regular expression, which no client accepts from a server."""
        return False

    def without_pattern(self, model: nn.Module, head: frozenset[str]) -> Tuning:
        """The same tuning of the same modules, which are selected by endings of their names.

        Args:
            model: the freshly loaded model.
            head: names of the head's parameters.

        Raises:
            ConfigError: nothing in the model matches.
        """
        return self

    @abstractmethod
    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """Freezes ``model`` except for the trained parameters, adding modules if the method needs them.

        Args:
            model: a freshly loaded model in float32; frozen weights may be bfloat16 if ``freezes_base``.
            head: names of the parameters of the task head, which every tuning marks as trained; freezing it afterwards
                is up to the caller.
            seed: for random parts drawn during installation.

        Raises:
            ConfigError: nothing in the model matches.
        """

    def start(self, installed: Installed, seed: int, carry: PhaseHandover | None) -> InitialParams:
        """The initial values of the trained parameters; runs on the server only.

        Args:
            installed: what ``install`` returned, with unmodified base weights.
            seed: for random initialisation.
            carry: what the previous phase learnt, if there was one.

        Raises:
            ConfigError: this tuning cannot start from what the previous phase learnt.
        """
        params = installed.read()
        if carry is None:
            return InitialParams(params, Fold(), seed, {})
        for name, value in params.items():
            if name in carry.head:
                params[name] = carry.head[name]
            elif name in carry.delta:
                params[name] = value + carry.delta[name]
        kept = sum(float(value.square().sum()) for name, value in carry.delta.items() if name in params)
        total = sum(float(value.square().sum()) for value in carry.delta.values())
        return InitialParams(params, Fold(), seed, {"energy_kept": kept / total if total else 1.0})

    def setup(self, installed: Installed, start: InitialParams, reference: bool) -> dict[str, Tree]:
        """What a client needs besides the parameters of a round, as the parts of a message.

        Args:
            installed: the model, for names and shapes.
            start: what ``start`` returned; for a template, any start with the same shapes.
            reference: whether a link encodes relative to the init, so that the client needs it.
        """
        return {"init": start.params} if reference else {}

    def apply_setup(self, installed: Installed, parts: Mapping[str, Tree]) -> Tree:
        """Applies a received setup to the model, once.

        Returns:
            The init as far as the client has it; complete if ``setup`` was called with ``reference``.
        """
        return dict(parts.get("init", {}))

    def fold(self, installed: Installed, folds: Folds) -> None:
        """Sets the frozen weights to those after the setup, with ``folds`` added.

        Raises:
            ConfigError: this tuning has no matrices that rounds can fold into.
        """
        if folds.version:
            raise ConfigError(f"{type(self).__name__} has no matrices for base updates")

    def size_of(self, fold: Fold, params: Tree) -> float:
        """Euclidean norm of what ``fold`` changes.

        Args:
            fold: the edit.
            params: the trained parameters, for the ranks of adapters.
        """
        return 0.0

    def redraw_init(self, schema: Schema, init: Tree, seed: int) -> Tree:
        """A new initialisation of the adapters after a round, with the head as in ``init``.

        Raises:
            ConfigError: this tuning has no adapters that can be redrawn.
        """
        raise ConfigError(f"{type(self).__name__} has no adapters to reinitialise")

    def changes(self, installed: Installed, init: Tree, params: Tree) -> Tree:
        """The change that training made to the pre-trained weights, dense, by parameter name, without the head.

        Raises:
            ConfigError: the change cannot be expressed as an edit of pre-trained weights.
        """
        return {name: params[name] - init[name] for name in params if name in installed.schema.names("adapter")}


def freeze_all_but(model: nn.Module, trained: list[str] | set[str]) -> dict[str, nn.Parameter]:
    """Freezes ``model`` except the parameters named in ``trained`` and returns those, in the model's order.

    A weight shared by two modules has one name, that of its first occurrence, and is trained and sent once.

    Raises:
        ConfigError: one of them is quantised.
    """
    wanted = set(trained)
    kept = {}
    for name, parameter in model.named_parameters():
        if name in wanted:
            check_trainable(name, parameter)
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            kept[name] = parameter
    return kept


def grouped(names: Iterable[str], head: frozenset[str]) -> Schema:
    """The schema of tensors that are not low-rank factors.

    Args:
        names: names of the trained tensors.
        head: the names that belong to the head.
    """
    return Schema({name: Leaf("head" if name in head else "adapter") for name in names})


def check_trainable(name: str, weight: Tensor) -> None:
    """Refuses to train a quantised weight.

    Raises:
        ConfigError: the entries of ``weight`` are quantisation codes.
    """
    if not holds_numbers(weight):
        raise ConfigError(
            f"{name} is stored quantised ({str(weight.dtype).removeprefix('torch.')}) and cannot be trained; "
            "use `lora`, or load the model unquantised"
        )


def check_matched(matched: int, what: str, model: nn.Module) -> None:
    """Refuses a tuning that would train nothing but the head.

    Raises:
        ConfigError: ``matched`` is zero.
    """
    if not matched:
        names = sorted({name.rsplit(".", 1)[-1] for name, child in model.named_modules() if not list(child.children())})
        raise ConfigError(
            f"{what} matches nothing in {type(model).__name__}; its modules end in: {', '.join(filter(None, names))}"
        )


def seed_to_tree(seed: int) -> Tree:
    """A seed as three float32 values of 16 bits each: exact, and the wire format needs no integers."""
    mask = (1 << 16) - 1
    return {"seed": torch.tensor([float(seed >> shift & mask) for shift in range(0, SEED_BITS, 16)])}


def seed_from_tree(part: Mapping[str, Tensor]) -> int:
    """The inverse of ``seed_to_tree``."""
    return sum(int(piece) << 16 * place for place, piece in enumerate(part["seed"].tolist()))

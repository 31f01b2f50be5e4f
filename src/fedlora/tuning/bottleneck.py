"""Bottleneck adapters: a small two-layer network added to the output of a block."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.component import MODEL_CONFIG, Count, dataclass
from fedlora.core.errors import ConfigError
from fedlora.core.state import PhaseHandover, generator, named_seed
from fedlora.tuning.base import InitialParams, Installed, Tuning, freeze_all_but, grouped
from fedlora.tuning.matrices import copy_attributes, is_linear, is_plain, is_transposed, matrix_shape
from fedlora.tuning.targets import Targets, block_outputs, endings, find, is_pattern, replace_module


class BottleneckLinear(nn.Module):
    """A matrix whose output ``h`` becomes ``h + U relu(D h + d) + u``; it keeps the old module's parameter names.

    Args:
        old: ``nn.Linear`` or ``Conv1D``.
        width: rows of ``D``.
    """

    def __init__(self, old: nn.Module, width: int) -> None:
        super().__init__()
        copy_attributes(old, self)
        size = matrix_shape(old)[0]
        self.weight = old.weight
        self.bias = old.bias
        # a quantised module keeps computing its own product
        self.own = None if is_plain(old) else old
        self.transposed = is_transposed(old)
        assert isinstance(old.weight, Tensor)
        device = old.weight.device
        self.adapter_down = nn.Parameter(torch.zeros(width, size, device=device))
        self.adapter_down_bias = nn.Parameter(torch.zeros(width, device=device))
        self.adapter_up = nn.Parameter(torch.zeros(size, width, device=device))
        self.adapter_up_bias = nn.Parameter(torch.zeros(size, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        """The matrix, then the bottleneck with its own skip connection."""
        output = self._product(inputs)
        narrow = functional.relu(functional.linear(output, self.adapter_down, self.adapter_down_bias))
        return output + functional.linear(narrow, self.adapter_up, self.adapter_up_bias)

    def _product(self, inputs: Tensor) -> Tensor:
        if self.own is not None:
            product: Tensor = self.own(inputs)
            return product
        weight, bias = self.weight, self.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return functional.linear(inputs, weight.T if self.transposed else weight, bias)


_LEAVES = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Bottleneck(Tuning):
    """Bottleneck adapters, and the head.

    Args:
        width: size of the bottleneck.
        style: ``houlsby`` (arXiv 1902.00751) after the attention block and after the feed-forward block; ``pfeiffer``
            (arXiv 2005.00247) after the feed-forward block alone.
        targets: for families whose blocks are unknown: a regular expression over module names, or a tuple of endings.
    """

    kind: Literal["bottleneck"] = "bottleneck"
    width: Count = 16
    style: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    targets: Targets | None = None
    zero_is_neutral: ClassVar[bool] = True
    freezes_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = False

    @property
    def has_pattern(self) -> bool:
        return is_pattern(self.targets)

    def without_pattern(self, model: nn.Module, head: frozenset[str]) -> Bottleneck:
        if self.targets is None or not is_pattern(self.targets):
            return self
        return replace(self, targets=endings(model, self.targets, head))

    def install(self, model: nn.Module, head: frozenset[str], seed: int) -> Installed:
        """See ``Tuning.install``.

        Raises:
            ConfigError: the family's blocks are unknown, or a target is not a linear layer.
        """
        where = ("attention", "feed_forward") if self.style == "houlsby" else ("feed_forward",)
        found = find(model, self.targets, head) if self.targets else block_outputs(model, where, head)
        for name, module in found.items():
            if not is_linear(module):
                raise ConfigError(
                    f"bottleneck adapters follow linear layers, and {name} is {type(module).__name__}; "
                    "leave it out of `targets`, or use `lora`"
                )
        for name, module in found.items():
            replace_module(model, name, BottleneckLinear(module, self.width))
        parameters = freeze_all_but(model, {f"{name}.{leaf}" for name in found for leaf in _LEAVES} | head)
        return Installed(model, parameters, grouped(parameters, head))

    def start(self, installed: Installed, seed: int, carry: PhaseHandover | None) -> InitialParams:
        """See ``Tuning.start``: ``D ~ N(0, 0.01^2)``, everything else zero, so the function does not change."""
        start = Tuning.start(self, installed, seed, carry)
        for name, value in start.params.items():
            if name.endswith(".adapter_down"):
                noise = torch.randn(value.shape, generator=generator(named_seed(seed, name)))
                start.params[name] = 0.01 * noise
        return start

    def changes(self, installed: Installed, init: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``Tuning.changes``.

        Raises:
            ConfigError: always; a bottleneck cannot be expressed as an edit of a matrix.
        """
        raise ConfigError(
            "bottleneck adapters are not an edit of the pre-trained weights, so they cannot be merged or handed to a "
            "next phase; use `lora` where that is needed"
        )

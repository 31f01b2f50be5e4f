"""DoRA: a low-rank adapter that trains the length of each row of a weight apart from its direction."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.errors import ConfigError
from fedlora.tuning.lora_layer import LoRALayer
from fedlora.tuning.matrices import is_linear, is_plain, is_quantized

MAGNITUDE = "lora_magnitude_vector"
"""The parameter with the rows' lengths, under the name that ``peft`` gives it."""


class DoRALinear(LoRALayer):
    """A linear layer with ``diag(m / ||V||) V``, ``V = W + scale * B A``, in place of ``W`` (arXiv 2402.09353, Eq. 5).

    ``m`` has one trained entry per row, and the norms are those of rows. As in ``peft``, gradients treat the norms as
    constants (Sec. 4.3 there).
    """

    def __init__(self, old: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(old, rank, scale, dropout)
        self.lora_magnitude_vector = nn.Parameter(torch.zeros(self.rows, device=self.frozen[0].device))

    def forward(self, inputs: Tensor) -> Tensor:
        """As in ``peft``: under dropout, ``W`` itself reads the whole input, and everything else the dropped one."""
        weight, bias = self.frozen
        matrix, heard = self.as_matrix(weight), self.adapter_input(inputs)
        whole = functional.linear(inputs, matrix)
        own = whole if heard is inputs else functional.linear(heard, matrix)
        low = functional.linear(functional.linear(heard, self.lora_A), self.lora_B)
        _, norms = self._edited(self.lora_A, self.lora_B)
        result: Tensor = (self.lora_magnitude_vector / norms) * torch.add(own, low, alpha=self.scale)
        if heard is not inputs:
            result = result + (whole - own)
        return (result if bias is None else result + bias).to(whole.dtype)

    def lengths(self, edit: Tensor) -> Tensor:
        """The length of each row of ``W + edit``, float32 on the CPU.

        Args:
            edit: ``(out, in)``, on the CPU.
        """
        lengths: Tensor = torch.linalg.vector_norm(self.matrix().detach().to("cpu", torch.float32) + edit, dim=1)
        return lengths

    def rescaling(self, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        """What the magnitudes change beyond ``scale * B A``, ``(out, in)`` float32 on the CPU.

        Args:
            a: the factor ``A``.
            b: the factor ``B``.
            magnitude: the rows' lengths.
        """
        place = self.lora_A.device
        edited, norms = self._edited(a.to(place), b.to(place))
        return ((magnitude.to(place) / norms - 1.0)[:, None] * edited).cpu()

    def _edited(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """``W + scale * B A`` and the norms of its rows, without gradients, in float32 under autocast too."""
        kind = a.device.type
        # not every kind of device has it
        exact = (
            torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
        )
        with torch.no_grad(), exact:
            edited = torch.addmm(self.as_matrix(self.frozen[0]).float(), b.float(), a.float(), alpha=self.scale)
            return edited, torch.linalg.vector_norm(edited, dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def check_dora(name: str, module: nn.Module) -> None:
    """Refuses a module whose rows' lengths cannot be trained.

    Raises:
        ConfigError: it is no linear layer with its values at hand.
    """
    if is_linear(module) and is_quantized(module):
        raise ConfigError(
            f"dora = true needs the values of {name}, which are stored quantised; load the model unquantised, or leave "
            "dora out"
        )
    if not is_linear(module) or not is_plain(module):
        raise ConfigError(
            f"dora = true needs linear layers, and {name} is {type(module).__name__}; leave it out of `targets`, or "
            "leave dora out"
        )

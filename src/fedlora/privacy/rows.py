"""The gradient of each row of a batch, from one forward and one backward pass over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Rows = dict[int, Tensor]
"""The gradients of the rows of one forward pass, ``(rows, *shape)``, by the number of the parameter."""


class NoRule(Exception):
    """A trained parameter is used in a way for which there is no gradient by rows."""


class RowGradients(TorchFunctionMode):
    """Within the block, products with trained parameters also note the gradient of each row of the batch.

    Where a trained parameter enters a product, its detached value takes its place, and a hook on the result computes
    the gradient by rows from the product's input and its output's gradient. Any other use raises ``NoRule``; one that
    ``torch`` cannot show leaves a gradient in the parameter itself, which ``by_row`` finds. So a gradient is
    either complete or refused, whatever the layer. There are rules for the weight and bias of a linear layer, the
    second factor of LoRA, the bias of ``Conv1D``, and the weight and bias of a layer normalisation.

    What is not checked here: that the first dimension of each product's input is the rows, one after the other.

    Args:
        model: the model; its first tensor argument has the rows in its first dimension.
        parameters: the trained parameters.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._model, self._parameters = model, list(parameters)
        self._numbers = {id(value): number for number, value in enumerate(self._parameters)}
        # the views live as long as the block, so that their ids stay theirs
        self._transposed: dict[int, tuple[Tensor, nn.Parameter]] = {}
        self._passes: list[tuple[int, Rows]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The block around loss and backward pass."""
        handle = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            with self:
                yield
        finally:
            handle.remove()

    def by_row(self) -> list[Tensor]:
        """The gradients of all rows in the order in which they passed through the model, float32, by parameter.

        Raises:
            NoRule: a use of a parameter was not seen.
        """
        if any(value.grad is not None for value in self._parameters):
            raise NoRule("a trained parameter has a gradient that no rule computed")
        if not self._passes:
            raise NoRule("the loss calls parts of the model")
        return [self._joined([self._of(number, *each) for each in self._passes]) for number in self._numbers.values()]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Applies a rule where a trained parameter is among the arguments."""
        kwargs = kwargs or {}
        if not any(self._is_trained(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        rule = _RULES.get(func)
        if rule is not None:
            return rule(self, *args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor | tuple | list) and not isinstance(result, torch.Size):
            raise NoRule(f"no rule for {getattr(func, '__name__', func)} of a trained parameter")
        return result

    def _is_trained(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(self._is_trained(each) for each in value)
        return id(value) in self._numbers or id(value) in self._transposed

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._passes.append((len(first), {}))

    @staticmethod
    def _joined(parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of(self, number: int, rows: int, found: Rows) -> Tensor:
        value = self._parameters[number]
        return found[number] if number in found else value.new_zeros((rows, *value.shape), dtype=torch.float32)

    def _plain(self, value: Tensor | None) -> Tensor | None:
        return value.detach() if value is not None and id(value) in self._numbers else value

    def _note(self, result: Tensor, inputs: Tensor, gradients: Callable[[Tensor, int], Mapping[int, Tensor]]) -> Tensor:
        """Has ``gradients`` called with the gradient of ``result``, and the number of rows.

        Args:
            result: of a product.
            inputs: what the product was of; its first dimension is split evenly among the rows.
            gradients: gives the gradient by rows of each trained parameter, by its number.
        """
        if not self._passes:
            raise NoRule("a trained parameter is used outside the model")
        rows, found = self._passes[-1]
        if inputs.dim() < 2 or inputs.shape[0] % rows:
            raise NoRule(f"an input of the shape {tuple(inputs.shape)} does not come in {rows} rows")

        def arrived(gradient: Tensor) -> None:
            with torch.no_grad():
                for number, value in gradients(gradient, rows).items():
                    value = value.float()
                    found[number] = found[number] + value if number in found else value

        if not torch.is_grad_enabled():
            raise NoRule("a trained parameter is used where no gradients are computed")
        if not result.requires_grad:
            result.requires_grad_()
        result.register_hook(arrived)  # type: ignore[no-untyped-call]
        return result

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = functional.linear(inputs, self._plain(weight), self._plain(bias))  # type: ignore[arg-type]
        seen = inputs.detach()

        def gradients(gradient: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
            split = gradient.reshape(rows, -1, gradient.shape[-1])
            if id(weight) in self._numbers:
                yield self._numbers[id(weight)], _products(split, seen.reshape(rows, -1, seen.shape[-1]))
            if id(bias) in self._numbers:
                yield self._numbers[id(bias)], split.sum(1)

        if id(weight) in self._transposed:
            raise NoRule("no rule for a transposed weight of a linear layer")
        return self._note(result, inputs, lambda gradient, rows: dict(gradients(gradient, rows)))

    def _transpose(self, value: Tensor) -> Tensor:
        if id(value) not in self._numbers:
            raise NoRule("no rule for a trained parameter that is transposed twice")
        view = value.detach().T
        self._transposed[id(view)] = view, value  # type: ignore[assignment]
        return view

    def _addmm(self, added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        """``beta * added + alpha * left @ right``, with ``added`` a trained bias or ``right`` a transposed factor."""
        result = torch.addmm(self._plain(added), left, self._plain(right), beta=beta, alpha=alpha)  # type: ignore[arg-type]
        seen = left.detach()
        factor = self._transposed.get(id(right))
        if self._is_trained(left) or id(right) in self._numbers or id(added) in self._transposed:
            raise NoRule("no rule for this place of a trained parameter in a product")
        if id(added) in self._numbers and added.dim() != 1:
            raise NoRule("no rule for a trained matrix that is added to a product")

        def gradients(gradient: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
            split = gradient.reshape(rows, -1, gradient.shape[-1])
            if factor is not None:
                low = seen.reshape(rows, -1, seen.shape[-1])
                yield self._numbers[id(factor[1])], _products(split, low) * alpha
            if id(added) in self._numbers:
                yield self._numbers[id(added)], split.sum(1) * beta

        return self._note(result, left, lambda gradient, rows: dict(gradients(gradient, rows)))

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        shape = list(normalized_shape)
        result = functional.layer_norm(input, shape, self._plain(weight), self._plain(bias), eps)
        seen = input.detach()

        def gradients(gradient: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
            if id(weight) in self._numbers:
                scaled = gradient * functional.layer_norm(seen, shape, eps=eps)
                yield self._numbers[id(weight)], scaled.reshape(rows, -1, *shape).sum(1)
            if id(bias) in self._numbers:
                yield self._numbers[id(bias)], gradient.reshape(rows, -1, *shape).sum(1)

        return self._note(result, input, lambda gradient, rows: dict(gradients(gradient, rows)))


def _products(gradient: Tensor, inputs: Tensor) -> Tensor:
    """``g^T x`` of each row, in the number format in which the layer computed."""
    return torch.bmm(gradient.transpose(1, 2), inputs.to(gradient.dtype))


_RULES: dict[Any, Callable[..., Tensor]] = {
    functional.linear: RowGradients._linear,
    torch.addmm: RowGradients._addmm,
    torch.Tensor.T.__get__: RowGradients._transpose,  # type: ignore[attr-defined]
    functional.layer_norm: RowGradients._layer_norm,
}

"""Would CUDA graphs, or several clients in one batch, make small models faster? A part of ``benchmarks.gpu``.

A wide batch stands for several clients: it has no adapter for each of them, so what it gains is the most they could.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol
from unittest import mock

import torch
import transformers

from fedlora.tasks.base import Batch

WARM_UP = 3
"""Steps before a graph is captured, in which libraries choose kernels and allocate."""
WIDTH = 8
"""The clients of one batch."""


class Graph(Protocol):
    """What is used of a ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None:
        """Runs what was captured."""
        ...


class Plain:
    """Runs its function again: what a graph does, on devices without graphs."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.replay = function


def captured(function: Callable[[], None], device: torch.device) -> Graph:
    """A graph of ``function``, whose tensors stay where they are."""
    if device.type != "cuda":
        return Plain(function)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


class Steps:
    """SGD steps on batches of one shape, one by one or from a graph.

    Args:
        loss_of: the loss of a batch.
        values: the trained parameters.
        batches: of one shape, on the device.
    """

    def __init__(
        self, loss_of: Callable[[Batch], torch.Tensor], values: list[torch.nn.Parameter], batches: list[Batch]
    ) -> None:
        self.loss_of, self.values, self.batches = loss_of, values, batches
        self.device = values[0].device
        self.start = [value.detach().clone() for value in values]
        self.optimizer = torch.optim.SGD(values, lr=0.05, momentum=0.9, foreach=True)
        self.static = {name: value.clone() for name, value in batches[0].items()}
        self._step(batches[0])  # makes the momentum
        self.graph = self._capture()

    def eager(self) -> list[torch.Tensor]:
        """The parameters after a step for each batch."""
        self._reset()
        for batch in self.batches:
            self._step(batch)
        return [value.detach().clone() for value in self.values]

    def graphed(self) -> list[torch.Tensor]:
        """The same from the graph."""
        self._reset()
        for batch in self.batches:
            for name, value in batch.items():
                self.static[name].copy_(value)
            self.graph.replay()
        return [value.detach().clone() for value in self.values]

    def _capture(self) -> Graph:
        if self.device.type == "cuda":
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._step(self.static)
            torch.cuda.current_stream(self.device).wait_stream(side)
        self.optimizer.zero_grad()
        return captured(lambda: self._step(self.static), self.device)

    def _step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.loss_of(batch).backward()
        self.optimizer.step()

    def _reset(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.values, self.start)
            torch._foreach_zero_([self.optimizer.state[value]["momentum_buffer"] for value in self.values])


def unpacked() -> AbstractContextManager[Any]:
    """Within the block, ``transformers`` takes each row for one sequence.

    Otherwise it looks at the positions for several, for which the host waits. During a capture it cannot, supposes that
    there are, and makes a mask: a graph would have other kernels of attention than the steps that it is compared with.
    """
    masks = transformers.masking_utils
    return mock.patch.object(masks, "find_packed_sequence_indices", return_value=None, create=True)


def widened(batch: Batch) -> Batch:
    """The rows of ``WIDTH`` clients in one batch."""
    return {name: value.repeat(WIDTH, *[1] * (value.dim() - 1)) for name, value in batch.items()}


def gains(
    seconds: Callable[..., dict[str, float]],
    loss_of: Callable[[Batch], torch.Tensor],
    values: list[torch.nn.Parameter],
    batches: list[Batch],
) -> dict[str, object]:
    """What a graph of a step and wider batches gain.

    Args:
        seconds: the median seconds of each function by name, which are run in turns.
        loss_of: the loss of a batch.
        values: the trained parameters.
        batches: on the device; those of the first one's shape are used.
    """
    shape = shape_of(batches[0])
    alike = [batch for batch in batches if shape_of(batch) == shape]
    single = Steps(loss_of, values, alike)
    stepped = single.eager()
    if all(map(torch.equal, stepped, single.start)):
        raise RuntimeError("the steps moved nothing, so their bits tell nothing")
    same = all(map(torch.equal, stepped, single.graphed()))
    wide = Steps(loss_of, values, [widened(batch) for batch in alike])
    took = seconds(eager=single.eager, graphed=single.graphed, wide=wide.eager, wide_graphed=wide.graphed)
    return {
        "steps": len(alike),
        "ms per step": 1e3 * took["eager"] / len(alike),
        "ms per step, graph": 1e3 * took["graphed"] / len(alike),
        "the same bits from a graph": same,
        "eager / graph, time": took["eager"] / took["graphed"],
        "graph / wide batch, time per client": WIDTH * took["graphed"] / took["wide"],
        "graph / graph of a wide batch, time per client": WIDTH * took["graphed"] / took["wide_graphed"],
    }


def shape_of(batch: Batch) -> dict[str, torch.Size]:
    """The shape of each tensor."""
    return {name: value.shape for name, value in batch.items()}

"""In how many bits a number travels: the ``Precision`` slot and its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, final, get_args

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedlora.component import STRICT
from fedlora.tree import Tree


class Precision(ABC):
    """The number format of the values in a message.

    ``from_bytes(to_bytes(x), len(x)) == round_values(x)`` for every finite ``x``, bit for bit.
    """

    code: ClassVar[int]
    """The byte that names this format in a message; never reused for another."""

    @abstractmethod
    def round_values(self, values: Tensor) -> Tensor:
        """The float32 values that the receiver will hold; ``values`` itself where nothing changes. Any shape."""

    @abstractmethod
    def num_bytes(self, count: int) -> int:
        """The length of ``to_bytes`` of ``count`` values."""

    @abstractmethod
    def to_bytes(self, values: Tensor) -> bytes | memoryview:
        """The values as bytes, little-endian.

        Args:
            values: float32, one-dimensional, contiguous, on the CPU.

        Returns:
            ``num_bytes(len(values))`` bytes, which may be those of ``values`` itself: use them before it changes.
        """

    @abstractmethod
    def from_bytes(self, raw: bytes | memoryview, count: int) -> Tensor:
        """The inverse of ``to_bytes``.

        Args:
            raw: exactly ``num_bytes(count)`` bytes.
            count: how many values they hold.

        Returns:
            float32, shape ``(count,)``, in memory of its own.
        """

    def round(self, tree: Tree) -> Tree:
        """``round_values`` of every tensor, in a new dict."""
        return {name: self.round_values(value) for name, value in tree.items()}


@final
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Float32(Precision):
    """IEEE 754 binary32, four bytes a value: nothing is lost."""

    kind: Literal["float32"] = "float32"
    code: ClassVar[int] = 1

    def round_values(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values

    def num_bytes(self, count: int) -> int:
        """``4 * count``."""
        return 4 * count

    def to_bytes(self, values: Tensor) -> bytes | memoryview:
        """Four bytes a value, not copied on a little-endian machine."""
        return values.numpy().astype("<f4", copy=False).view(np.uint8).data

    def from_bytes(self, raw: bytes | memoryview, count: int) -> Tensor:
        """Four bytes a value."""
        return torch.from_numpy(np.frombuffer(raw, dtype="<f4", count=count).astype(np.float32))


@final
@dataclass(frozen=True, kw_only=True, config=STRICT)
class BFloat16(Precision):
    """The upper half of a float32, two bytes a value: eight significant bits, rounded to nearest, ties to even.

    The relative error of normal numbers is at most ``2 ** -8``. Magnitudes from about ``3.396e38`` up round to
    infinity, which ``pack`` refuses.

    >>> BFloat16().round({"a": torch.tensor([1.0, 1.00390625, 1.01171875])})["a"].tolist()
    [1.0, 1.0, 1.015625]
    """

    kind: Literal["bfloat16"] = "bfloat16"
    code: ClassVar[int] = 2

    def round_values(self, values: Tensor) -> Tensor:
        """The nearest value with eight significant bits, the even one of two."""
        return values.to(torch.bfloat16).to(torch.float32)

    def num_bytes(self, count: int) -> int:
        """``2 * count``."""
        return 2 * count

    def to_bytes(self, values: Tensor) -> bytes | memoryview:
        """Two bytes a value."""
        return values.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False).tobytes()

    def from_bytes(self, raw: bytes | memoryview, count: int) -> Tensor:
        """Two bytes a value."""
        upper = np.frombuffer(raw, dtype="<u2", count=count).astype(np.uint32)
        return torch.from_numpy((upper << np.uint32(16)).view(np.float32))


AnyPrecision = Annotated[Float32 | BFloat16, Field(discriminator="kind")]
"""Every precision, told apart by ``kind``; a new one is one more class in this line."""

PRECISIONS: dict[str, type[Precision]] = {cls.kind: cls for cls in get_args(get_args(AnyPrecision)[0])}
"""The table of precisions, by ``kind``."""

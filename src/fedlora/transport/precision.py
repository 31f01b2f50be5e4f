"""In how many bits a number travels: the ``Precision`` slot, and the formats of floating point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.component import MODEL_CONFIG, dataclass
from fedlora.core.errors import WireError
from fedlora.transport.framing import Reader

Floats = NDArray[np.float32]


class Written(NamedTuple):
    """Values as bytes, and the float32 values that the receiver reads from them."""

    chunks: list[bytes | memoryview]
    values: Floats


class Precision(ABC):
    """The number format of the values in a message."""

    code: ClassVar[int]
    """The byte that names this format in a message, never reused for another; from 128 on for formats of others."""
    is_floating: ClassVar[bool] = False
    """Whether each value keeps an exponent of its own, so that only the tiniest become zero."""

    @property
    @abstractmethod
    def value_bits(self) -> float:
        """Bits of a value before any entropy coding, with its share of what goes with several."""

    @property
    @abstractmethod
    def lossy(self) -> bool:
        """Whether what arrives may differ from what was there."""

    @abstractmethod
    def settings(self) -> bytes:
        """What ``from_settings`` needs to read these values again."""

    @classmethod
    @abstractmethod
    def from_settings(cls, reader: Reader) -> Precision:
        """The inverse of ``settings``.

        Raises:
            WireError: no such settings exist.
        """

    @abstractmethod
    def nonzero(self, values: Floats) -> Floats:
        """``values`` with zeros where this format has no other number for them, so that no position is spent on them.

        The same array where nothing changes.
        """

    @abstractmethod
    def write(self, values: Floats, runs: Sequence[int], seed: int) -> Written:
        """The values as bytes.

        Args:
            values: one-dimensional, from ``nonzero``.
            runs: how many belong to each tensor.
            seed: read only by formats that draw.

        Raises:
            WireError: a value is NaN, or infinite in this format.
        """

    @abstractmethod
    def read(self, reader: Reader, runs: Sequence[int]) -> Floats:
        """The inverse of ``write``: float32, one-dimensional, in memory of its own.

        Raises:
            WireError: the bytes are not of this format, or a value is NaN or infinite.
        """


class Plain(Precision):
    """A format in which every value stands for itself, in whole bytes, little-endian."""

    is_floating: ClassVar[bool] = True
    dtype: ClassVar[str]
    """What NumPy calls the bytes of a value."""

    @property
    def value_bits(self) -> int:
        return 8 * np.dtype(self.dtype).itemsize

    @property
    def lossy(self) -> bool:
        return self.value_bits < 32

    def settings(self) -> bytes:
        return b""

    @classmethod
    def from_settings(cls, reader: Reader) -> Precision:
        return cls()

    def to_bytes(self, values: Floats) -> bytes | memoryview:
        """The values, which may be those of the array itself: use them before it changes."""
        return values.astype(self.dtype, copy=False).view(np.uint8).data

    def from_bytes(self, raw: memoryview) -> Floats:
        """The inverse of ``to_bytes``."""
        return np.frombuffer(raw, dtype=self.dtype).astype(np.float32)

    def write(self, values: Floats, runs: Sequence[int], seed: int) -> Written:
        if not np.isfinite(values).all():
            raise WireError("NaN or infinite")
        return Written([self.to_bytes(values)], values)

    def read(self, reader: Reader, runs: Sequence[int]) -> Floats:
        values = self.from_bytes(reader.take(sum(runs) * self.value_bits // 8))
        if not np.isfinite(values).all():
            raise WireError("a value that is NaN or infinite")
        values += 0.0  # a negative zero is a zero
        return values


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Float32(Plain):
    """IEEE 754 binary32, four bytes a value: nothing is lost."""

    kind: Literal["float32"] = "float32"
    code: ClassVar[int] = 1
    dtype: ClassVar[str] = "<f4"

    def nonzero(self, values: Floats) -> Floats:
        return values


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class BFloat16(Plain):
    """The upper half of a float32, two bytes a value: eight significant bits, rounded to nearest, ties to even.

    The relative error of normal numbers is at most ``2 ** -8``. Magnitudes from about ``3.396e38`` up round to
    infinity, which is refused.

    >>> BFloat16().nonzero(np.array([1.0, 1.00390625, 1.01171875], np.float32)).tolist()
    [1.0, 1.0, 1.015625]
    """

    kind: Literal["bfloat16"] = "bfloat16"
    code: ClassVar[int] = 2
    dtype: ClassVar[str] = "<u2"  # NumPy has no bfloat16

    def nonzero(self, values: Floats) -> Floats:
        return torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()

    def to_bytes(self, values: Floats) -> bytes | memoryview:
        return (values.view(np.uint32) >> np.uint32(16)).astype(self.dtype).tobytes()

    def from_bytes(self, raw: memoryview) -> Floats:
        return (np.frombuffer(raw, dtype=self.dtype).astype(np.uint32) << np.uint32(16)).view(np.float32)


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Float16(Plain):
    """IEEE 754 binary16, two bytes a value: eleven significant bits, rounded to nearest, ties to even.

    The relative error is at most ``2 ** -11`` for magnitudes from ``6.1e-5`` to ``65504``. Below, the error is
    absolute, and at ``3e-8`` a value becomes zero; larger ones are refused. So bfloat16 is the safer of the two.

    >>> Float16().nonzero(np.array([1.0, 1.0004882812, 1e-9], np.float32)).tolist()
    [1.0, 1.0, 0.0]
    """

    kind: Literal["float16"] = "float16"
    code: ClassVar[int] = 3
    dtype: ClassVar[str] = "<f2"

    def nonzero(self, values: Floats) -> Floats:
        with np.errstate(over="ignore"):  # infinity is refused where it is written
            return values.astype(np.float16).astype(np.float32)

"""The ``Precision`` slot: the number format of sent values; here its floating-point formats."""

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
    """The byte that identifies this format in a message, never reused; user-defined formats start at 128."""
    is_floating: ClassVar[bool] = False
    """Whether each value has its own exponent, so that only the tiniest become zero."""

    @property
    @abstractmethod
    def value_bits(self) -> float:
        """Bits per value before any entropy coding, including its share of data that several values have in common."""

    @property
    @abstractmethod
    def lossy(self) -> bool:
        """Whether the decoded values may differ from the original ones."""

    @abstractmethod
    def settings(self) -> bytes:
        """The settings as bytes, from which ``from_settings`` restores this format."""

    @classmethod
    @abstractmethod
    def from_settings(cls, reader: Reader) -> Precision:
        """The inverse of ``settings``.

        Raises:
            WireError: the settings are invalid.
        """

    @abstractmethod
    def nonzero(self, values: Floats) -> Floats:
        """``values`` with zeros where this format would round them to zero, so that no position is stored for them.

        Each value is rounded on its own: a message rounds those that it stores, and all only where some become zero.
        Returns the same array if nothing changes.
        """

    @abstractmethod
    def write(self, values: Floats, runs: Sequence[int], seed: int) -> Written:
        """Encodes the values as bytes.

        Args:
            values: one-dimensional, from ``nonzero``.
            runs: the number of values of each tensor.
            seed: used only by formats with random rounding.

        Raises:
            WireError: a value is NaN, or infinite once rounded to this format.
        """

    @abstractmethod
    def read(self, reader: Reader, runs: Sequence[int]) -> Floats:
        """The inverse of ``write``: a float32 vector that owns its memory.

        Raises:
            WireError: the bytes are not in this format, or a value is NaN or infinite.
        """


class Plain(Precision):
    """A format that stores each value on its own, in whole bytes, little-endian."""

    is_floating: ClassVar[bool] = True
    dtype: ClassVar[str]
    """The NumPy dtype of a stored value."""

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
        """The values as bytes; they may be a view of the array, so use them before it changes."""
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
    """IEEE 754 binary32, four bytes per value; lossless."""

    kind: Literal["float32"] = "float32"
    code: ClassVar[int] = 1
    dtype: ClassVar[str] = "<f4"

    def nonzero(self, values: Floats) -> Floats:
        return values


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class BFloat16(Plain):
    """The upper half of a float32, two bytes per value: eight significant bits, rounded to nearest, ties to even.

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
    """IEEE 754 binary16, two bytes per value: eleven significant bits, rounded to nearest, ties to even.

    The relative error is at most ``2 ** -11`` for magnitudes from ``6.1e-5`` to ``65504``. Below that range the error
    is absolute, and values up to ``3e-8`` become zero; above it, values are refused. bfloat16 is the safer choice.

    >>> Float16().nonzero(np.array([1.0, 1.0004882812, 1e-9], np.float32)).tolist()
    [1.0, 1.0, 0.0]
    """

    kind: Literal["float16"] = "float16"
    code: ClassVar[int] = 3
    dtype: ClassVar[str] = "<f2"

    def nonzero(self, values: Floats) -> Floats:
        return torch.from_numpy(values).to(torch.float16).to(torch.float32).numpy()

    def to_bytes(self, values: Floats) -> bytes | memoryview:
        return torch.from_numpy(values).to(torch.float16).numpy().astype(self.dtype, copy=False).tobytes()

    def from_bytes(self, raw: memoryview) -> Floats:
        halves = np.frombuffer(raw, dtype=self.dtype).astype(np.float16)
        return torch.from_numpy(halves).to(torch.float32).numpy()  # faster than NumPy's conversion

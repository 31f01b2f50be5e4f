"""Uniform quantisation: values as integer multiples of a scale, entropy coded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

from fedlora.core.component import MODEL_CONFIG, dataclass
from fedlora.core.errors import WireError
from fedlora.transport import symbols as coding
from fedlora.transport.coder import splitmix
from fedlora.transport.framing import Reader
from fedlora.transport.precision import Floats, Precision, Written
from fedlora.transport.scales import Group, groups_of, least_squares, mean_magnitudes
from fedlora.transport.symbols import Symbols

Bits = Literal[1, 2, 4, 8]
Block = Literal[64, 128, 256]

_BITS: dict[int, Bits] = {1: 1, 2: 2, 4: 4, 8: 8}
_BLOCKS: dict[int, Block | None] = {0: None, 6: 64, 7: 128, 8: 256}  # by base-2 logarithm
_SMALLEST = np.float32(2.0**-126)  # smallest normal number: products with subnormal ones depend on the processor's mode


@final
@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Uniform(Precision):
    """Stores a value as ``q * scale`` with an integer ``|q| <= 2 ** (bits - 1) - 1``; with one bit, ``q`` is the sign.

    Every tensor, or every block of its sent values, has one scale, a bfloat16, so that the product is exact in float32.
    The ``q`` are entropy coded with the counts of their magnitudes if that takes fewer than ``bits`` bits each.

    ``rounding="nearest"`` minimises the squared error, alternating ``scale = sum |v| |q| / sum q^2`` and
    ``q = clip(round(v / scale))`` from the best scale for normally distributed values, or from
    ``max |v| / (2 ** (bits - 1) - 1)`` where an outlier makes that better; with 8 bits the scale is ``max |v| / 127``,
    with one bit the mean magnitude (EF-signSGD, arXiv 1901.09847). ``"stochastic"`` is unbiased: the scale is
    ``max |v| / (2 ** (bits - 1) - 1)``, and ``v / scale`` is rounded up with a probability equal to its fractional part
    (QSGD, arXiv 1610.02132); with one bit the sign is positive with probability ``(1 + v / max |v|) / 2``.

    Args:
        bits: bits per value before entropy coding.
        block: number of values of a tensor that share a scale; all of them if None.
        rounding: to the nearest multiple, or stochastic and unbiased.
    """

    kind: Literal["uniform"] = "uniform"
    bits: Bits = 8
    block: Block | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    code: ClassVar[int] = 4

    @property
    def value_bits(self) -> float:
        """``bits``, plus the value's share of its block's scale."""
        return self.bits + (16 / self.block if self.block else 0)

    @property
    def lossy(self) -> bool:
        """Always true."""
        return True

    @property
    def largest(self) -> int:
        """The largest ``q``."""
        return coding.largest_of(self.bits)

    def settings(self) -> bytes:
        """The bits, and the base-2 logarithm of the block size, 0 for None."""
        return bytes([self.bits, self.block.bit_length() - 1 if self.block else 0])

    @classmethod
    def from_settings(cls, reader: Reader) -> Precision:
        bits, block = reader.take(2)
        if bits not in _BITS or block not in _BLOCKS:
            raise WireError(f"the unknown number format of {bits} bits in blocks of 2 ** {block}")
        return cls(bits=_BITS[bits], block=_BLOCKS[block])

    def nonzero(self, values: Floats) -> Floats:
        """``values`` itself: a kept value that is rounded to zero is stored like the others."""
        return values

    def write(self, values: Floats, runs: Sequence[int], seed: int) -> Written:
        """Writes the scales, then the symbols, raw or entropy coded."""
        blocks = self._blocks(runs)
        groups = list(groups_of(blocks))
        scales = self._scales(np.abs(values), blocks, groups)
        symbols, arrived = np.empty(len(values), np.int8), np.empty(len(values), np.float32)
        draws = splitmix(seed, len(values)) if self.rounding == "stochastic" else None
        nonzero = np.maximum(scales, _SMALLEST)  # where a scale is 0, so are the values
        for group in groups:
            spread, part = group.spread(nonzero[group.blocks]), symbols[group.values]
            part[:] = self._symbols(values[group.values], spread, None if draws is None else draws[group.values])
            np.multiply(part, spread, out=arrived[group.values])
        chunks = [(scales.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()]
        return Written([*chunks, *coding.encode(symbols, self.bits)], arrived)

    def read(self, reader: Reader, runs: Sequence[int]) -> Floats:
        blocks = self._blocks(runs)
        raw = np.frombuffer(reader.take(2 * len(blocks)), dtype="<u2").astype(np.uint32)
        scales = (raw << np.uint32(16)).view(np.float32)
        if not (np.isfinite(scales).all() and (raw < 0x8000).all()):
            raise WireError("a scale that is NaN, infinite or negative")
        symbols = coding.decode(reader, self.bits, sum(runs))
        with np.errstate(over="ignore"):  # infinity is refused here
            values = _multiply(symbols, scales, blocks)
            small = np.isfinite(scales * np.float32(self.largest)).all()
        if not small and not np.isfinite(values).all():
            raise WireError("a value that is infinite")
        return values

    def _blocks(self, runs: Sequence[int]) -> NDArray[np.intp]:
        """The number of values that share each scale."""
        if self.block is None:
            return np.array([run for run in runs if run], np.intp)
        whole = [[self.block] * (run // self.block) + [run % self.block] * (run % self.block > 0) for run in runs]
        return np.array([length for lengths in whole for length in lengths], np.intp)

    def _scales(self, magnitude: Floats, blocks: NDArray[np.intp], groups: Sequence[Group]) -> Floats:
        """One bfloat16 scale per block, rounded up so that the largest value stays in range."""
        top: Floats = np.maximum.reduceat(magnitude, np.cumsum(blocks) - blocks) if len(blocks) else magnitude
        if not np.isfinite(top).all():
            raise WireError("NaN or infinite")
        scales: Floats = top / np.float32(self.largest)
        if self.rounding == "nearest" and self.bits < 8:
            scales = (
                mean_magnitudes(magnitude, groups, scales)
                if self.bits == 1
                else least_squares(magnitude, groups, scales, self.largest)
            )
        np.maximum(scales, _SMALLEST, out=scales, where=top > 0)
        upper = (scales.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16) << np.uint32(16)
        scales = upper.view(np.float32)
        with np.errstate(over="ignore"):
            if not np.isfinite(scales * np.float32(self.largest)).all():
                raise WireError("NaN or infinite")
        return scales

    def _symbols(self, values: Floats, scales: Floats, draws: NDArray[np.uint64] | None) -> Floats | Symbols:
        """The ``q`` of every value."""
        if draws is None and self.bits == 2:
            return _signs(values, scales * np.float32(0.5))  # half a scale is rounded to zero
        q: Floats = values / scales
        if draws is None:
            if self.bits == 1:
                return _signs(q, np.zeros(1, np.float32))
            np.rint(q, out=q)
            if self.bits == 8:  # the scale is that of the largest value
                return q
        else:
            parts = (draws >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
            if self.bits == 1:  # to -1 or 1, and 0 where the value is 0
                signs: Symbols = np.where(parts < (1 + q) / 2, np.int8(1), np.int8(-1)) * (q != 0)
                return signs
            np.floor(np.add(q, parts, out=q), out=q)
        return q.clip(np.float32(-self.largest), np.float32(self.largest), out=q)


def _signs(values: Floats, least: Floats) -> Symbols:
    """The signs of values beyond ``least``, and 0 for the others; ``sign`` takes branches."""
    signs: Symbols = (values > least).view(np.int8) - (values < -least).view(np.int8)
    return signs


def _multiply(symbols: Symbols, scales: Floats, blocks: NDArray[np.intp]) -> Floats:
    values = np.empty(len(symbols), np.float32)
    for group in groups_of(blocks):
        np.multiply(symbols[group.values], group.spread(scales[group.blocks]), out=values[group.values])
    return values

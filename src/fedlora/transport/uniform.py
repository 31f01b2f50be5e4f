"""Uniform quantisation: values as integer multiples of a scale, entropy coded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from fedlora.core.component import MODEL_CONFIG, dataclass
from fedlora.core.errors import WireError
from fedlora.transport.coder import decode_symbols, encode_symbols, pack_bits, splitmix, take_bits
from fedlora.transport.framing import Reader, varint
from fedlora.transport.precision import Floats, Precision, Written

Bits = Literal[1, 2, 4, 8]
Block = Literal[64, 128, 256]
Symbols = NDArray[np.int32]

_RAW, _CLASSES, _COUNTED = range(3)  # ways to write symbols
_PER_SYMBOL = 64  # values per possible symbol above which counting symbols beats counting classes
_STEP = {1: 0.8, 2: 1.22, 4: 0.35}  # the best scale for normally distributed values, in units of their root mean square
_REFINEMENTS = 3
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
    ``q = clip(round(v / scale))`` from the best scale for normally distributed values; with 8 bits the scale is
    ``max |v| / 127``, with one bit the mean magnitude (EF-signSGD, arXiv 1901.09847). ``"stochastic"`` is unbiased: the
    scale is ``max |v| / (2 ** (bits - 1) - 1)``, and ``v / scale`` is rounded up with a probability equal to its
    fractional part (QSGD, arXiv 1610.02132); with one bit the sign is positive with probability
    ``(1 + v / max |v|) / 2``.

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
        return max(1, (1 << self.bits - 1) - 1)

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
        if not np.isfinite(values).all():
            raise WireError("NaN or infinite")
        blocks = self._blocks(runs)
        scales = self._scales(values, blocks)
        symbols = self._symbols(values, scales, blocks, seed)
        chunks: list[bytes | memoryview] = [(scales.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()]
        many = len(symbols) >= _PER_SYMBOL * (2 * self.largest + 1)
        coded = _encode_symbols(symbols, self.largest) if many else _encode_classes(symbols, self.largest)
        raw = -(-self.bits * len(symbols) // 8)
        if self.bits == 1 or len(coded) < raw:
            chunks += [bytes([_COUNTED if many else _CLASSES]), coded]
        else:
            chunks += [bytes([_RAW]), pack_bits(_to_bits(symbols, self.bits))]
        return Written(chunks, _multiply(symbols, scales, blocks))

    def read(self, reader: Reader, runs: Sequence[int]) -> Floats:
        blocks = self._blocks(runs)
        raw = np.frombuffer(reader.take(2 * len(blocks)), dtype="<u2").astype(np.uint32)
        scales = (raw << np.uint32(16)).view(np.float32)
        if not (np.isfinite(scales).all() and (raw < 0x8000).all()):
            raise WireError("a scale that is NaN, infinite or negative")
        mode, total = reader.byte(), sum(runs)
        if mode == _COUNTED:
            symbols = decode_symbols(*_counted(reader, 2 * self.largest + 1, total)) - np.int32(self.largest)
        elif mode == _CLASSES:
            symbols = _decode_classes(reader, self.largest, total)
        elif mode == _RAW and self.bits > 1:
            symbols = _from_bits(take_bits(reader, self.bits * total), self.bits)
            if total and int(symbols.min()) < -self.largest:
                raise WireError("a symbol beyond the largest")
        else:
            raise WireError(f"the unknown coding {mode} of symbols")
        with np.errstate(over="ignore"):  # infinity is refused below
            values = _multiply(symbols, scales, blocks)
        if not np.isfinite(values).all():
            raise WireError("a value that is infinite")
        return values

    def _blocks(self, runs: Sequence[int]) -> NDArray[np.intp]:
        """The number of values that share each scale."""
        if self.block is None:
            return np.array([run for run in runs if run], np.intp)
        whole = [[self.block] * (run // self.block) + [run % self.block] * (run % self.block > 0) for run in runs]
        return np.array([length for lengths in whole for length in lengths], np.intp)

    def _scales(self, values: Floats, blocks: NDArray[np.intp]) -> Floats:
        """One bfloat16 scale per block, rounded up so that the largest value stays in range."""
        if not len(blocks):
            return np.zeros(0, np.float32)
        starts = np.concatenate([[0], np.cumsum(blocks)[:-1]])
        magnitude: Floats = np.abs(values)
        top = np.maximum.reduceat(magnitude, starts)
        scales = top.astype(np.float32) / np.float32(self.largest)
        if self.rounding == "nearest" and self.bits < 8:
            scales = self._least_squares(magnitude, starts, blocks, scales)
        scales[top > 0] = np.maximum(scales[top > 0], _SMALLEST)
        upper = (scales.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16) << np.uint32(16)
        scales = upper.view(np.float32)
        with np.errstate(over="ignore"):
            if not np.isfinite(scales * np.float32(self.largest)).all():
                raise WireError("NaN or infinite")
        return scales

    def _least_squares(
        self, magnitude: Floats, starts: NDArray[np.intp], blocks: NDArray[np.intp], top: Floats
    ) -> Floats:
        """The scales that (nearly) minimise the squared error; never larger than ``top``."""
        power = np.add.reduceat(np.square(magnitude, dtype=np.float64), starts) / blocks
        scales = np.minimum(top, (_STEP[self.bits] * np.sqrt(power)).astype(np.float32))
        for _ in range(_REFINEMENTS if self.bits > 1 else 1):
            divisors = np.repeat(np.where(scales > 0, scales, np.float32(1)), blocks)
            q = np.minimum(np.rint(magnitude / divisors), self.largest) if self.bits > 1 else np.sign(magnitude)
            above = np.add.reduceat(np.multiply(magnitude, q, dtype=np.float64), starts)
            below = np.add.reduceat(np.square(q, dtype=np.float64), starts)
            scales = np.where(below > 0, above / np.maximum(below, 1), scales).astype(np.float32)
        return np.minimum(scales, top)

    def _symbols(self, values: Floats, scales: Floats, blocks: NDArray[np.intp], seed: int) -> Symbols:
        """The ``q`` of every value; 0 where the scale is 0."""
        ratios: Floats = values / np.repeat(np.where(scales > 0, scales, np.float32(np.inf)), blocks)
        if self.rounding == "stochastic":
            draws = (splitmix(seed, len(values)) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
            if self.bits == 1:  # to -1 or 1, and 0 where the scale is 0
                signs = np.where(draws < (1 + ratios) / 2, np.float32(1), np.float32(-1))
                rounded = np.where(ratios == 0, np.float32(0), signs)
            else:
                rounded = np.floor(ratios + draws)
        else:
            rounded = np.sign(ratios) if self.bits == 1 else np.rint(ratios)
        symbols: Symbols = np.clip(rounded, -self.largest, self.largest).astype(np.int32)
        return symbols


class _Classes(NamedTuple):
    """Magnitudes up to 127 in 28 classes: 0 to 15 one each, then four per octave, with the lowest bits kept apart."""

    of: NDArray[np.int32]  # magnitude to class
    base: NDArray[np.int32]  # class to its smallest magnitude
    low_bits: NDArray[np.int32]  # class to the number of bits that distinguish its magnitudes


def _classes() -> _Classes:
    magnitudes = np.arange(128)
    octave = np.maximum(np.int32(np.floor(np.log2(np.maximum(magnitudes, 1)))), 4)
    of = np.where(magnitudes < 16, magnitudes, 16 + 4 * (octave - 4) + (magnitudes >> (octave - 2) & 3)).astype(
        np.int32
    )
    base = np.array([int(np.argmax(of == each)) for each in range(28)], np.int32)
    low_bits = np.array([0] * 16 + [2] * 4 + [3] * 4 + [4] * 4, np.int32)
    return _Classes(of, base, low_bits)


_TABLE = _classes()


def _encode_symbols(symbols: Symbols, largest: int) -> bytes:
    """The counts of symbols, from the smallest on, then the coded symbols."""
    shifted = symbols + np.int32(largest)
    counts = np.bincount(shifted, minlength=2 * largest + 1)
    words = encode_symbols(shifted, counts)
    return b"".join([*map(varint, counts.tolist()), varint(len(words) // 4), words])


def _counted(reader: Reader, size: int, total: int) -> tuple[memoryview, NDArray[np.int64]]:
    """The coded symbols, and the count of each of the ``size`` possible symbols."""
    counts = np.array([reader.varint(total) for _ in range(size)], np.int64)
    if counts.sum() != total:
        raise WireError("another number of symbols than values")
    return reader.words(total), counts


def _encode_classes(symbols: Symbols, largest: int) -> bytes:
    """The counts of classes, the coded classes, the signs of nonzero values, and the lowest bits by octave."""
    magnitudes = np.abs(symbols)
    classes = _TABLE.of[magnitudes] if largest > 15 else magnitudes
    counts = np.bincount(classes, minlength=int(_TABLE.of[largest]) + 1)
    words = encode_symbols(classes, counts)
    bits = [symbols[symbols != 0] < 0]
    if largest > 15:
        low = _TABLE.low_bits[classes]
        bits += [_to_bits(magnitudes[low == width], width).astype(np.bool_) for width in (2, 3, 4)]
    return b"".join([*map(varint, counts.tolist()), varint(len(words) // 4), words, pack_bits(np.concatenate(bits))])


def _decode_classes(reader: Reader, largest: int, total: int) -> Symbols:
    words, counts = _counted(reader, int(_TABLE.of[largest]) + 1, total)
    classes = decode_symbols(words, counts)
    magnitudes = _TABLE.base[classes]
    nonzero = total - int(counts[0])
    widths = {width: int(counts[_TABLE.low_bits[: len(counts)] == width].sum()) for width in (2, 3, 4)}
    bits = take_bits(reader, nonzero + sum(width * count for width, count in widths.items()))
    if largest > 15:
        at, low = nonzero, _TABLE.low_bits[classes]
        for width, count in widths.items():
            if count:
                magnitudes[low == width] += _unsigned(bits[at : at + width * count], width)
            at += width * count
    if total and int(magnitudes.max()) > largest:
        raise WireError("a symbol beyond the largest")
    negative = np.flatnonzero(magnitudes)[bits[:nonzero].view(np.bool_)]
    magnitudes[negative] *= -1
    return magnitudes


def _multiply(symbols: Symbols, scales: Floats, blocks: NDArray[np.intp]) -> Floats:
    return symbols.astype(np.float32) * np.repeat(scales, blocks)


def _to_bits(symbols: Symbols, width: int) -> NDArray[np.uint8]:
    """The lowest ``width`` bits of each symbol, lowest first."""
    low = symbols.astype(np.uint8)[:, None]
    return np.unpackbits(low, axis=1, count=width, bitorder="little").reshape(-1)


def _unsigned(bits: NDArray[np.uint8], width: int) -> Symbols:
    return np.packbits(bits.reshape(-1, width), axis=1, bitorder="little").reshape(-1).astype(np.int32)


def _from_bits(bits: NDArray[np.uint8], width: int) -> Symbols:
    """Symbols from two's complement bits, lowest bit first."""
    values = _unsigned(bits, width)
    return values - (values >> (width - 1) << width)

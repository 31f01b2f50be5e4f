"""Reading counts and slices of a message; every size is checked before anything is allocated."""

from __future__ import annotations

from fedlora.core.errors import WireError


class Reader:
    """A cursor over a message; reading past the end raises ``WireError``.

    Args:
        raw: the bytes to read.
    """

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._at = 0

    def rest(self) -> int:
        """The number of bytes left."""
        return len(self._raw) - self._at

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        if count > self.rest():
            raise WireError(f"it ends early: {count} bytes are expected where {self.rest()} are left")
        self._at += count
        return self._raw[self._at - count : self._at]

    def byte(self) -> int:
        """The next byte."""
        if not self.rest():
            self.take(1)  # which is refused
        self._at += 1
        return self._raw[self._at - 1]

    def varint(self, largest: int) -> int:
        """A base-128 count, lowest digit first; refused if it exceeds ``largest`` or is not in its shortest form."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if value > largest or shift > 63:
                raise WireError(f"it states a count of {value} or more where at most {largest} is possible")
            if byte < 128:
                if byte == 0 and shift > 7:
                    raise WireError("it states a count in more digits than needed")
                return value

    def words(self, symbols: int) -> memoryview:
        """A count of 32-bit words and those words: a range coder writes at most one per symbol, and two at its end."""
        return self.take(4 * self.varint(min(symbols + 2, self.rest() // 4)))


def varint(value: int) -> bytes:
    """``value`` in base 128, lowest digit first, with the high bit set on every byte but the last."""
    if value < 128:
        return bytes([value])
    return bytes([value & 127 | 128]) + varint(value >> 7)
